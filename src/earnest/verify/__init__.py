"""Proof: is a checkpoint computed exactly, and does it read like a trained model?"""

from earnest.verify.exactness import ExactnessReport, compare
from earnest.verify.passages import PASSAGES, Passage
from earnest.verify.selfcheck import SelfCheckReport, selfcheck
from earnest.verify.verdict import verdict

__all__ = [
    "PASSAGES",
    "ExactnessReport",
    "Passage",
    "SelfCheckReport",
    "compare",
    "selfcheck",
    "verdict",
]
