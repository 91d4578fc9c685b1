"""What the single checks of `earnest verify` amount to."""

from __future__ import annotations

from earnest.checkpoint.integrity import IntegrityReport
from earnest.verify.exactness import ExactnessReport
from earnest.verify.nearness import NearnessReport
from earnest.verify.selfcheck import UNTRAINED, SelfCheckReport


def verdict(
    integrity: IntegrityReport,
    self_check: SelfCheckReport | None = None,
    exactness: ExactnessReport | None = None,
    nearness: NearnessReport | None = None,
) -> bool:
    """Whether a checkpoint passes as a whole; checks that were not asked for are None.

    A self-check that could not be done (no tokenizer) decides nothing. One that finds weights no
    better than chance fails the checkpoint, unless the reference was asked and computes the same
    from them: then it is the weights that are random, and everything else is proved in order.
    """
    compared = [report for report in (exactness, nearness) if report is not None]
    if not integrity.passed or not all(report.passed for report in compared):
        return False
    if self_check is None or self_check.passed or not self_check.trials:
        return True
    return exactness is not None and self_check.suspected == UNTRAINED
