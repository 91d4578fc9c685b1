"""Where models come from: built-in ones, folders on disk, the Hugging Face hub."""

from earnest.hub.download import pull
from earnest.hub.sources import BUILTIN, locate

__all__ = ["BUILTIN", "locate", "pull"]
