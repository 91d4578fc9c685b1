"""Where models come from: built-in ones, folders on disk, the Hugging Face hub."""

from earnest.hub.locate import BUILTIN, locate
from earnest.hub.pull import pull

__all__ = ["BUILTIN", "locate", "pull"]
