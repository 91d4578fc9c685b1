"""The same weights through other files: Paddle's layout, packed experts, and GGUF.

The files are written here, by hand, from a transformers model's own tensors, so that a mistake in
the name table cannot cancel itself out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from earnest.checkpoint import open_checkpoint

torch = pytest.importorskip("torch", reason="the reference implementation needs torch")
transformers = pytest.importorskip("transformers", reason="there is nothing to compare with")
gguf = pytest.importorskip("gguf", reason="GGUF files are written by the gguf package")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="writes the Paddle files")

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "use_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
}
MOE = {
    "moe_num_experts": 8,
    "moe_k": 3,
    "moe_intermediate_size": 32,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 2,
    "moe_layer_interval": 1,
}
THETA = 500_000.0
TOKENS = [5, 90, 1, 33, 33, 7, 64, 2, 11, 80, 41, 0, 19, 55, 95, 23]


@pytest.fixture(scope="module", params=["dense", "moe", "moe-untied"])
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    """A transformers model whose weights are bfloat16 numbers, held in float32."""
    kwargs = COMMON | {
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "tie_word_embeddings": request.param != "moe-untied",
        "head_dim": 32,
    }
    kind = "Ernie4_5"
    if request.param != "dense":
        kind, kwargs = "Ernie4_5_Moe", kwargs | MOE
    config = getattr(transformers, f"{kind}Config")(**kwargs)
    made = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(len(request.param))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale, offset = (0.2, 1) if "norm" in name else (0.2, 0)
            parameter.copy_((offset + scale * noise).bfloat16().float())
    return made


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> np.ndarray:
    return model(torch.tensor([TOKENS])).logits[0].numpy()


def is_moe(model: torch.nn.Module) -> bool:
    return model.config.model_type == "ernie4_5_moe"


def old_config(model: torch.nn.Module) -> dict[str, object]:
    """config.json as the published files spell it."""
    moe = is_moe(model)
    return (
        COMMON
        | (MOE if moe else {})
        | {
            "architectures": ["Ernie4_5_MoeForCausalLM" if moe else "Ernie4_5_ForCausalLM"],
            "model_type": model.config.model_type,
            "head_dim": 32,
            "rope_theta": THETA,
            "rope_scaling": None,
            "tie_word_embeddings": model.config.tie_word_embeddings,
            "torch_dtype": "bfloat16",
        }
    )


def own_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def save(folder: Path, config: dict[str, object], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors_torch.save_file(contiguous, folder / "model.safetensors")
    return folder


def paddle_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The `-Paddle` layout: `[in, out]` linears, fused q|k|v and gate|up."""
    own = own_tensors(model)

    def fused(prefix: str, target: str) -> Iterator[tuple[str, torch.Tensor]]:
        both = torch.cat([own[f"{prefix}.gate_proj.weight"], own[f"{prefix}.up_proj.weight"]])
        yield f"{target}.up_gate_proj.weight", both.T
        yield f"{target}.down_proj.weight", own[f"{prefix}.down_proj.weight"].T

    yield "ernie.embed_tokens.weight", own["model.embed_tokens.weight"]
    yield "ernie.norm.weight", own["model.norm.weight"]
    if "lm_head.weight" in own:
        yield "lm_head.weight", own["lm_head.weight"].T
    for i in range(model.config.num_hidden_layers):
        hf, paddle = f"model.layers.{i}", f"ernie.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{paddle}.{norm}.weight", own[f"{hf}.{norm}.weight"]
        qkv = torch.cat([own[f"{hf}.self_attn.{part}_proj.weight"] for part in "qkv"])
        yield f"{paddle}.self_attn.qkv_proj.weight", qkv.T
        yield f"{paddle}.self_attn.o_proj.weight", own[f"{hf}.self_attn.o_proj.weight"].T
        if f"{hf}.mlp.gate.weight" not in own:
            yield from fused(f"{hf}.mlp", f"{paddle}.mlp")
            continue
        yield f"{paddle}.mlp.gate.weight", own[f"{hf}.mlp.gate.weight"].T
        yield (
            f"{paddle}.mlp.moe_statics.e_score_correction_bias",
            own[f"{hf}.mlp.gate.moe_statics.e_score_correction_bias"],
        )
        yield from fused(f"{hf}.mlp.shared_experts", f"{paddle}.mlp.shared_experts")
        for e, gate_up in enumerate(own[f"{hf}.mlp.experts.gate_up_proj"]):
            expert = f"{paddle}.mlp.experts.{e}"
            yield f"{expert}.up_gate_proj.weight", gate_up.T
            yield f"{expert}.down_proj.weight", own[f"{hf}.mlp.experts.down_proj"][e].T


def gguf_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """llama.cpp's names; experts stacked."""
    own = own_tensors(model)
    yield "token_embd.weight", own["model.embed_tokens.weight"]
    yield "output_norm.weight", own["model.norm.weight"]
    if "lm_head.weight" in own:
        yield "output.weight", own["lm_head.weight"]
    for i in range(model.config.num_hidden_layers):
        hf, blk = f"model.layers.{i}", f"blk.{i}"
        yield f"{blk}.attn_norm.weight", own[f"{hf}.input_layernorm.weight"]
        yield f"{blk}.ffn_norm.weight", own[f"{hf}.post_attention_layernorm.weight"]
        for part, name in {"q": "q", "k": "k", "v": "v", "o": "output"}.items():
            yield f"{blk}.attn_{name}.weight", own[f"{hf}.self_attn.{part}_proj.weight"]
        if f"{hf}.mlp.gate.weight" not in own:
            for part in ("gate", "up", "down"):
                yield f"{blk}.ffn_{part}.weight", own[f"{hf}.mlp.{part}_proj.weight"]
            continue
        yield f"{blk}.ffn_gate_inp.weight", own[f"{hf}.mlp.gate.weight"]
        bias = own[f"{hf}.mlp.gate.moe_statics.e_score_correction_bias"]
        yield f"{blk}.exp_probs_b.bias", bias[0]
        gate, up = own[f"{hf}.mlp.experts.gate_up_proj"].chunk(2, dim=1)
        yield f"{blk}.ffn_gate_exps.weight", gate
        yield f"{blk}.ffn_up_exps.weight", up
        yield f"{blk}.ffn_down_exps.weight", own[f"{hf}.mlp.experts.down_proj"]
        for part in ("gate", "up", "down"):
            shared = own[f"{hf}.mlp.shared_experts.{part}_proj.weight"]
            yield f"{blk}.ffn_{part}_shexp.weight", shared


def write_gguf(path: Path, model: torch.nn.Module, kind: gguf.GGMLQuantizationType) -> Path:
    """Matrices as `kind`; norms, router and correction bias as float32, as llama.cpp does."""
    config = model.config
    writer = gguf.GGUFWriter(path, "ernie4_5-moe" if is_moe(model) else "ernie4_5")
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(THETA)
    if is_moe(model):
        writer.add_expert_count(8)
        writer.add_expert_used_count(3)
        writer.add_interleave_moe_layer_step(1)
        writer.add_leading_dense_block_count(1)
        writer.add_expert_feed_forward_length(32)
        writer.add_expert_shared_count(2)
        writer.add_expert_shared_feed_forward_length(64)
    for name, tensor in gguf_tensors(model):
        array = tensor.numpy().astype(np.float32)
        plain = array.ndim == 1 or "ffn_gate_inp" in name
        as_kind = gguf.GGMLQuantizationType.F32 if plain else kind
        writer.add_tensor(name, gguf.quants.quantize(array, as_kind), raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def run(path: Path, dialect: str, batch_of, runner_for) -> np.ndarray:
    checkpoint = open_checkpoint(path)
    assert checkpoint.dialect == dialect
    runner = runner_for(checkpoint, 16)
    first = runner.step(batch_of((TOKENS, 0, [0, 1])))
    streamed = runner_for(checkpoint, 16, memory_budget=0)
    second = streamed.step(batch_of((TOKENS, 0, [0, 1])))
    assert np.abs(first - second).max() < 1e-5 * np.abs(first).max()
    return first


def assert_close(logits: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    scale = np.abs(expected).max()
    assert scale > 0.5
    assert np.abs(logits - expected).max() < tolerance * scale


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_paddle(model, tmp_path: Path, batch_of, runner_for, dtype: str) -> None:
    router = ("mlp.gate.weight", "e_score")
    tensors = {
        name: tensor if any(part in name for part in router) else tensor.to(getattr(torch, dtype))
        for name, tensor in paddle_tensors(model)
    }
    folder = save(tmp_path / "paddle", old_config(model), tensors)
    assert_close(run(folder, "paddle", batch_of, runner_for), logits_of(model))


def test_packed_experts(model, tmp_path: Path, batch_of, runner_for) -> None:
    folder = save(tmp_path / "packed", old_config(model), own_tensors(model))
    dialect = "hf_packed" if is_moe(model) else "hf"
    assert_close(run(folder, dialect, batch_of, runner_for), logits_of(model))


@pytest.mark.parametrize("kind", ["F32", "BF16"])
def test_gguf(model, tmp_path: Path, batch_of, runner_for, kind: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", model, gguf.GGMLQuantizationType[kind])
    assert_close(run(path, "gguf", batch_of, runner_for), logits_of(model))


def test_gguf_in_eight_bits(model, tmp_path: Path, batch_of, runner_for) -> None:
    """Close to the model it came from, and exactly the model whose weights it holds."""
    q8 = gguf.GGMLQuantizationType.Q8_0
    path = write_gguf(tmp_path / "model.gguf", model, q8)
    logits = run(path, "gguf", batch_of, runner_for)
    original = model.state_dict()
    rounded = {}
    for name, tensor in original.items():
        stays = tensor.squeeze().ndim == 1 or "mlp.gate.weight" in name
        blocks = None if stays else gguf.quants.quantize(tensor.numpy(), q8)
        rounded[name] = (
            tensor if stays else torch.from_numpy(gguf.quants.dequantize(blocks, q8))
        ).clone()
    kept = {name: tensor.clone() for name, tensor in original.items()}
    try:
        model.load_state_dict(rounded)
        assert_close(logits, logits_of(model))
    finally:
        model.load_state_dict(kept)
    if not is_moe(model):  # an expert may change where scores were close
        assert_close(logits, logits_of(model), 0.05)
