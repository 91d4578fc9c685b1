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
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from earnest import codecs
from earnest.codecs.base import Codec
from earnest.config import ErnieConfig
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


class Substitutes:
    """Chooses the codecs of a recipe for the matrices of a model, and remembers where rows cannot
    have the wanted one."""

    def __init__(self, mix: Recipe, config: ErnieConfig) -> None:
        self._mix, self._config = mix, config
        self._found: Counter[tuple[str, str, int]] = Counter()

    def codec(self, name: str, columns: int, count: int = 1) -> Codec:
        """The codec of a matrix, by its canonical name and the length of its rows.

        Args:
            name: of `count` matrices, which get the same, the first.
            columns: weights in a row.
            count: how many matrices this is about.
        """
        config = self._config
        wanted = self._mix.wanted(name, config.num_hidden_layers, tied=config.tie_word_embeddings)
        codec = fitting(wanted, columns)
        if codec.name != wanted:
            self._found[wanted, codec.name, columns] += count
        return codec

    def notes(self) -> Iterator[str]:
        """What a careful reader should know of the matrices asked about so far."""
        for (wanted, codec, columns), count in self._found.items():
            yield (
                f"{count:,} tensors have rows of {columns:,} weights, which {wanted} blocks do not "
                f"divide; they were stored as {codec}"
            )
