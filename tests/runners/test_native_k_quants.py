"""Types of 256-weight blocks (q4_k_m and its like) on real models, by perplexity and KL divergence.

The rows of small models are no whole blocks of them. The story model gets such rows by being
widened, which changes nothing of what it computes; SmolLM2 has them in a fifth of its weights.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_native_accuracy import compare, smollm2  # noqa: F401

import earnest
from earnest.checkpoint import Checkpoint, open_checkpoint
from earnest.checkpoint.lazy import LazyTensor
from earnest.codecs.registry import CODECS
from earnest.quantize import RECIPES
from earnest.runners.native import isa
from earnest.runners.reference import ReferenceRunner
from earnest.verify.passages import ENCYCLOPAEDIA, STORY

pytestmark = pytest.mark.skipif(not isa.installed(), reason="the compiled kernels are not built")

STORIES = Path(earnest.__file__).parent / "hub" / "stories"
WIDTH = 256
MIXES = ["q4_k_m", "q5_k_m", "q6_k"]


def spread(count: int, width: int = WIDTH) -> np.ndarray:
    """Where `count` channels lie among `width`: evenly, so that every part of a block has some."""
    return np.arange(count) * width // count


def widened(stories: Checkpoint) -> Checkpoint:
    """The same function with 256 channels of the residual stream, of the heads together and of the
    feed-forward part; those in between are zero throughout."""
    config = stories.config
    times = WIDTH // config.hidden_size  # a power of two: scaling the norms by its root is exact
    hidden, inner = spread(config.hidden_size), spread(config.intermediate_size)

    def heads(count: int) -> np.ndarray:
        """Groups of heads that share a key stay together; each is followed by empty groups."""
        group = count // config.num_key_value_heads * config.head_dim
        number, within = np.divmod(np.arange(count * config.head_dim), group)
        return number * times * group + within

    queries, keys = heads(config.num_attention_heads), heads(config.num_key_value_heads)
    rows = {
        **{"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": hidden},
        **{"gate_proj": inner, "up_proj": inner, "down_proj": hidden},
    }
    columns = {"o_proj": queries, "down_proj": inner}
    heights = {"k_proj": times * config.kv_size, "v_proj": times * config.kv_size}

    def wide(tensor: LazyTensor) -> LazyTensor:
        values, kind = tensor.read(), tensor.name.split(".")[-2]
        if values.ndim == 1:
            made = np.zeros(WIDTH, np.float32)
            made[hidden] = values / times**0.5
        else:
            of_rows = rows.get(kind, np.arange(len(values)))  # the embedding's are tokens
            height = heights.get(kind, WIDTH if kind in rows else len(values))
            made = np.zeros((height, WIDTH), np.float32)
            made[np.ix_(of_rows, columns.get(kind, hidden))] = values
        return LazyTensor(tensor.name, CODECS["f32"], made.shape, lambda: made, "widened")

    return replace(
        stories,
        config=replace(
            config,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_attention_heads=times * config.num_attention_heads,
            num_key_value_heads=times * config.num_key_value_heads,
            rms_norm_eps=config.rms_norm_eps / times,
        ),
        tensors={name: wide(tensor) for name, tensor in stories.tensors.items()},
    )


def mixed(checkpoint: Checkpoint, recipe: str) -> tuple[Checkpoint, set[str]]:
    """The checkpoint with every matrix whose rows are whole blocks in the type that `quantize`
    gives it, the others as they are; and these types."""
    config, used = checkpoint.config, set()

    def encoded(tensor: LazyTensor) -> LazyTensor:
        wanted = CODECS[
            RECIPES[recipe].wanted(
                tensor.name, config.num_hidden_layers, tied=config.tie_word_embeddings
            )
        ]
        if len(tensor.shape) == 1 or tensor.shape[1] % wanted.block_weights:
            return tensor
        assert wanted.block_weights == 256 and wanted.encode is not None
        used.add(wanted.name)
        raw = wanted.encode(tensor.read())
        return replace(tensor, codec=wanted, view=lambda: raw)

    tensors = {name: encoded(tensor) for name, tensor in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors), used


@pytest.fixture(scope="module")
def stories() -> Checkpoint:
    return open_checkpoint(STORIES)


def test_the_widened_model_is_the_same_model(stories: Checkpoint, batch_of) -> None:
    batch = batch_of((stories.tokenizer.encode(STORY.text)[:64], 0, range(3)))
    narrow, wide = (
        ReferenceRunner(model, num_blocks=3).step(batch) for model in (stories, widened(stories))
    )
    np.testing.assert_allclose(wide, narrow, atol=1e-4)


@pytest.mark.parametrize("recipe", MIXES)
def test_stories(recipe: str, stories: Checkpoint, batch_of) -> None:
    ids = stories.tokenizer.encode(STORY.text, add_special_tokens=True)[:384]
    checkpoint, used = mixed(widened(stories), recipe)
    assert all(t.codec.name in used for t in checkpoint.tensors.values() if len(t.shape) == 2)
    kl, perplexity = compare(checkpoint, ids, batch_of, f"stories {recipe}, {sorted(used)}")
    assert kl < 1e-5
    assert perplexity < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("recipe", MIXES)
def test_smollm2(recipe: str, smollm2: Checkpoint, batch_of) -> None:  # noqa: F811
    """The matrices with rows of 1,536 weights in the types of the mix, the rest as stored."""
    ids = smollm2.tokenizer.encode(ENCYCLOPAEDIA.text)[:128]
    checkpoint, used = mixed(smollm2, recipe)
    assert used == {recipe.removesuffix("_m"), "q6_k"}
    kl, perplexity = compare(checkpoint, ids, batch_of, f"SmolLM2 {recipe}")
    assert kl < 1e-5
    assert perplexity < 1e-3
