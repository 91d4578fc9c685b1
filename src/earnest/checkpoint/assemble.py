"""From stored tensors to canonical ones: which is which, and an account of everything else.

Every canonical tensor is looked for under the spellings of one family of dialects, in order. What
cannot be found, has a wrong shape or cannot be weights is collected, as is everything the files
hold beyond the text model, so that one error (or one report) tells all of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice

import numpy as np

from earnest import codecs
from earnest.checkpoint.checkpoint import LeftOut
from earnest.checkpoint.lazy import ABSENT, LazyTensor
from earnest.checkpoint.names import Dialect, Region, TensorSpec, regions, tensor_specs
from earnest.codecs import Codec, Raw
from earnest.config import ErnieConfig
from earnest.errors import MissingCorrectionBiasError, TensorsError

# Dialects that may be mixed in one checkpoint, in the order in which spellings are tried.
FAMILIES: Mapping[str, tuple[Dialect, ...]] = {
    "hf": ("hf", "hf_packed"),
    "paddle": ("paddle",),
    "vl": ("vl", "vl_packed"),
    "gguf": ("gguf",),
}

_NOT_WEIGHTS = {"i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64", "bool"}
_BIAS_PART = "correction_bias"

# What the files of some checkpoints hold beyond the text model, and why it is not taken.
_LEFT_OUT: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("rotary frequencies, which are computed", re.compile(r"(.*\.)?rotary_emb\.inv_freq")),
)
_LEFT_OUT_VISION: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("vision experts", re.compile(r".*\.mlp\.vision_moe\.experts\..*")),
    ("router of the vision experts", re.compile(r".*\.mlp\.(gate\.weight_1|vision_moe\.gate\..*)")),
    ("vision transformer", re.compile(r"(model\.|ernie\.)?vision_(model|tower)\..*")),
    ("vision resampler", re.compile(r"(model\.|ernie\.)?resampler_model\..*")),
)
_TEXT_OR_VISION_EXPERT = re.compile(r".*\.mlp\.experts\.(\d{1,9})\..*")
_VISION_MARKS = re.compile(
    r".*\.mlp\.(gate\.weight_1|vision_moe\..*)|(model\.|ernie\.)?vision_(model|tower)\..*"
    r"|(model\.|ernie\.)?resampler_model\..*|model\.language_model\..*"
)
_MTP = re.compile(
    r"(?:model|ernie|model\.language_model)\.mtp_(?:block|emb_norm|hidden_norm|linear_proj)"
    r"\.(\d{1,9})\..*"
)


@dataclass(frozen=True)
class Assembly:
    """The text model found among stored tensors.

    Attributes:
        config: the configuration with what only the tensors can tell: the MTP depth.
        dialect: the dialect of the tensors; where two are mixed, the later one of its family.
        tensors: canonical name to tensor, in the order of the name table.
        left_out: what else the files hold, and why it is not part of the text model.
        notes: what a careful reader should know, one sentence each.
    """

    config: ErnieConfig
    dialect: Dialect
    tensors: Mapping[str, LazyTensor]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]


@dataclass
class _Problems:
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: dict[str, None] = field(default_factory=dict)
    mistyped: dict[str, None] = field(default_factory=dict)

    def any(self) -> bool:
        return any(vars(self).values())


def family_of(names: Mapping[str, object]) -> str:
    """Which family of dialects the stored names of a safetensors checkpoint belong to."""
    if any(name.startswith("ernie.") for name in names):
        return "paddle"
    return "vl" if is_vision(names) else "hf"


def is_vision(names: Mapping[str, object]) -> bool:
    """Whether the stored names are those of a vision-language model."""
    return any(_VISION_MARKS.fullmatch(name) for name in names)


def assemble(
    origin: str,
    stored: Mapping[str, LazyTensor],
    config: ErnieConfig,
    family: str,
    *,
    allow_missing_correction_bias: bool,
) -> Assembly:
    """Find the text model of `config` among the stored tensors; nothing is read.

    Args:
        origin: what to call the files in messages.
        stored: stored name to tensor.
        config: the model's numbers; its MTP depth is replaced by what is stored.
        family: a key of `FAMILIES`.
        allow_missing_correction_bias: take zeros where a correction bias is missing.

    Raises:
        TensorsError: tensors are missing, unknown, misshaped or no weights; lists all.
        MissingCorrectionBiasError: correction biases are missing and nothing else is wrong.
        ConfigError: the configuration asks for an absurd number of tensors.
    """
    notes: list[str] = []
    config = _with_stored_mtp(config, stored, notes)
    specs = tensor_specs(config, mtp=True)

    @cache
    def places(dialect: Dialect) -> dict[str, Region]:
        return regions(config, dialect, mtp=True)

    problems = _Problems()
    tensors: dict[str, LazyTensor] = {}
    used: dict[str, Dialect] = {}
    absent_biases: list[str] = []
    for spec in specs:
        for dialect in FAMILIES[family]:
            region = places(dialect).get(spec.name)
            if region is not None and region.stored in stored:
                used[region.stored] = dialect
                tensors[spec.name] = _present(spec, region, stored[region.stored], problems)
                break
        else:
            wanted = absent_biases if spec.part == _BIAS_PART else problems.missing
            wanted.append(spec.name)
            if spec.part == _BIAS_PART:
                tensors[spec.name] = _zeros(spec)
    left_out, problems.unexpected = _sort_out(stored, used, config)
    if problems.any():
        problems.missing += absent_biases
        raise _tensors_error(origin, problems, stored, config)
    if absent_biases and not allow_missing_correction_bias:
        raise _no_bias(origin, absent_biases)
    if absent_biases:
        notes.append(
            f"{len(absent_biases)} layers have no e_score_correction_bias; zeros stand in for it, "
            "so other experts act than in the model that was trained"
        )
    notes += _notes(stored, used, left_out)
    # Most names are the same in all dialects of a family: the last one that was needed tells.
    dialect = max(used.values(), key=FAMILIES[family].index)
    return Assembly(config, dialect, tensors, left_out, tuple(notes))


def _with_stored_mtp(
    config: ErnieConfig, stored: Mapping[str, object], notes: list[str]
) -> ErnieConfig:
    """The configuration with the MTP depth of the files, which is what the rest must deal with."""
    found = [int(match[1]) for name in stored if (match := _MTP.fullmatch(name))]
    depth = max(found, default=-1) + 1
    if depth == config.num_nextn_predict_layers:
        return config
    notes.append(
        f"the configuration speaks of {config.num_nextn_predict_layers} multi-token-prediction "
        f"blocks; the files hold {depth}, and that is what counts"
    )
    return replace(config, num_nextn_predict_layers=depth)


def _present(
    spec: TensorSpec, region: Region, tensor: LazyTensor, problems: _Problems
) -> LazyTensor:
    """The canonical tensor inside a stored one; what is wrong with it goes to `problems`."""
    codec = tensor.codec
    if codec.name == "u16":
        codec = codecs.codec("bf16")  # Paddle, whose numpy has no bfloat16, says U16
        tensor = replace(tensor, codec=codec)
    elif codec.name in _NOT_WEIGHTS:
        _once(problems.mistyped, f"{region.stored}: {codec.name}")
    region = _as_stored(spec, region, tensor.shape)
    if region.stored_shape != tensor.shape:
        found, wanted = list(tensor.shape), list(region.stored_shape)
        _once(problems.misshaped, f"{region.stored}: {found}, expected {wanted}")
    if spec.part == _BIAS_PART:
        return LazyTensor(
            spec.name, codecs.codec("f32"), spec.shape, _decoded(region, tensor), tensor.origin
        )
    if region.is_whole and region.index is None:
        return tensor.renamed(spec.name)
    return LazyTensor(spec.name, codec, spec.shape, _extracted(region, tensor), tensor.origin)


def _once(entries: dict[str, None], entry: str) -> None:
    """Several canonical tensors lie in one stored tensor; what is wrong with it is told once."""
    entries[entry] = None


def _as_stored(spec: TensorSpec, region: Region, shape: tuple[int, ...]) -> Region:
    """The region, adapted to the layouts that occur of the two tensors whose layout varies."""
    if spec.part == _BIAS_PART:
        # [E], [1, E], or [2, E] in vision-language files: text, vision.
        if shape == spec.shape:
            return replace(region, stored_shape=shape, index=None)
        if shape in ((1, *spec.shape), (2, *spec.shape)):
            return replace(region, stored_shape=shape, index=0)
    if spec.part == "lm_head" and region.transposed and shape == spec.shape != shape[::-1]:
        # Which way Paddle's files store an untied head is not settled; the shape tells. (A square
        # one is taken as we write it.)
        return replace(region, stored_shape=shape, transposed=False, axis=0)
    return region


def _extracted(region: Region, tensor: LazyTensor) -> Callable[[], Raw]:
    return lambda: region.extract(tensor.view(), tensor.codec)


def _decoded(region: Region, tensor: LazyTensor) -> Callable[[], Raw]:
    return lambda: tensor.codec.decode(region.extract(tensor.view(), tensor.codec))


def _zeros(spec: TensorSpec) -> LazyTensor:
    codec: Codec = codecs.codec("f32")
    return LazyTensor(
        spec.name, codec, spec.shape, lambda: np.zeros(spec.shape, np.float32), ABSENT
    )


def _sort_out(
    stored: Mapping[str, LazyTensor], used: Mapping[str, object], config: ErnieConfig
) -> tuple[tuple[LeftOut, ...], list[str]]:
    """What is not part of the text model: left out for a known reason, or unexpected."""
    vision = is_vision(stored)
    known = (*_LEFT_OUT, *(_LEFT_OUT_VISION if vision else ()))
    reasons: dict[str, list[str]] = {}
    unexpected = []
    for name in stored:
        if name in used:
            continue
        expert = _TEXT_OR_VISION_EXPERT.fullmatch(name)
        if config.tie_word_embeddings and name in ("lm_head.weight", "output.weight"):
            reason: str | None = "output head, which the configuration ties to the embedding"
        elif vision and expert and int(expert[1]) >= config.moe_num_experts:
            reason = "vision experts"
        else:
            reason = next((why for why, pattern in known if pattern.fullmatch(name)), None)
        if reason is None:
            unexpected.append(name)
        else:
            reasons.setdefault(reason, []).append(name)
    left_out = tuple(
        LeftOut(reason, tuple(names), sum(stored[name].nbytes for name in names))
        for reason, names in reasons.items()
    )
    return left_out, unexpected


def _notes(
    stored: Mapping[str, LazyTensor],
    used: Mapping[str, object],
    left_out: tuple[LeftOut, ...],
) -> list[str]:
    found = []
    if as_bf16 := sum(stored[name].codec.name == "u16" for name in used):
        found.append(f"{as_bf16:,} tensors are stored as U16 and were read as bf16")
    if any(item.names in (("lm_head.weight",), ("output.weight",)) for item in left_out):
        found.append(
            "an output head is stored although the configuration ties it to the embedding; "
            "the embedding is used"
        )
    two_rows = [
        name
        for name in used
        if name.endswith("e_score_correction_bias") and stored[name].shape[:-1] == (2,)
    ]
    if two_rows:
        found.append(
            f"{len(two_rows)} correction biases have a second row, that of the vision experts; "
            "it was left out"
        )
    return found


def _no_bias(origin: str, names: list[str]) -> MissingCorrectionBiasError:
    return MissingCorrectionBiasError(
        f"{origin} is a mixture-of-experts model without its e_score_correction_bias: the router "
        "adds it before it chooses experts, so without it the wrong experts would act",
        got=f"{len(names)} layers without it, the first {names[0]}",
        expected="one bias of as many numbers as there are experts, in every layer with experts",
        remedy="take a complete copy of the model; a converter that dropped the bias has broken "
        "this one. To run it all the same, pass --allow-missing-correction-bias",
    )


_CHANGES_ARITHMETIC = {
    "rope_freqs.weight": "it scales the rotary frequencies (Llama 3), which is not supported",
    "rope_factors_long.weight": "it scales the rotary frequencies, which is not supported",
    "rope_factors_short.weight": "it scales the rotary frequencies, which is not supported",
}


def _tensors_error(
    origin: str, problems: _Problems, stored: Mapping[str, object], config: ErnieConfig
) -> TensorsError:
    lines = [
        f"{len(names):,} {kind}: {_some(names)}" for kind, names in vars(problems).items() if names
    ]
    lines += [
        f"{name} cannot be ignored: {why}"
        for name, why in _CHANGES_ARITHMETIC.items()
        if name in problems.unexpected
    ]
    return TensorsError(
        f"{origin}: the tensors do not fit the configuration",
        got="\n            ".join(lines),
        expected=f"the tensors of a model of {config.num_hidden_layers} layers and "
        f"{config.moe_num_experts} experts under their published names",
        remedy="compare config.json with the one the model was published with, and check that all "
        "files of the model are there",
    )


def _some(names: Collection[str], limit: int = 20) -> str:
    rest = len(names) - limit
    shown = ", ".join(name[:200] for name in islice(names, limit))
    return shown + (f" and {rest:,} more" if rest > 0 else "")
