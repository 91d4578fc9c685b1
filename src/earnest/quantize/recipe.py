"""Recipes: the usual mix of block types per kind of tensor, under the names GGUF files carry.

| recipe | matrices | head, or embedding that is the head | v_proj, down_proj of some layers |
|---|---|---|---|
| q8_0 | q8_0 | q8_0 | q8_0 |
| q6_k | q6_k | q6_k | q6_k |
| q5_k_m | q5_k | q6_k | q6_k |
| q4_k_m | q4_k | q6_k | q6_k |
| q5_k, q4_k | q5_k, q4_k | q6_k | as the others |
| q5_1, q5_0, q4_1, q4_0 | that type | q6_k | as the others |

"Some layers" are about half: the first eighth, the last eighth, and every third one between. Errors
in values and in what goes back into the residual stream weigh most there, as llama.cpp's authors
found. Router, norms, biases and correction bias stay float32 (see `checkpoint.export`).

Rows that are no multiple of 256 cannot hold "k" blocks, and get the next better type with blocks of
32 (`_WITHOUT_K`); rows that are no multiple of 32 stay bf16.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from earnest import codecs
from earnest.codecs.base import Codec
from earnest.errors import UserError

_WITHOUT_K = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_UNBLOCKED = "bf16"

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_SENSITIVE = (".v_proj.weight", ".down_proj.weight")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Recipe:
    """The mix of types that one name stands for.

    Attributes:
        name: for example "q4_k_m".
        base: codec of most matrices.
        head: codec of the output head, or of the embedding where that is the head.
        sensitive: codec of `v_proj` and `down_proj` in the layers of `is_sensitive_layer`.
    """

    name: str
    base: str
    head: str
    sensitive: str

    def wanted(self, name: str, layers: int, *, tied: bool) -> str:
        """The codec for a matrix, whatever the length of its rows.

        Args:
            name: canonical name of the tensor.
            layers: how many layers the model has.
            tied: whether the embedding is the head, too.
        """
        if name == (_EMBEDDING if tied else _HEAD):
            return self.head
        layer = _LAYER.match(name)
        if layer and name.endswith(_SENSITIVE) and is_sensitive_layer(int(layer[1]), layers):
            return self.sensitive
        return self.base


RECIPES = {
    r.name: r
    for r in (
        Recipe("q8_0", "q8_0", "q8_0", "q8_0"),
        Recipe("q6_k", "q6_k", "q6_k", "q6_k"),
        Recipe("q5_k_m", "q5_k", "q6_k", "q6_k"),
        Recipe("q5_k", "q5_k", "q6_k", "q5_k"),
        Recipe("q5_1", "q5_1", "q6_k", "q5_1"),
        Recipe("q5_0", "q5_0", "q6_k", "q5_0"),
        Recipe("q4_k_m", "q4_k", "q6_k", "q6_k"),
        Recipe("q4_k", "q4_k", "q6_k", "q4_k"),
        Recipe("q4_1", "q4_1", "q6_k", "q4_1"),
        Recipe("q4_0", "q4_0", "q6_k", "q4_0"),
    )
}


def recipe(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        UserError: there is none.
    """
    if name not in RECIPES:
        raise UserError(f"unknown codec {name!r:.40}", expected=", ".join(RECIPES))
    return RECIPES[name]


def is_sensitive_layer(layer: int, layers: int) -> bool:
    """Whether errors of a layer weigh more than those of its neighbours: the first eighth, the last
    eighth, every third one between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def fitting(wanted: str, columns: int) -> Codec:
    """The codec that rows of `columns` weights can have in place of `wanted`."""
    codec = codecs.codec(wanted)
    if columns % codec.block_weights and wanted in _WITHOUT_K:
        codec = codecs.codec(_WITHOUT_K[wanted])
    return codecs.codec(_UNBLOCKED) if columns % codec.block_weights else codec
