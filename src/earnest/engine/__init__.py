"""Requests to batches to tokens: the engine, and the object that `earnest.load` returns."""

from earnest.engine.defaults import sampling_defaults
from earnest.engine.engine import Engine
from earnest.engine.language_model import LanguageModel, load
from earnest.engine.request import (
    Completion,
    FinishReason,
    Pooling,
    PoolingKind,
    Request,
    SamplingParams,
    Score,
    Scoring,
    TokenEvent,
    TokenLogprobs,
)

__all__ = [
    "Completion",
    "Engine",
    "FinishReason",
    "LanguageModel",
    "Pooling",
    "PoolingKind",
    "Request",
    "SamplingParams",
    "Score",
    "Scoring",
    "TokenEvent",
    "TokenLogprobs",
    "load",
    "sampling_defaults",
]
