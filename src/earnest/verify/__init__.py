"""Proof: is a checkpoint computed exactly, does it read like a trained model, and how near is the
native runner to the reference?"""

from earnest.verify.exactness import ExactnessReport, compare
from earnest.verify.nearness import NearnessReport, nearness
from earnest.verify.passages import PASSAGES, Passage
from earnest.verify.selfcheck import SelfCheckReport, selfcheck
from earnest.verify.transformers_reference import load_packages
from earnest.verify.verdict import verdict

__all__ = [
    "PASSAGES",
    "ExactnessReport",
    "NearnessReport",
    "Passage",
    "SelfCheckReport",
    "compare",
    "load_packages",
    "nearness",
    "selfcheck",
    "verdict",
]
