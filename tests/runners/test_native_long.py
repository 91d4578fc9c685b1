"""A context of 131,072 positions, held against the reference at places all over it.

The model has one layer, whose keys and values depend on their own token only. So the reference can
have them all without attending to anything, and then run single tokens at any position.
"""

from __future__ import annotations

import numpy as np
import pytest
from test_native_attention import laid_out

from earnest.config import ErnieConfig
from earnest.runners.native import isa
from earnest.runners.reference import ReferenceRunner, model

pytestmark = pytest.mark.skipif(not isa.installed(), reason="the compiled kernels are not built")

if isa.installed():
    from earnest.runners.native.runner import DEFAULT_KV, NativeRunner

POSITIONS, CHUNK, BLOCK = 131_072, 8192, 32
ONE_LAYER = ErnieConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=POSITIONS,
)
# Of the largest logit.
BUDGETS = {"f32": 2e-5, "int16": 1e-3}


SAMPLED = np.unique(
    [
        *(0, 1, BLOCK, CHUNK - 1, CHUNK, POSITIONS - 2, POSITIONS - 1),
        *np.random.default_rng(8).integers(POSITIONS, size=40),
    ]
)
TABLE = range(POSITIONS // BLOCK)


@pytest.fixture
def prefilled(checkpoint_of, weights_of, batch_of, monkeypatch):  # type: ignore[no-untyped-def]
    """A checkpoint, the reference with all keys and values, the tokens, and the reference's logits
    after those of `SAMPLED`."""
    arrays = weights_of(ONE_LAYER)
    # Scores with a spread of about 3: some of all those positions stand out, as in real models.
    for name in ("q_proj", "k_proj"):
        arrays[f"model.layers.0.self_attn.{name}.weight"] *= 1.5
    checkpoint = checkpoint_of(ONE_LAYER, arrays)
    ids = np.random.default_rng(7).integers(ONE_LAYER.vocab_size, size=POSITIONS)
    reference = ReferenceRunner(checkpoint, num_blocks=len(TABLE))
    with monkeypatch.context() as patch:
        patch.setattr(model, "attend", lambda queries, *_: np.zeros_like(queries))
        for at in range(0, POSITIONS, CHUNK):
            reference.step(batch_of((ids[at : at + CHUNK], at, TABLE), rows=[]))
    want = [reference.step(batch_of(([int(ids[at])], int(at), TABLE))) for at in SAMPLED]
    return checkpoint, reference, ids, np.concatenate(want)


def check(found: np.ndarray, want: np.ndarray, kv: str) -> None:
    error = np.abs(found - want).max(axis=1) / np.abs(want).max()
    print(f"keys and values in {kv}: worst {error.max():.1e} at {SAMPLED[error.argmax()]:,}")
    assert error.max() < BUDGETS[kv]


@pytest.mark.parametrize("kv", dict.fromkeys(("f32", DEFAULT_KV)) if isa.installed() else [])
def test_the_whole_context(kv: str, prefilled, batch_of) -> None:
    """From keys and values of the reference: decode at every sampled place, and the last chunk."""
    checkpoint, reference, ids, want = prefilled
    runner = NativeRunner(checkpoint, num_blocks=len(TABLE), kv=kv)
    runner.cache[:] = laid_out(reference.cache.keys, reference.cache.values, BLOCK, kv)
    alone = [runner.step(batch_of(([int(ids[at])], int(at), TABLE))) for at in SAMPLED]
    found = np.concatenate(alone)
    check(found, want, kv)
    # Beside each other, and as part of a chunk: the same bits. (A chunk stores its own keys, whose
    # last bits are not the reference's: so it goes first.)
    last = POSITIONS - 200
    chunk = runner.step(batch_of((ids[last:], last, TABLE), rows=[198, 199]))
    few = SAMPLED[-9:]
    singly = [runner.step(batch_of(([int(ids[at])], int(at), TABLE))) for at in few]
    np.testing.assert_array_equal(np.concatenate(singly[-2:]), chunk)
    together = runner.step(batch_of(*[([int(ids[at])], int(at), TABLE) for at in few]))
    np.testing.assert_array_equal(together, np.concatenate(singly))


def test_all_of_it_prefilled(prefilled, batch_of) -> None:
    """From nothing but the tokens, by the native runner alone, in chunks."""
    checkpoint, _, ids, want = prefilled
    runner = NativeRunner(checkpoint, num_blocks=len(TABLE))
    found = []
    for at in range(0, POSITIONS, CHUNK):
        rows = [place - at for place in SAMPLED if at <= place < at + CHUNK]
        found.append(runner.step(batch_of((ids[at : at + CHUNK], at, TABLE), rows=rows)))
    check(np.concatenate(found), want, DEFAULT_KV)
