"""What is known about every key of a configuration that is not a number of the model.

Two tables each for config.json and for GGUF; a key stands in one. *Neutral* keys change the
arithmetic in a way that Earnest does not have; they are listed with the values under which they do
nothing, and any other value is refused by name. *Harmless* keys never change the logits of a text,
for the reason given; they are passed over. A key in neither table that is not read is refused too:
it might matter, and logits that are silently a little wrong are worse than an error message.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from earnest.config.values import Values, brief


class Neutral(NamedTuple):
    """Values of a key that do nothing, and what other values would do."""

    values: tuple[Any, ...]
    meaning: str


HF_NEUTRAL: dict[str, Neutral] = {
    # activations and norms
    "hidden_act": Neutral(("silu",), "another activation function"),
    "use_rmsnorm": Neutral((True,), "LayerNorm instead of RMSNorm"),
    "use_qk_norm": Neutral((False,), "norms on queries and keys"),
    "qk_norm": Neutral((False,), "norms on queries and keys"),
    # positions
    "compression_ratio": Neutral((1.0,), "positions divided by a factor"),
    "rope_reorder": Neutral((False,), "rotary pairs taken from the two halves of a head"),
    "rope_is_neox_style": Neutral((False,), "rotary pairs taken from the two halves of a head"),
    "partial_rotary_factor": Neutral((1.0,), "rotary positions on a part of each head"),
    "rope_yarn_config": Neutral((), "rotary frequencies rescaled (YaRN)"),
    # attention
    "attention_bias": Neutral((False,), "biases in attention only"),
    "mlp_bias": Neutral((False,), "biases in feed-forward blocks only"),
    "use_sliding_window": Neutral((False,), "attention to a window of recent tokens"),
    "sliding_window": Neutral((), "attention to a window of recent tokens"),
    "attn_logit_softcapping": Neutral((), "attention scores squashed by tanh"),
    "final_logit_softcapping": Neutral((), "logits squashed by tanh"),
    "is_decoder": Neutral((True, False), "cross-attention"),
    "is_encoder_decoder": Neutral((False,), "an encoder"),
    "add_cross_attention": Neutral((False,), "cross-attention"),
    # routing
    "scoring_func": Neutral(("softmax",), "router scores other than softmax"),
    "moe_gate_act": Neutral(("softmax",), "router scores other than softmax"),
    # These three are the same top-k choice, with and without fused kernels.
    "moe_gate": Neutral(("topk", "top2", "top2_fused"), "another way to choose experts"),
    "moe_gate_scale": Neutral((False,), "scaled router scores"),
    "moe_norm_gate_logits": Neutral((True,), "expert weights that are not renormalised"),
    "norm_topk_prob": Neutral((True,), "expert weights that are not renormalised"),
    "moe_use_aux_free": Neutral((True,), "routing without e_score_correction_bias"),
    "moe_group_experts": Neutral((False,), "experts chosen within groups"),
    "n_group": Neutral((1,), "experts chosen within groups"),
    "topk_group": Neutral((1,), "experts chosen within groups"),
    "routed_scaling_factor": Neutral((1.0,), "routed experts scaled by a factor"),
    "moe_use_token_type_bias": Neutral((False,), "a router bias by token type"),
    "moe_num_attn_experts": Neutral((False, 0), "experts in attention"),
    # depth, embedding, storage
    "add_tail_layers": Neutral((False, 0), "extra layers at the end"),
    "mm_vocab_size": Neutral((0,), "a second embedding table"),
    "quantization_config": Neutral((), "weights quantised by a scheme of another program"),
    "quantization": Neutral((), "weights quantised by a scheme of another program"),
    "is_quantized": Neutral((False,), "weights quantised by a scheme of another program"),
    "cachekv_quant": Neutral((False,), "a quantised KV cache"),
    "pruned_heads": Neutral(({},), "heads removed from layers"),
}

_LOADING = "says how another program loads or names the model"
_KERNELS = "chooses kernels or a fused storage layout, not results"
_TRAINING = "acts in training only"
_OUTPUT = "chooses what else another program returns"
_PIXELS = "concerns pictures and video; a text has none"
_SAMPLING = "belongs to generation_config.json, not to the logits"

# fmt: off
_REASONS: dict[str, tuple[str, ...]] = {
    _LOADING: (
        "architectures", "auto_map", "transformers_version", "paddleformers_version",
        "_name_or_path", "name_or_path", "_commit_hash", "framework", "task",
        "_class_name", "dpo_config",
        "tensor_parallel_degree", "tensor_parallel_rank", "tensor_parallel_output",
        "sequence_parallel", "virtual_pp_degree", "pp_seg_method", "moe_group", "moe_group_origin",
        "moe_rank", "moe_world_size", "ep_communication_type", "infer_model_mp_num",
        "is_unified_ckpt", "disable_ffn_model_parallel", "id2label", "label2id", "num_labels",
        "problem_type", "tokenizer_class", "prefix", "task_specific_params",
    ),
    _KERNELS: (
        "_attn_implementation", "attn_implementation", "_attn_implementation_internal",
        "_attn_implementation_autoset", "_experts_implementation", "use_flash_attention",
        "use_flash_attn", "use_flash_attn_with_mask", "use_sparse_flash_attn",
        "use_var_len_flash_attn", "use_mem_eff_attn", "fuse_rms_norm", "fuse_ln", "use_fast_ln",
        "fuse_swiglu", "fuse_linear", "fuse_rope", "fuse_softmax_mask", "fuse_attn_ffn",
        "fuse_attention_qkv", "fuse_attention_ffn", "fuse_gate_detach_matmul",
        "use_fused_head_and_loss_fn", "use_sparse_head_and_loss_fn", "use_ep_comm_overlap",
        "moe_multimodal_dispatch_use_allgather", "moe_use_size_all2all", "moe_fuse_experts",
        "moe_layer_feed_fake_token", "fp8_mem_configs", "fp8_fused_ops_configs",
        "using_precision_check", "chunk_size_feed_forward", "offload_pp_data_chunk_size",
        "resampler_fuse_rms_norm", "use_cache", "micro_batch_size", "torchscript", "use_bfloat16",
        "use_pure_fp16",
    ),
    _TRAINING: (
        "attention_dropout", "attention_dropout_prob", "attention_probs_dropout_prob",
        "hidden_dropout_prob", "moe_dropout_prob", "moe_all_to_all_dropout", "ignored_index",
        "recompute", "recompute_granularity", "recompute_use_reentrant", "refined_recompute",
        "skip_recompute_ops", "no_recompute_layers", "use_recompute", "use_recompute_attn",
        "use_recompute_moe", "use_recompute_mtp", "use_recompute_lm_head",
        "use_recompute_loss_fn", "use_recompute_resampler", "moe_aux_loss_lambda",
        "moe_z_loss_lambda", "moe_orthogonal_loss_lambda", "moe_group_orthogonal_loss",
        "global_aux_loss", "router_aux_loss_coef", "mtp_loss_scaling_factor",
        "multi_token_pred_lambda", "enable_mtp_magic_send", "enable_delay_scale_loss",
        "num_acc_steps", "token_balance_loss", "token_balance_seqlen", "moe_gate_detach",
        "modality_detach", "gradient_checkpointing",
        # Capacity factors drop tokens in training; inference sends every token where it wants.
        "moe_capacity", "moe_reverse_token_drop",
        # Only read by a gate that `moe_gate` refuses.
        "sinkhorn_2gate", "sinkhorn_temp",
    ),
    _OUTPUT: (
        "output_router_logits", "output_attentions", "output_hidden_states", "return_dict",
        "use_return_dict",
    ),
    _PIXELS: (
        "vision_config", "image_token_id", "image_start_token_id", "image_end_token_id",
        "video_token_id", "video_start_token_id", "video_end_token_id", "vision_start_token_id",
        "im_patch_id", "pixel_hidden_size", "temporal_conv_size", "spatial_conv_size",
        "use_temporal_conv", "max_text_id", "moe_dense_experts_token_type_id", "freq_allocation",
    ),
    _SAMPLING: (
        "do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "length_penalty",
        "max_length", "min_length", "num_beams", "num_return_sequences", "max_new_tokens",
        "sep_token_id", "cls_token_id", "decoder_start_token_id",
    ),
    "a limit of the training data; max_position_embeddings is what counts": (
        "max_sequence_length", "seq_length",
    ),
    "a bias of the head beside use_bias, which is checked": ("weight_share_add_bias",),
    "only acts with use_sliding_window, which is checked": ("max_window_layers",),
}
# fmt: on

HF_HARMLESS: dict[str, str] = {key: why for why, keys in _REASONS.items() for key in keys}

# --- keys of a GGUF file, after the prefix of its architecture ---------------------------------

_SCALED = "rotary frequencies rescaled"
GGUF_NEUTRAL: dict[str, Neutral] = {
    "rope.scaling.factor": Neutral((0, 1), _SCALED),
    "rope.scale_linear": Neutral((0, 1), _SCALED),
    "rope.scaling.attn_factor": Neutral((0, 1), _SCALED),
    "attention.causal": Neutral((True,), "attention to later tokens"),
    "attention.sliding_window": Neutral((0,), "attention to a window of recent tokens"),
    "attention.clamp_kqv": Neutral((0,), "clamped queries, keys and values"),
    "attention.max_alibi_bias": Neutral((0,), "attention biased by distance (ALiBi)"),
    "attention.shared_kv_layers": Neutral((0,), "keys and values shared between layers"),
    "attn_logit_softcapping": Neutral((0,), "attention scores squashed by tanh"),
    "final_logit_softcapping": Neutral((0,), "logits squashed by tanh"),
    "logit_scale": Neutral((0, 1), "scaled logits"),
    "embedding_scale": Neutral((0, 1), "scaled embeddings"),
    "residual_scale": Neutral((0, 1), "a scaled residual stream"),
    "use_parallel_residual": Neutral((False,), "attention and feed-forward side by side"),
    "pooling_type": Neutral((0,), "pooled outputs, as of an embedding model"),
    "expert_gating_func": Neutral((0, 1), "router scores other than softmax"),
    "expert_weights_norm": Neutral((True,), "expert weights that are not renormalised"),
    "expert_weights_scale": Neutral((0, 1), "routed experts scaled by a factor"),
    "expert_group_count": Neutral((0, 1), "experts chosen within groups"),
    "expert_group_used_count": Neutral((0, 1), "experts chosen within groups"),
    "nextn_predict_layers": Neutral((0,), "multi-token prediction inside a GGUF file"),
}

GGUF_HARMLESS: dict[str, str] = {
    "tensor_data_layout": "names the origin of an early Llama file; rows lie as always",
    "rope.scaling.original_context_length": "only read by scaled rotary types, which are refused",
    "rope.scaling.finetuned": "only read by scaled rotary types, which are refused",
}


def refuse(
    values: Values, read: frozenset[str], neutral: dict[str, Neutral], harmless: dict[str, str]
) -> None:
    """Complain about every key that is not supported or not known.

    Args:
        values: all keys and values; null stands for a key that is absent.
        read: keys that the caller reads itself.
        neutral, harmless: the tables for this kind of metadata.
    """
    unknown = []
    for key, value in values.raw.items():
        if key in neutral:
            accepted, meaning = neutral[key]
            if value is not None and not any(_same(value, entry) for entry in accepted):
                values.complain(
                    f"{key} = {brief(value)} asks for {meaning}, which is not supported "
                    f"(only {' or '.join(repr(entry) for entry in (*accepted, None))})"
                )
        elif key not in read and key not in harmless:
            unknown.append(str(key)[:80])
    if unknown:
        values.complain(
            f"unknown keys that might change the arithmetic: {', '.join(sorted(unknown)[:20])}"
        )


def _same(value: object, accepted: object) -> bool:
    """Equality that keeps True and 1 apart, and lets 1 stand for 1.0."""
    return type(value) in (bool, int, float, str, dict) and (
        value == accepted and isinstance(value, bool) == isinstance(accepted, bool)
    )
