"""What a model is, in numbers: configuration, presets, and accounting."""

from earnest.config.accounting import Accounting
from earnest.config.ernie import ErnieConfig
from earnest.config.gguf import from_gguf, to_gguf
from earnest.config.huggingface import from_hf, to_hf
from earnest.config.presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "Accounting",
    "ErnieConfig",
    "from_gguf",
    "from_hf",
    "preset",
    "to_gguf",
    "to_hf",
]
