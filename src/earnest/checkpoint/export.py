"""`export`: any checkpoint as one GGUF file that llama.cpp opens and runs.

Names, stacked experts and shapes come from the name table; configuration and tokenizer are written
by their own rooms. Blocks whose type stays are copied, bit for bit. From a GGUF file everything it
says is taken along; only what describes the old weights is replaced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from earnest import codecs
from earnest.checkpoint.checkpoint import Checkpoint, LeftOut
from earnest.checkpoint.containers.base import PlannedTensor
from earnest.checkpoint.containers.gguf_writer import file_bytes, write_file
from earnest.checkpoint.lazy import LazyTensor
from earnest.checkpoint.names import StoredTensor, tensor_specs
from earnest.checkpoint.open import GGUF_SAMPLING
from earnest.checkpoint.plan import (
    Choose,
    plan_notes,
    plan_tensors,
    refuse_overlap,
    state_of,
    tensors_digest,
)
from earnest.checkpoint.writer import WriteReport, resumable
from earnest.codecs.base import Codec
from earnest.codecs.encode import GENERATION
from earnest.config import to_gguf
from earnest.errors import FormatError, TokenizerError, UserError
from earnest.log import Progress, silent
from earnest.tokenizer.gguf_write import corrected

DTYPES = ("bf16", "f16", "f32")

# general.file_type by the type of most weights; of the mixes that share one, the usual.
_FILE_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q2_k": 10,
    "q3_k": 12,
    "q4_k": 15,
    "q5_k": 17,
    "q6_k": 18,
    "bf16": 32,
}
_QUANTIZATION_VERSION = 2  # of ggml's block formats; the first one is long gone

# What a GGUF file says of the weights it holds; it does not hold of others.
_OF_THE_WEIGHTS = ("general.file_type", "general.quantization_version", "general.alignment")
_OF_THE_WEIGHTS_PREFIXES = ("split.", "quantize.", "imatrix.")

# What a GGUF file without a tokenizer says: it can be run on token ids.
NO_TOKENIZER = {"tokenizer.ggml.model": "none"}

_UNDER_WAY = "weights.gguf"


def export(
    source: Checkpoint,
    destination: Path,
    *,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> WriteReport:
    """Write `source` as the GGUF file `destination`.

    Args:
        source: an opened checkpoint of any container and dialect.
        destination: a name that ends in `.gguf`; the file appears when it is complete, and an
            interrupted run is taken up again by the same call.
        dtype: "bf16", "f16" or "f32" for all matrices but the router; None keeps each stored type
            that GGUF has. Norms, biases, router and correction bias are float32.
        force: replace a destination that exists.
        progress: told about bytes written.

    Raises:
        UserError: unknown dtype, the destination exists, is no `.gguf` file or overlaps with the
            source, or a weight is beyond the range of f16.
        ConfigError: GGUF has no way to describe the model.
        TensorsError: a tensor is missing.
        DiskFullError, AccessError, MachineError: it cannot be written; nothing is at the
            destination.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}", expected=", ".join(DTYPES))
    is_gguf = source.container == "gguf"

    def choose(target: StoredTensor, tensor: LazyTensor) -> Codec:
        if dtype is None and is_gguf:
            return tensor.codec
        if dtype is None:
            return _held(tensor.codec)
        return codecs.codec(dtype)

    return write_gguf(
        source,
        destination,
        choose if dtype is None and is_gguf else keeping_float32(source, choose),
        label=dtype or "bf16",
        force=force,
        progress=progress,
    )


def _held(codec: Codec) -> Codec:
    """The type that GGUF has for a stored one: itself, or one that holds it exactly."""
    if codec.name in DTYPES or not codec.is_plain:
        return codec
    return codecs.codec("bf16" if codec.name.startswith("f8") else "f32")


def keeping_float32(source: Checkpoint, choose: Choose) -> Choose:
    """`choose` for matrices; float32 for norms, biases, router and correction bias, as every reader
    of GGUF expects them."""
    fp32 = {spec.name for spec in tensor_specs(source.config) if spec.fp32}

    def kept(target: StoredTensor, tensor: LazyTensor) -> Codec:
        if len(tensor.shape) == 1 or tensor.name in fp32:
            return codecs.codec("f32")
        return choose(target, tensor)

    return kept


def write_gguf(
    source: Checkpoint,
    destination: Path,
    choose: Choose,
    *,
    label: str,
    force: bool,
    progress: Progress,
) -> WriteReport:
    """Write `source` as a GGUF file with the types that `choose` names; see `export`.

    Args:
        label: what blocks that are decoded become, for the notes.
    """
    refuse_overlap(source.path, destination)
    plan = plan_tensors(source, "gguf", choose, mtp=False)
    notes = [*source.notes, *plan_notes(plan, label)]
    left_out = list(source.left_out)
    if source.has_mtp:
        mtp = [name for name in source.tensors if name.startswith("model.mtp_")]
        nbytes = sum(source.tensors[name].nbytes for name in mtp)
        reason = "multi-token-prediction block, for which the GGUF format has no place"
        left_out.append(LeftOut(reason, tuple(mtp), nbytes))
        notes.append(f"left out: the {reason} ({len(mtp)} tensors)")
    metadata = _metadata(source, plan.tensors, notes)
    resumed = write_staged(
        destination,
        plan.tensors,
        metadata,
        fingerprint={"export": state_of(source.path)},
        force=force,
        progress=progress,
    )
    return WriteReport(
        path=str(destination),
        layout="gguf",
        tensors=len(plan.tensors),
        nbytes=sum(tensor.nbytes for tensor in plan.tensors),
        files=(destination.name,),
        resumed=resumed,
        left_out=tuple(left_out),
        notes=tuple(notes),
    )


def write_staged(
    destination: Path,
    tensors: Sequence[PlannedTensor],
    metadata: Mapping[str, Any],
    *,
    fingerprint: dict[str, Any],
    force: bool,
    progress: Progress,
) -> bool:
    """A GGUF file that appears at once; returns whether an interrupted run was continued.

    Args:
        fingerprint: what the weights depend on besides the tensors' names, types and shapes.
    """
    if destination.suffix != ".gguf" or destination.is_dir():
        raise UserError(
            f"{destination} cannot be the name of a GGUF file",
            expected="a file name that ends in .gguf",
        )
    identity = {**fingerprint, "encoders": GENERATION, "tensors": tensors_digest(tensors)}
    with resumable(destination, identity, file_bytes(tensors, metadata), force=force) as staged:
        resumed = write_file(staged.path / _UNDER_WAY, tensors, metadata, progress)
        staged.commit_file(_UNDER_WAY)
    return resumed


# --- metadata -----------------------------------------------------------------------------------


def _metadata(
    source: Checkpoint, tensors: Sequence[PlannedTensor], notes: list[str]
) -> dict[str, Any]:
    """All keys of the file; what could not be taken along is told in `notes`."""
    if source.container == "gguf":
        found = _of_gguf(source)
    else:
        found = to_gguf(source.config) | {"general.name": source.path.resolve().name}
        found |= _sampling(source.generation_config)
        found = _tokenizer(source, notes) | found
    return of_weights(found, tensors)


def of_weights(metadata: Mapping[str, Any], tensors: Sequence[PlannedTensor]) -> dict[str, Any]:
    """The metadata with what they say of the weights put right, general keys first."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.codec.name] += tensor.nbytes
    found = dict(metadata)
    for key in _OF_THE_WEIGHTS:
        found.pop(key, None)
    bulk = sizes.most_common(1)[0][0]
    if bulk in _FILE_TYPES:
        found["general.file_type"] = _FILE_TYPES[bulk]
    if any(not tensor.codec.is_plain for tensor in tensors):
        found["general.quantization_version"] = _QUANTIZATION_VERSION
    return dict(sorted(found.items(), key=lambda item: not item[0].startswith("general.")))


def _of_gguf(source: Checkpoint) -> dict[str, Any]:
    kept = {
        key: value
        for key, value in source.metadata.items()
        if not key.startswith(_OF_THE_WEIGHTS_PREFIXES)
    }
    try:
        tokenizer = source.tokenizer
    except TokenizerError:
        return kept  # of a kind that Earnest cannot read; it is taken along as it is
    special = [i for i in range(tokenizer.vocab_size) if tokenizer.is_special(i)]
    return corrected(kept, special)


def _sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling defaults under GGUF's names; llama.cpp takes counts as int32, the rest as float."""
    found: dict[str, Any] = {}
    for key, name in GGUF_SAMPLING.items():
        value = generation.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        found[key] = int(value) if name == "top_k" else float(value)
    return found


def _tokenizer(source: Checkpoint, notes: list[str]) -> dict[str, Any]:
    try:
        return source.tokenizer.to_gguf(source.config.vocab_size)
    except (TokenizerError, FormatError) as error:
        notes.append(f"the file has no tokenizer: {error.problem}")
        return dict(NO_TOKENIZER)
