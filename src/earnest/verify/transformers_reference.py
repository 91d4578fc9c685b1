"""The reference of `exactness`: the ERNIE 4.5 classes of `transformers`, in float32, on the CPU.

To be a witness and not an echo, the reference reads the checkpoint by itself wherever it can: a
Hugging Face folder is given to `from_pretrained` as it is, with its own `config.json`. Only what
transformers cannot read as ERNIE (Paddle, GGUF, the text model inside a vision-language folder) is
first written as a temporary Hugging Face folder by `checkpoint.convert`; the report says so, since
a mistake of the converter would then be shared by both sides.

Nothing of the folder is executed: the classes are named here, `auto_map` is not followed, and only
safetensors are read.

Shape suffixes: T tokens of one sequence, E routed experts, A active experts, D hidden size,
V vocabulary.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from earnest.checkpoint.checkpoint import Checkpoint
from earnest.checkpoint.convert import convert
from earnest.checkpoint.synth import truncated
from earnest.errors import CheckpointError, MachineError, MissingPackageError
from earnest.log import Progress
from earnest.runners.base import Float32

_READ_BY_TRANSFORMERS = ("ernie4_5", "ernie4_5_moe")


@dataclass
class LayerTrace:
    """What the reference did in one layer, for one sequence.

    Attributes:
        hidden: the residual stream after the layer, float32 `[T, D]`.
        scores: selection scores (probability plus correction bias), float32 `[T, E]`; None in a
            dense layer.
        experts: chosen experts, int64 `[T, A]`; None in a dense layer.
        weights: their weights, float32 `[T, A]`; None in a dense layer.
    """

    hidden: Float32 | None = None
    scores: Float32 | None = None
    experts: npt.NDArray[np.int64] | None = None
    weights: Float32 | None = None


@dataclass
class Trace:
    """What the reference did with one sequence: logits float32 `[T, V]`, and each layer."""

    logits: Float32
    layers: list[LayerTrace] = field(default_factory=list)


# Called with (layer, what the reference did in it so far); what it returns replaces the choice of
# experts int64 [T, A]. See `exactness._settle_ties`.
Override = Callable[[int, LayerTrace], npt.NDArray[np.int64]]


def load_packages() -> tuple[ModuleType, ModuleType]:
    """The packages (torch, transformers).

    Raises:
        MissingPackageError: one of them is not installed, or too old to know ERNIE 4.5.
    """
    found = []
    for name in ("torch", "transformers"):
        try:
            found.append(importlib.import_module(name))
        except ImportError as error:
            raise MissingPackageError(
                f"comparing with the reference needs the package {name}, which cannot be imported",
                got=error,
                remedy="pip install 'torch>=2.6' 'transformers>=5.0'",
            ) from error
    torch, transformers = found
    if not hasattr(transformers, "Ernie4_5_MoeForCausalLM"):
        raise MissingPackageError(
            "the installed transformers does not know ERNIE 4.5",
            got=getattr(transformers, "__version__", "an unknown version"),
            expected="5.0 or later",
            remedy="pip install --upgrade 'transformers>=5.0'",
        )
    return torch, transformers


class Reference:
    """A checkpoint in `transformers`; made by `open_reference`.

    Attributes:
        how: how the checkpoint got there, in one sentence.
        version: of transformers and torch.
    """

    def __init__(self, torch: ModuleType, model: Any, how: str, version: str) -> None:
        self._torch, self._model, self.how, self.version = torch, model, how, version

    def run(self, ids: Sequence[int], override: Override | None = None) -> Trace:
        """Run one sequence from position 0.

        `override` may replace the choice of experts of a layer; the weights are then those that
        the reference's own probabilities give the replaced choice.
        """
        layers = [LayerTrace() for _ in self._model.model.layers]
        hooks = []
        for index, layer in enumerate(self._model.model.layers):
            hooks.append(layer.register_forward_hook(_keep_hidden(layers[index])))
            if hasattr(layer.mlp, "gate"):
                hook = self._keep_routing(index, layers[index], override)
                hooks.append(layer.mlp.gate.register_forward_hook(hook))
        try:
            with self._torch.no_grad():
                output = self._model(
                    input_ids=self._torch.tensor([list(ids)]), use_cache=False, return_dict=True
                )
        finally:
            for hook in hooks:
                hook.remove()
        return Trace(output.logits[0].float().numpy(), layers)

    def _keep_routing(self, index: int, trace: LayerTrace, override: Override | None) -> Any:
        torch = self._torch

        def hook(gate: Any, _inputs: Any, output: Any) -> Any:
            logits, weights, experts = _router_outputs(torch, output, gate)
            probability = torch.softmax(logits.float(), dim=-1)
            bias = gate.moe_statics.e_score_correction_bias.detach().float().reshape(1, -1)
            trace.scores = (probability + bias).numpy()
            trace.experts = experts.numpy().copy()
            trace.weights = weights.float().numpy().copy()
            if override is None:
                return None
            replaced = torch.from_numpy(override(index, trace))
            if torch.equal(replaced, experts):
                return None
            chosen = torch.gather(probability, -1, replaced)
            total = chosen.sum(dim=-1, keepdim=True).clamp(min=gate.norm_min)
            return _with(output, {id(weights): (chosen / total).to(weights), id(experts): replaced})

        return hook


def _keep_hidden(trace: LayerTrace) -> Any:
    def hook(_layer: Any, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        trace.hidden = hidden[0].float().numpy().copy()

    return hook


def _router_outputs(torch: ModuleType, output: Any, gate: Any) -> tuple[Any, Any, Any]:
    """(router logits, weights, experts), told apart by what they are and not by their order."""
    if isinstance(output, tuple) and len(output) == 3:
        experts = [x for x in output if not torch.is_floating_point(x)]
        floats = [x for x in output if torch.is_floating_point(x)]
        if len(experts) == 1 and floats[0].shape[-1] == gate.weight.shape[0]:
            return floats[0], floats[1], experts[0]
    raise MachineError(
        "the router of the installed transformers gives something unknown",
        got=type(output).__name__,
        expected="router logits, weights and chosen experts",
        remedy="pip install 'transformers==5.23'",
    )


def _with(output: tuple[Any, ...], replaced: dict[int, Any]) -> tuple[Any, ...]:
    return tuple(replaced.get(id(x), x) for x in output)


@contextlib.contextmanager
def open_reference(
    checkpoint: Checkpoint, num_layers: int, progress: Progress
) -> Iterator[Reference]:
    """The first `num_layers` layers of the checkpoint, loaded by transformers in float32.

    Temporary files are gone when the context is left.

    Raises:
        MissingPackageError: torch or transformers is not installed.
        CheckpointError: transformers cannot load it, or not all of it.
        MachineError: the temporary folder cannot be written.
    """
    torch, transformers = load_packages()
    version = f"transformers {transformers.__version__}, torch {torch.__version__}"
    with contextlib.ExitStack() as stack:
        folder, how = checkpoint.path, "transformers read the folder itself"
        if not _readable_by_transformers(checkpoint):
            temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="earnest-verify-"))
            folder = Path(temporary) / "hf"
            _write_for_transformers(checkpoint, num_layers, folder, progress)
            how = (
                f"transformers cannot read this {checkpoint.dialect} checkpoint, so it was "
                "converted to a temporary Hugging Face folder first"
            )
        stack.enter_context(_quiet(transformers))
        model = _load(torch, transformers, checkpoint, folder, num_layers)
        yield Reference(torch, model, how, version)


def _readable_by_transformers(checkpoint: Checkpoint) -> bool:
    return (
        checkpoint.path.is_dir()
        and checkpoint.container == "safetensors"
        and checkpoint.dialect == "hf"
        and checkpoint.metadata.get("model_type") in _READ_BY_TRANSFORMERS
    )


def _load(
    torch: ModuleType,
    transformers: ModuleType,
    checkpoint: Checkpoint,
    folder: Path,
    num_layers: int,
) -> Any:
    kind = "Ernie4_5_Moe" if checkpoint.config.is_moe else "Ernie4_5"
    config_class = getattr(transformers, f"{kind}Config")
    model_class = getattr(transformers, f"{kind}ForCausalLM")
    try:
        config = config_class.from_pretrained(folder, local_files_only=True)
        # The class has resolved a `moe_layer_end_index` of -1 by now; were it resolved after the
        # model is cut, the number would still lie beyond the last layer and mean the same.
        config.num_hidden_layers = num_layers
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: transformers cannot load this checkpoint",
            got=f"{type(error).__name__}: {error}",
            remedy="if earnest opens it and transformers does not, please report both messages",
        ) from error
    # What transformers does not find it fills with random numbers, and says so only here.
    if lacking := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise CheckpointError(
            f"{folder}: transformers did not find all tensors, so it is no reference",
            got=f"{len(lacking)} missing: " + ", ".join(lacking[:5]),
            remedy="see which tensors there are with earnest inspect",
        )
    return model.eval()


def _write_for_transformers(
    checkpoint: Checkpoint, num_layers: int, folder: Path, progress: Progress
) -> None:
    """The first layers as a Hugging Face folder, in their stored types where torch knows them."""
    config = replace(truncated(checkpoint.config, num_layers), num_nextn_predict_layers=0)

    def is_kept(name: str) -> bool:
        parts = name.split(".")
        return not name.startswith("model.mtp_") and (
            parts[1] != "layers" or int(parts[2]) < num_layers
        )

    tensors = {name: t for name, t in checkpoint.tensors.items() if is_kept(name)}
    known = all(tensor.codec.name in ("bf16", "f16", "f32") for tensor in tensors.values())
    convert(
        replace(checkpoint, config=config, tensors=tensors),
        folder,
        to="hf",
        dtype=None if known else "f32",
        progress=progress,
    )


@contextlib.contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Keep transformers from drawing bars, from warning of the layers that were cut off, and from
    reading all experts in float32 before it stacks those of the first layer: that takes twice the
    memory. (`HF_DEACTIVATE_ASYNC_LOAD` is the switch that transformers has for it.)
    """
    settings, switch = transformers.utils.logging, "HF_DEACTIVATE_ASYNC_LOAD"
    verbosity, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    before = os.environ.get(switch)
    settings.set_verbosity(logging.CRITICAL)
    settings.disable_progress_bar()
    os.environ[switch] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before
        settings.set_verbosity(verbosity)
        if bars:
            settings.enable_progress_bar()
