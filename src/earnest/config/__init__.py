"""What a model is, in numbers: configuration, presets, and accounting."""

from earnest.config.ernie import ErnieConfig

__all__ = ["ErnieConfig"]
