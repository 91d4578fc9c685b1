"""Checkpoints: opening, writing, converting and comparing them, whatever their layout."""

from earnest.checkpoint.checkpoint import Checkpoint, LeftOut
from earnest.checkpoint.lazy import LazyTensor
from earnest.checkpoint.open import open_checkpoint

__all__ = ["Checkpoint", "LazyTensor", "LeftOut", "open_checkpoint"]
