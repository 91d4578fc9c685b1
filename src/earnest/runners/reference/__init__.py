"""The reference runner: the model in numpy, made to be read and to be the oracle of faster ones."""

from earnest.runners.reference.model import Arithmetic, Model, expert_weights, route, softmax
from earnest.runners.reference.runner import ReferenceRunner

__all__ = ["Arithmetic", "Model", "ReferenceRunner", "expert_weights", "route", "softmax"]
