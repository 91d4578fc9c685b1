"""GGUF files written here, opened and run by llama.cpp, where its Python package is installed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conversions import made

from earnest.checkpoint import open_checkpoint
from earnest.checkpoint.export import export
from earnest.config import PRESETS, ErnieConfig
from earnest.engine.language_model import load
from earnest.quantize import quantize

llama = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


@contextmanager
def opened(path: Path) -> Iterator[object]:
    llama.llama_backend_init()
    params = llama.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(str(path).encode(), params)
    assert model, "llama.cpp does not load the file"
    try:
        yield model
    finally:
        llama.llama_model_free(model)


def logits_of(path: Path, ids: list[int]) -> np.ndarray:
    """What llama.cpp expects after each of `ids`, with float32 keys and values: `[T, V]`."""
    with opened(path) as model:
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 256, 256, 256
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = llama.GGML_TYPE_F32
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = llama.llama_init_from_model(model, params)
        batch = llama.llama_batch_init(256, 0, 1)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, True
        batch.n_tokens = len(ids)
        assert llama.llama_decode(context, batch) == 0
        size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        found = np.ctypeslib.as_array(llama.llama_get_logits(context), (len(ids), size)).copy()
        llama.llama_batch_free(batch)
        llama.llama_free(context)
    return found


def small(preset: str) -> ErnieConfig:
    return replace(
        PRESETS[preset],
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=256,
        num_nextn_predict_layers=0,
    )


DENSE = small("0.3b")
MOE = replace(small("21b-a3b"), moe_num_experts=8, moe_k=3, moe_intermediate_size=256)
IDS = np.random.default_rng(3).integers(512, size=40).tolist()

# llama.cpp rounds activations to 8 bits where weights are quantised (and to the weights' type where
# they are bf16 or f16); random weights have no outliers, so its logits stay within a few percent of
# ours. With the wrong experts, or a wrong rotation, they are another model's: about 1.
BUDGET = {"f32": 1e-4, "f16": 2e-2, "bf16": 3e-2, "q8_0": 3e-2, "q4_k_m": 6e-2, "q4_0": 6e-2}


@pytest.mark.parametrize("codec", list(BUDGET))
@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "experts"])
def test_the_same_logits(config: ErnieConfig, codec: str, tmp_path: Path) -> None:
    source = made(tmp_path / "source", config)
    path = tmp_path / "model.gguf"
    if codec in ("f32", "f16", "bf16"):
        export(source, path, dtype=codec)
    else:
        quantize(source, path, codec)
    ours = load(path, runner="reference", notice=lambda _: None).logits(IDS)
    theirs = logits_of(path, IDS)
    scale = np.abs(ours).max()
    apart = np.abs(ours - theirs).max(axis=1) / scale
    # A router that all but ties may choose another expert after their rounding: a few tokens.
    assert np.median(apart) < BUDGET[codec], apart
    assert np.mean(apart < 3 * BUDGET[codec]) > 0.8, apart


def test_smollm2_says_the_same(shared: Path, tmp_path: Path) -> None:
    model = load("smollm2", runner="reference", notice=lambda _: None)
    path = tmp_path / "again.gguf"
    export(open_checkpoint(model.checkpoint.path), path)
    ids = model.tokenizer.encode("The capital of France is the city of")
    with opened(path) as their:
        vocabulary = llama.llama_model_get_vocab(their)
        text = b"The capital of France is the city of"
        buffer = (ctypes.c_int32 * 64)()
        count = llama.llama_tokenize(vocabulary, text, len(text), buffer, 64, False, True)
        assert buffer[:count] == ids
        assert llama.llama_vocab_is_eog(vocabulary, model.tokenizer.eos_ids[0])
    ours, theirs = model.logits(ids), logits_of(path, ids)
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).mean() >= 0.75
    assert ours[-1].argmax() == theirs[-1].argmax()
