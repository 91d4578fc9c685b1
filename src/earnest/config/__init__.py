"""What a model is, in numbers: configuration, presets, and the accounting that follows from them."""

from earnest.config.ernie import ErnieConfig

__all__ = ["ErnieConfig"]
