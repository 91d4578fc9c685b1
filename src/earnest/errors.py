"""Every exception Earnest raises for bad input or a bad machine, grouped by who must act.

The message of each says what was got, what was expected and what to do. Everything derives from
`EarnestError`, so a caller needs one `except`; the command line prints the message and leaves with
`exit_code`.
"""

from __future__ import annotations


class EarnestError(Exception):
    """Base of all errors that Earnest raises on purpose.

    Args:
        problem: one sentence: what is wrong, naming the thing.
        got: what was found, if that is not already in `problem`.
        expected: what would have been right.
        remedy: what the reader can do now.
    """

    exit_code = 1

    def __init__(
        self,
        problem: str,
        *,
        got: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        self.problem, self.got, self.expected, self.remedy = problem, got, expected, remedy
        lines = [problem]
        if got is not None:
            lines.append(f"  got:      {got}")
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if remedy is not None:
            lines.append(f"  to do:    {remedy}")
        super().__init__("\n".join(lines))


# --- the caller must act: an argument, an option or a request is wrong -----------------------


class UserError(EarnestError):
    """An argument or a request is wrong; nothing is wrong with the files or the machine."""

    exit_code = 2


class SamplingError(UserError, ValueError):
    """A sampling parameter is outside its range or contradicts another."""


class PromptError(UserError, ValueError):
    """A prompt cannot be run: empty, token ids outside the vocabulary, longer than the context."""


class GrammarError(UserError, ValueError):
    """A schema, regular expression or grammar cannot be used: broken, too large, too deep."""


class ModelNotFoundError(UserError):
    """A MODEL names neither a built-in model nor a file or folder that exists."""


class ChatUnsupportedError(UserError):
    """A chat was asked of a model that has no chat format (a Base model)."""


# --- the checkpoint's author must act: a file is broken or not supported ----------------------


class CheckpointError(EarnestError):
    """A model file or folder is broken, incomplete or of a kind that is not supported."""

    exit_code = 3


class FormatError(CheckpointError):
    """A container (safetensors, GGUF, JSON, tokenizer file) does not follow its own format."""


class ConfigError(CheckpointError, ValueError):
    """A configuration is inconsistent, or has a key that changes the arithmetic unsupported."""


class TensorsError(CheckpointError):
    """Tensors are missing, unknown or of the wrong shape; lists all of them at once."""


class MissingCorrectionBiasError(CheckpointError):
    """A mixture-of-experts checkpoint lacks `e_score_correction_bias`: wrong experts would act."""


class TokenizerError(CheckpointError):
    """A tokenizer file cannot be used, or is of a kind that is not supported."""


class TemplateError(CheckpointError):
    """A chat template is broken, refuses the messages, or exceeds its time or size bound."""


# --- the owner of the machine must act --------------------------------------------------------


class MachineError(EarnestError):
    """The machine stands in the way: disk, memory, permissions, network, a missing package."""

    exit_code = 4


class DiskFullError(MachineError):
    """An output does not fit on the disk (or exceeds a file-size limit)."""


class AccessError(MachineError):
    """A path cannot be read or written with the present permissions."""


class MemoryBudgetError(MachineError):
    """Something would need more memory than there is; raised before anything is taken."""


class NetworkError(MachineError):
    """Something could not be fetched."""


class MissingPackageError(MachineError):
    """An optional Python package, or the compiled kernels, are needed for what was asked and are
    not installed."""


class MissingKernelsWarning(RuntimeWarning):
    """Models run in numpy, since this installation has no compiled kernels."""


# --- nobody needs to do anything but wait -----------------------------------------------------


class BusyError(EarnestError):
    """Too many requests are waiting; later there may be room."""


class DeadlineError(EarnestError):
    """A request took longer than it was given."""


class ShuttingDownError(EarnestError):
    """The server ends."""
