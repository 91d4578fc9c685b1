"""Requests to batches to tokens: the engine, and the object that `earnest.load` returns."""

from earnest.engine.defaults import sampling_defaults
from earnest.engine.engine import Engine
from earnest.engine.language_model import LanguageModel, load
from earnest.engine.request import (
    Completion,
    FinishReason,
    Request,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)

__all__ = [
    "Completion",
    "Engine",
    "FinishReason",
    "LanguageModel",
    "Request",
    "SamplingParams",
    "TokenEvent",
    "TokenLogprobs",
    "load",
    "sampling_defaults",
]
