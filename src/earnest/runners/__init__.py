"""Runners: machines that turn batches of tokens into logits. `base.py` is the whole contract."""

from earnest.runners.base import Batch, Routing, Runner

__all__ = ["Batch", "Routing", "Runner"]
