"""The name table: every tensor of a text model, and where each dialect of checkpoint keeps it.

`TABLE` is the only place that knows names, shapes and layouts. Its first column is the canonical
name (that of the published `-PT` files, one tensor per expert); the others say where the same
numbers lie in other files. Everything else here only expands the table for one configuration.

Reading a row: `{i}` runs over layers, `{e}` over routed experts, `{d}` over MTP depths. Shapes are
symbolic: V vocabulary, H hidden, Q all query heads, K all key (or value) heads, F dense
feed-forward width, E routed experts, M routed expert width, S shared expert width, 2H twice hidden.
A stored name without `{e}` where the canonical one has it is a stack over experts along a new
first axis. `T(name)` is stored transposed (`[in, out]`). `first_of(n, name)` is entry 0 of a first
axis of length n. Rows that name the same stored tensor lie in it one after the other, along their
rows, in the order of the table: q, k, v; gate, up. A row with `bias=True` has a twin that ends in
`.bias`, of shape `[rows]`, in every dialect, where the configuration has `use_bias`.

Dialects: `hf` published `-PT` files and what transformers 5 saves; `hf_packed` what transformers 5
holds in memory; `paddle` published `-Paddle` files; `gguf` (architectures ernie4_5, ernie4_5-moe
and llama: the latter's rows of q and k are stored for interleaved rotary pairs, which is ERNIE's
own order, so nothing is permuted; MTP tensors have no place there); `vl` the text model inside
published vision-language `-PT` files; `vl_packed` the same as transformers 5 holds it in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, NamedTuple, get_args

from earnest.codecs.base import Codec, Raw
from earnest.config import ErnieConfig
from earnest.errors import ConfigError, FormatError

Dialect = Literal["hf", "hf_packed", "paddle", "gguf", "vl", "vl_packed"]
DIALECTS: tuple[Dialect, ...] = get_args(Dialect)

# 12 times what the 300B model has. A configuration is untrusted: it must not be able to ask for
# billions of names.
MAX_TENSORS = 2**17


@dataclass(frozen=True)
class Place:
    """Where a row of the table lies in one dialect: a stored name and how it lies there."""

    name: str
    transposed: bool = False
    first_axis: int | None = None


def T(name: str) -> Place:  # noqa: N802
    """Stored transposed: `[in, out]`."""
    return Place(name, transposed=True)


def first_of(length: int, name: str) -> Place:
    """Entry 0 of a first axis of `length`."""
    return Place(name, first_axis=length)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table; see the module's text for how to read it.

    `when`: "always", or the layers (or models) that have it. Columns left out: `hf` is the
    canonical name; `hf_packed` and `vl` are as `hf`; `vl_packed` is as `hf_packed` under
    `model.language_model.`; `gguf` left out means that there is no place for it.
    """

    name: str
    shape: str
    part: str
    when: Literal["always", "untied", "dense", "moe", "shared", "moe_model"] = "always"
    fp32: bool = False
    bias: bool = False
    paddle: Place | str
    gguf: Place | str | None = None
    hf: Place | str | None = None
    hf_packed: Place | str | None = None
    vl: Place | str | None = None
    vl_packed: Place | str | None = None

    def place(self, dialect: Dialect) -> Place | None:
        """Where this row lies in `dialect`; None where it has no place."""
        own: Place | str | None = getattr(self, dialect)
        if own is None:
            match dialect:
                case "hf":
                    own = self.name
                case "hf_packed" | "vl":
                    own = self.place("hf")
                case "vl_packed":
                    own = self.place("hf_packed")
                    assert isinstance(own, Place)
                    moved = own.name.replace("model.", "model.language_model.", 1)
                    own = replace(own, name=moved)
                case "paddle" | "gguf":
                    return None
        return Place(own) if isinstance(own, str) else own


# fmt: off
TABLE: tuple[Row, ...] = (
    Row(name="model.embed_tokens.weight", shape="V H", part="embedding",
        paddle="ernie.embed_tokens.weight",
        gguf="token_embd.weight"),

    # --- every layer -----------------------------------------------------------------------------
    Row(name="model.layers.{i}.input_layernorm.weight", shape="H", part="norms",
        paddle="ernie.layers.{i}.input_layernorm.weight",
        gguf="blk.{i}.attn_norm.weight"),
    Row(name="model.layers.{i}.self_attn.q_proj.weight", shape="Q H", part="attention", bias=True,
        paddle=T("ernie.layers.{i}.self_attn.qkv_proj.weight"),
        gguf="blk.{i}.attn_q.weight"),
    Row(name="model.layers.{i}.self_attn.k_proj.weight", shape="K H", part="attention", bias=True,
        paddle=T("ernie.layers.{i}.self_attn.qkv_proj.weight"),
        gguf="blk.{i}.attn_k.weight"),
    Row(name="model.layers.{i}.self_attn.v_proj.weight", shape="K H", part="attention", bias=True,
        paddle=T("ernie.layers.{i}.self_attn.qkv_proj.weight"),
        gguf="blk.{i}.attn_v.weight"),
    Row(name="model.layers.{i}.self_attn.o_proj.weight", shape="H Q", part="attention", bias=True,
        paddle=T("ernie.layers.{i}.self_attn.o_proj.weight"),
        gguf="blk.{i}.attn_output.weight"),
    Row(name="model.layers.{i}.post_attention_layernorm.weight", shape="H", part="norms",
        paddle="ernie.layers.{i}.post_attention_layernorm.weight",
        gguf="blk.{i}.ffn_norm.weight"),

    # --- layers with a dense feed-forward block ---------------------------------------------------
    Row(name="model.layers.{i}.mlp.gate_proj.weight", shape="F H", part="dense_ffn", when="dense",
        bias=True,
        paddle=T("ernie.layers.{i}.mlp.up_gate_proj.weight"),
        gguf="blk.{i}.ffn_gate.weight"),
    Row(name="model.layers.{i}.mlp.up_proj.weight", shape="F H", part="dense_ffn", when="dense",
        bias=True,
        paddle=T("ernie.layers.{i}.mlp.up_gate_proj.weight"),
        gguf="blk.{i}.ffn_up.weight"),
    Row(name="model.layers.{i}.mlp.down_proj.weight", shape="H F", part="dense_ffn", when="dense",
        bias=True,
        paddle=T("ernie.layers.{i}.mlp.down_proj.weight"),
        gguf="blk.{i}.ffn_down.weight"),

    # --- layers with routed experts ---------------------------------------------------------------
    Row(name="model.layers.{i}.mlp.gate.weight", shape="E H", part="router", when="moe", fp32=True,
        vl=T("model.layers.{i}.mlp.gate.weight"),
        vl_packed="model.language_model.layers.{i}.mlp.text_moe.gate.weight",
        paddle=T("ernie.layers.{i}.mlp.gate.weight"),
        gguf="blk.{i}.ffn_gate_inp.weight"),
    Row(name="model.layers.{i}.mlp.moe_statics.e_score_correction_bias", shape="E",
        part="correction_bias", when="moe", fp32=True,
        hf=first_of(1, "model.layers.{i}.mlp.moe_statics.e_score_correction_bias"),
        hf_packed=first_of(1, "model.layers.{i}.mlp.gate.moe_statics.e_score_correction_bias"),
        vl=first_of(2, "model.layers.{i}.mlp.moe_statics.e_score_correction_bias"),
        vl_packed=first_of(1, "model.language_model.layers.{i}.mlp.text_moe.gate"
                              ".moe_statics.e_score_correction_bias"),
        paddle=first_of(1, "ernie.layers.{i}.mlp.moe_statics.e_score_correction_bias"),
        gguf="blk.{i}.exp_probs_b.bias"),
    Row(name="model.layers.{i}.mlp.experts.{e}.gate_proj.weight", shape="M H",
        part="routed_experts", when="moe",
        hf_packed="model.layers.{i}.mlp.experts.gate_up_proj",
        vl_packed="model.language_model.layers.{i}.mlp.text_moe.experts.gate_up_proj",
        paddle=T("ernie.layers.{i}.mlp.experts.{e}.up_gate_proj.weight"),
        gguf="blk.{i}.ffn_gate_exps.weight"),
    Row(name="model.layers.{i}.mlp.experts.{e}.up_proj.weight", shape="M H",
        part="routed_experts", when="moe",
        hf_packed="model.layers.{i}.mlp.experts.gate_up_proj",
        vl_packed="model.language_model.layers.{i}.mlp.text_moe.experts.gate_up_proj",
        paddle=T("ernie.layers.{i}.mlp.experts.{e}.up_gate_proj.weight"),
        gguf="blk.{i}.ffn_up_exps.weight"),
    Row(name="model.layers.{i}.mlp.experts.{e}.down_proj.weight", shape="H M",
        part="routed_experts", when="moe",
        hf_packed="model.layers.{i}.mlp.experts.down_proj",
        vl_packed="model.language_model.layers.{i}.mlp.text_moe.experts.down_proj",
        paddle=T("ernie.layers.{i}.mlp.experts.{e}.down_proj.weight"),
        gguf="blk.{i}.ffn_down_exps.weight"),
    Row(name="model.layers.{i}.mlp.shared_experts.gate_proj.weight", shape="S H",
        part="shared_experts", when="shared", bias=True,
        paddle=T("ernie.layers.{i}.mlp.shared_experts.up_gate_proj.weight"),
        gguf="blk.{i}.ffn_gate_shexp.weight"),
    Row(name="model.layers.{i}.mlp.shared_experts.up_proj.weight", shape="S H",
        part="shared_experts", when="shared", bias=True,
        paddle=T("ernie.layers.{i}.mlp.shared_experts.up_gate_proj.weight"),
        gguf="blk.{i}.ffn_up_shexp.weight"),
    Row(name="model.layers.{i}.mlp.shared_experts.down_proj.weight", shape="H S",
        part="shared_experts", when="shared", bias=True,
        paddle=T("ernie.layers.{i}.mlp.shared_experts.down_proj.weight"),
        gguf="blk.{i}.ffn_down_shexp.weight"),

    Row(name="model.norm.weight", shape="H", part="norms",
        paddle="ernie.norm.weight",
        gguf="output_norm.weight"),
    Row(name="lm_head.weight", shape="V H", part="lm_head", when="untied",
        paddle=T("lm_head.weight"),
        gguf="output.weight"),
    # With `use_bias`, tied or not, but only mixture-of-experts models: so transformers has it.
    Row(name="lm_head.bias", shape="V", part="lm_head", when="moe_model",
        paddle="lm_head.bias",
        gguf="output.bias"),

    # --- multi-token prediction: one dense decoder block per depth --------------------------------
    Row(name="model.mtp_emb_norm.{d}.weight", shape="H", part="mtp",
        paddle="ernie.mtp_emb_norm.{d}.weight"),
    Row(name="model.mtp_hidden_norm.{d}.weight", shape="H", part="mtp",
        paddle="ernie.mtp_hidden_norm.{d}.weight"),
    Row(name="model.mtp_linear_proj.{d}.weight", shape="H 2H", part="mtp",
        paddle=T("ernie.mtp_linear_proj.{d}.weight")),
    Row(name="model.mtp_block.{d}.input_layernorm.weight", shape="H", part="mtp",
        paddle="ernie.mtp_block.{d}.input_layernorm.weight"),
    Row(name="model.mtp_block.{d}.self_attn.q_proj.weight", shape="Q H", part="mtp", bias=True,
        paddle=T("ernie.mtp_block.{d}.self_attn.qkv_proj.weight")),
    Row(name="model.mtp_block.{d}.self_attn.k_proj.weight", shape="K H", part="mtp", bias=True,
        paddle=T("ernie.mtp_block.{d}.self_attn.qkv_proj.weight")),
    Row(name="model.mtp_block.{d}.self_attn.v_proj.weight", shape="K H", part="mtp", bias=True,
        paddle=T("ernie.mtp_block.{d}.self_attn.qkv_proj.weight")),
    Row(name="model.mtp_block.{d}.self_attn.o_proj.weight", shape="H Q", part="mtp", bias=True,
        paddle=T("ernie.mtp_block.{d}.self_attn.o_proj.weight")),
    Row(name="model.mtp_block.{d}.post_attention_layernorm.weight", shape="H", part="mtp",
        paddle="ernie.mtp_block.{d}.post_attention_layernorm.weight"),
    Row(name="model.mtp_block.{d}.mlp.gate_proj.weight", shape="F H", part="mtp", bias=True,
        paddle=T("ernie.mtp_block.{d}.mlp.up_gate_proj.weight")),
    Row(name="model.mtp_block.{d}.mlp.up_proj.weight", shape="F H", part="mtp", bias=True,
        paddle=T("ernie.mtp_block.{d}.mlp.up_gate_proj.weight")),
    Row(name="model.mtp_block.{d}.mlp.down_proj.weight", shape="H F", part="mtp", bias=True,
        paddle=T("ernie.mtp_block.{d}.mlp.down_proj.weight")),
)
# fmt: on


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A canonical tensor: what a complete text model must have.

    Attributes:
        name: canonical name.
        shape: `[rows, columns]` or `[n]`.
        part: which part of the model it counts to ("attention", "routed_experts", ...).
        fp32: whether published files keep it in float32 (router and correction bias).
    """

    name: str
    shape: tuple[int, ...]
    part: str
    fp32: bool


@dataclass(frozen=True, slots=True)
class Region:
    """The part of one stored tensor that is one canonical tensor.

    In words: take entry `index` of the stored tensor's first axis (if not None), cut
    `[start, stop)` out of `axis` of what is left, and transpose that if `transposed`.

    Attributes:
        stored: name of the stored tensor.
        stored_shape: its whole shape.
        index: entry of the leading (expert or bias row) axis, or None where there is none.
        transposed: whether the cut is the transpose of the canonical tensor.
        axis: axis of the cut, counted after `index` is applied; 1 exactly where transposed.
        start, stop: the cut; all of the axis where the tensor is not fused with others.
    """

    stored: str
    stored_shape: tuple[int, ...]
    index: int | None
    transposed: bool
    axis: int
    start: int
    stop: int

    @property
    def is_whole(self) -> bool:
        """Whether the canonical tensor is the whole stored tensor, in the stored layout."""
        rest = self.stored_shape if self.index is None else self.stored_shape[1:]
        return (
            not self.transposed
            and (self.index is None or self.stored_shape[0] == 1)
            and (self.start, self.stop) == (0, rest[self.axis])
        )

    def extract(self, raw: Raw, codec: Codec) -> Raw:
        """The canonical tensor inside the stored array `raw`: a view, nothing is copied. Writing
        to the view of a writable array fills the stored tensor.

        Args:
            raw: array of shape `codec.stored_shape(self.stored_shape)`.
            codec: what the stored bits mean. A block codec packs weights along rows, so only whole
                rows can be cut out of it.

        Raises:
            FormatError: the layout needs columns of, or a cut through, a block codec's rows.
        """
        rest = self.stored_shape if self.index is None else self.stored_shape[1:]
        cut = (self.start, self.stop) != (0, rest[self.axis])
        if not codec.is_plain and (self.transposed or (cut and self.axis == len(rest) - 1)):
            raise FormatError(
                f"{self.stored} is stored as {codec.name} blocks in a layout that blocks forbid",
                expected="blocks only where rows are stored whole and in order",
            )
        view = raw if self.index is None else raw[self.index]
        if cut:
            view = (
                view[self.start : self.stop] if self.axis == 0 else view[:, self.start : self.stop]
            )
        return view.T if self.transposed else view


class Part(NamedTuple):
    """A canonical tensor and where it lies in the stored tensor that holds it."""

    name: str
    region: Region


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a dialect stores it.

    Attributes:
        name: its name in the file.
        shape: its shape in the file.
        parts: everything that lies in it, in stored order. They tile the tensor, but for the second
            row of the `vl` dialect's correction bias (that of the vision experts).
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def tensor_specs(config: ErnieConfig, mtp: bool = False) -> list[TensorSpec]:
    """Every canonical tensor of a text model, in the order of the table, layer by layer.

    Args:
        config: the model's numbers.
        mtp: whether to include the `config.num_nextn_predict_layers` MTP blocks.

    Raises:
        ConfigError: the configuration asks for an absurd number of tensors.
    """
    sizes = _sizes(config)
    shapes = {row.name: _shape(row, sizes) for row in _ROWS}
    return [
        TensorSpec(row.name.format_map(at), shapes[row.name], row.part, row.fp32)
        for row, at in _expand(config, mtp)
    ]


def regions(config: ErnieConfig, dialect: Dialect, mtp: bool = False) -> dict[str, Region]:
    """Where `dialect` keeps each canonical tensor, in the order of `tensor_specs`.

    MTP tensors have no place in `gguf` and are absent from its result.

    Raises:
        ConfigError: the configuration asks for an absurd number of tensors.
    """
    found: dict[str, Region] = {}
    for tensor in stored(config, dialect, mtp):
        found.update(tensor.parts)
    order = (row.name.format_map(at) for row, at in _expand(config, mtp))
    return {name: found[name] for name in order if name in found}


def stored(config: ErnieConfig, dialect: Dialect, mtp: bool = False) -> list[StoredTensor]:
    """Every tensor that a file of `dialect` holds for the text model, with what lies in it.

    Raises:
        ConfigError: the configuration asks for an absurd number of tensors.
    """
    sizes = _sizes(config)
    shapes = {row.name: _shape(row, sizes) for row in _ROWS}
    places = {row.name: row.place(dialect) for row in _ROWS}
    # Fused rows stand next to each other in the table, so the widths of one stored tensor are
    # known from the table alone, before it is expanded.
    widths: dict[str, int] = {}
    starts: dict[str, int] = {}
    for row in _ROWS:
        if place := places[row.name]:
            starts[row.name] = widths.get(place.name, 0)
            widths[place.name] = starts[row.name] + shapes[row.name][0]
    found: dict[str, tuple[tuple[int, ...], list[Part]]] = {}
    for row, at in _expand(config, mtp):
        place = places[row.name]
        if place is None:
            continue
        name = place.name.format_map(at)
        if name not in found:
            found[name] = (_stored_shape(row, place, shapes[row.name], widths, config), [])
        shape, parts = found[name]
        stacked = "{e}" in row.name and "{e}" not in place.name
        two_d = len(shapes[row.name]) == 2
        region = Region(
            stored=name,
            stored_shape=shape,
            index=at["e"] if stacked else None if place.first_axis is None else 0,
            transposed=place.transposed and two_d,
            axis=1 if place.transposed and two_d else 0,
            start=starts[row.name],
            stop=starts[row.name] + shapes[row.name][0],
        )
        parts.append(Part(row.name.format_map(at), region))
    return [StoredTensor(name, shape, tuple(parts)) for name, (shape, parts) in found.items()]


def _stored_shape(
    row: Row, place: Place, shape: tuple[int, ...], widths: dict[str, int], config: ErnieConfig
) -> tuple[int, ...]:
    whole = (widths[place.name], *shape[1:])
    if place.transposed:
        whole = whole[::-1]
    if "{e}" in row.name and "{e}" not in place.name:
        return (config.moe_num_experts, *whole)
    return whole if place.first_axis is None else (place.first_axis, *whole)


def _with_bias_twins(table: tuple[Row, ...]) -> Iterator[Row]:
    """The rows of the table and, after each row with `bias=True`, its `.bias` twin."""

    def twin(place: Place | str | None) -> Place | str | None:
        if isinstance(place, Place):
            return replace(place, name=place.name.removesuffix(".weight") + ".bias")
        return place and place.removesuffix(".weight") + ".bias"

    for row in table:
        yield row
        if row.bias:
            columns: dict[str, Any] = {d: twin(getattr(row, d)) for d in DIALECTS}
            name = row.name.removesuffix(".weight") + ".bias"
            yield replace(row, name=name, shape=row.shape.split()[0], **columns)


_ROWS: tuple[Row, ...] = tuple(_with_bias_twins(TABLE))


def _sizes(config: ErnieConfig) -> dict[str, int]:
    return {
        "V": config.vocab_size,
        "H": config.hidden_size,
        "2H": 2 * config.hidden_size,
        "Q": config.q_size,
        "K": config.kv_size,
        "F": config.intermediate_size,
        "E": config.moe_num_experts,
        "M": config.moe_intermediate_size,
        "S": config.shared_intermediate_size,
    }


def _shape(row: Row, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[symbol] for symbol in row.shape.split())


def _expand(config: ErnieConfig, mtp: bool) -> Iterator[tuple[Row, dict[str, int]]]:
    """Rows with their indices, layer by layer and, within a layer, expert by expert."""
    depths = config.num_nextn_predict_layers if mtp else 0
    rows = [row for row in _ROWS if config.use_bias or not row.name.endswith(".bias")]
    _refuse_absurd(config, len(rows))

    def loop(row: Row) -> str:
        return "i" if "{i}" in row.name else "d" if "{d}" in row.name else ""

    counts = {"i": config.num_hidden_layers, "d": depths, "": 1}
    for kind, group in groupby(rows, key=loop):
        block = list(group)
        for index in range(counts[kind]):
            moe = kind == "i" and config.is_moe_layer(index)
            present = {
                "always": True,
                "untied": not config.tie_word_embeddings,
                "moe_model": config.is_moe,
                "dense": kind == "i" and not moe,
                "moe": moe,
                "shared": moe and config.moe_num_shared_experts > 0,
            }
            here = [row for row in block if present[row.when]]
            for per_expert, run in groupby(here, key=lambda row: "{e}" in row.name):
                run_rows = list(run)
                for expert in range(config.moe_num_experts if per_expert else 1):
                    at = {"i": index, "d": index, "e": expert}
                    for row in run_rows:
                        yield row, at


def _refuse_absurd(config: ErnieConfig, rows: int) -> None:
    asked = config.num_hidden_layers * (rows + 3 * config.moe_num_experts)
    if asked > MAX_TENSORS:
        raise ConfigError(
            "the configuration asks for an absurd number of tensors",
            got=f"{config.num_hidden_layers:,} layers of {config.moe_num_experts:,} experts",
            expected=f"at most {MAX_TENSORS:,} tensors (the 300B model has about 10,000)",
        )
