"""What stored bits mean: every way of storing weights that Earnest can read."""

from earnest.codecs.base import Codec, Float32, Raw
from earnest.codecs.registry import (
    CODECS,
    codec,
    from_ggml,
    from_safetensors,
    to_ggml,
    to_safetensors,
)

__all__ = [
    "CODECS",
    "Codec",
    "Float32",
    "Raw",
    "codec",
    "from_ggml",
    "from_safetensors",
    "to_ggml",
    "to_safetensors",
]
