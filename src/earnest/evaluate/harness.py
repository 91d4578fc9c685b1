"""`EarnestLM`: a model for lm-evaluation-harness, `lm_eval --model earnest --model_args path=...`.

Tokens, special tokens, truncation and stopping follow the harness's own model for transformers
(`--model hf`), so that the same weights get the same scores. All requests of a task are in the
engine at once, and what their prompts have in common is computed once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from earnest.engine import (
    LanguageModel,
    Request,
    SamplingParams,
    Score,
    Scoring,
    TokenEvent,
    load,
)
from earnest.engine.many import run_all
from earnest.errors import (
    MissingPackageError,
    PromptError,
    TemplateError,
    TokenizerError,
    UserError,
)
from earnest.runners.choice import RunnerName
from earnest.runners.native.runner import KvType
from earnest.tokenizer import Tokenizer
from earnest.tokenizer.template import ChatTemplate

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from tqdm import tqdm
except ImportError as error:
    raise MissingPackageError(
        f"lm-evaluation-harness is not installed: {error}",
        remedy="pip install 'earnest[eval]', which brings lm_eval 0.4.13 or later",
    ) from error

logger = logging.getLogger(__name__)

# What a generation may ask for besides `until`, `max_gen_toks`, `do_sample` and `temperature`, and
# what it is called here.
_SAMPLING = {
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "min_new_tokens": "min_tokens",
}


class EarnestLM(TemplateLM):  # type: ignore[misc]
    """A model that lm-evaluation-harness can ask.

    Args:
        path: a folder or file, or a built-in name; `pretrained` is another word for it.
        runner: "native" or "reference"; "auto" takes the native one where there is one.
        max_length: tokens that the model is run on at most; what is longer loses its beginning.
            By default all that the model was made for, as far as memory allows.
        kv, threads, activation_bits: as for `earnest.load`.
        add_bos_token: whether texts begin with the begin token; None: as the tokenizer says.
        prefix_token_id: what an empty context is taken for; None: the begin (or the end) token.
        max_gen_toks: new tokens where a task does not say.
        enable_thinking: told to the chat template, if given.
        think_end_token: text (or id) behind which the answer begins.
        chat_template_args: more variables for the chat template.
        seed: for tasks that sample; the same seed, the same answers.
        batch_size, max_batch_size, device: of no consequence, since `lm_eval` passes them unasked
            ("cuda:0" too): batches are made by the engine, and the processor runs them.

    Raises:
        UserError: not exactly one of `path` and `pretrained`.
        TokenizerError: the model has no tokenizer, or it names neither a begin nor an end token.
        ModelNotFoundError, CheckpointError, MachineError: as for `earnest.load`.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        pretrained: str | Path | None = None,
        runner: RunnerName = "auto",
        max_length: int | None = None,
        kv: KvType | None = None,
        threads: int | None = None,
        activation_bits: Literal[8, 15] | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        max_gen_toks: int = 256,
        enable_thinking: bool | None = None,
        think_end_token: str | int | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        seed: int = 1234,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if (path is None) == (pretrained is None):
            raise UserError(
                "--model earnest needs to know which model",
                expected="exactly one of path=... and pretrained=... in --model_args",
            )
        self._path = str(path if pretrained is None else pretrained)
        self._model: LanguageModel = load(
            self._path,
            runner=runner,
            max_context=max_length,
            kv=kv,
            threads=threads,
            activation_bits=activation_bits,
        )
        self._tokenizer: Tokenizer = self._model.tokenizer
        self._template: ChatTemplate | None = self._tokenizer.chat_template
        self._bos, self._eos = self._tokenizer.bos_id, self._named("eos_token")
        self._prefix_id = _integer(prefix_token_id, self._bos, self._eos)
        self._add_bos = add_bos_token
        self._max_gen_toks, self._seed = int(max_gen_toks), int(seed)
        if isinstance(think_end_token, str) and think_end_token.isdigit():
            think_end_token = int(think_end_token)
        self._think_end = think_end_token
        self._variables = dict(chat_template_args or {})
        if enable_thinking is not None:
            self._variables["enable_thinking"] = enable_thinking

    # --- what the harness asks about the model ----------------------------------------------------

    @property
    def max_length(self) -> int:
        """Tokens that the model is run on at most."""
        return self._model.max_context

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task does not say."""
        return self._max_gen_toks

    @property
    def eot_token_id(self) -> int | None:
        """What ends a text."""
        return self._eos

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is taken for."""
        return self._prefix_id

    @property
    def tokenizer_name(self) -> str:
        """Names the cache of prepared requests."""
        return self._path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the results say of the model."""
        from earnest import __version__

        return {
            "earnest_version": __version__,
            "earnest_runner": type(self._model.runner).__name__,
            "max_length": self.max_length,
        }

    # --- text -------------------------------------------------------------------------------------

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """The ids of a text. Unless told otherwise, it gets a begin token if the tokenizer says so
        (or `add_bos_token`), and it does not begin with one already."""
        add = add_special_tokens
        if add is None:
            begin = self._text_of(self._prefix_id)
            begun = begin != "" and string.startswith(begin)
            add = not begun and self._add_bos is not False
        ids = self._tokenizer.encode(string, add_special_tokens=add, parse_special=True)
        if add and self._add_bos and self._bos is not None and ids[:1] != [self._bos]:
            return [self._bos, *ids]
        return ids

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self._tokenizer.decode(tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template in use; a name chooses one of the model's.

        Raises:
            UserError: it has none of this name.
        """
        if not chat_template:
            return None
        if isinstance(chat_template, str):
            templates = self._tokenizer.chat_templates
            if chat_template not in templates:
                raise UserError(
                    "the model has no chat template of this name",
                    got=chat_template,
                    expected=", ".join(templates) or "it has none at all",
                )
            self._template = templates[chat_template]
        return "" if self._template is None else self._template.source

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; without `add_generation_prompt` it ends inside the last
        message, which the model is to go on with.

        Raises:
            ChatUnsupportedError: the model has no chat template.
            TemplateError: it refuses the conversation, also without its system message.
        """
        try:
            text = self._render(chat_history, add_generation_prompt)
        except TemplateError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            logger.warning("the chat template refuses the system message: it is left out")
            text = self._render(others, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].lstrip()
        start = text.rindex(last.rstrip())
        if not text.startswith(last, start):  # the template strips it
            last = last.rstrip()
        return text[: start + len(last)]

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return self._tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=add_generation_prompt,
            chat_template=self._template,
            **self._variables,
        )

    # --- scores -----------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: object,
    ) -> list[tuple[float, bool]]:
        """Of each (key, context, continuation): how likely the continuation is, and whether it is
        what greedy decoding gives. Requests that differ in the last token only are one."""
        same: dict[tuple[int, ...], list[int]] = {}
        for index, (_key, context, continuation) in enumerate(requests):
            same.setdefault(self._run_on(context, continuation), []).append(index)
        groups = list(same.items())
        asked = [
            {target for i in indices for target in _targets(len(prompt), requests[i][2])}
            for prompt, indices in groups
        ]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(
            total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests"
        ) as bar:
            scorings = [
                Request(
                    prompt, SamplingParams(max_tokens=0), reading=Scoring(tuple(sorted(targets)))
                )
                for (prompt, _), targets in zip(groups, asked, strict=True)
            ]
            for number, events in self._run(scorings):
                prompt, indices = groups[number]
                found = dict(zip(sorted(asked[number]), events[-1].scores or (), strict=True))
                for index in indices:
                    key, _context, continuation = requests[index]
                    answers[index] = _total(
                        [found[target] for target in _targets(len(prompt), continuation)]
                    )
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, answers[index])
                bar.update(len(indices))
        return answers

    def _run_on(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """The tokens that the model sees: all but the last, and of those the last `max_length`."""
        if not context or not 0 < len(continuation) <= self.max_length:
            raise PromptError(
                "a continuation cannot be scored",
                got=f"{len(context):,} tokens of context, {len(continuation):,} of continuation",
                expected=f"at least one of each, and at most {self.max_length:,} to be scored",
                remedy="raise max_length" if context and continuation else None,
            )
        whole = [*context, *continuation]
        if len(whole) > self.max_length + 1:
            logger.warning(
                "context and continuation are %d tokens, of which the model takes %d: the "
                "beginning is left out",
                len(whole),
                self.max_length + 1,
            )
        return tuple(whole[-(self.max_length + 1) :][:-1])

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """How likely whole texts are, in windows of `max_length` tokens, each token once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts: list[int] = []
        for request in requests:
            found = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [utils.make_disjoint_window(window) for window in found]
            windows += [(None, context, continuation) for context, continuation in pairs]
            counts.append(len(pairs))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals: list[float] = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(sum(next(scores)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    # --- text that goes on ------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts, greedily unless told otherwise, up to one of the `until` strings."""
        asked = [self._generation(number, *request.args) for number, request in enumerate(requests)]
        texts = [""] * len(requests)
        with tqdm(
            total=len(requests), disable=disable_tqdm, desc="Running generate_until requests"
        ) as bar:
            for number, events in self._run([request for request, _ in asked]):
                ids = [event.token_id for event in events if event.token_id is not None]
                texts[number] = self._answer(ids, asked[number][1])
                self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
                bar.update(1)
        return texts

    def _generation(
        self, number: int, context: str, given: Mapping[str, Any]
    ) -> tuple[Request, list[str]]:
        """The request, and what its text ends before."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), self.max_gen_toks))
        eos = None if self._eos is None else self._text_of(self._eos)
        until = [text for text in handle_stop_sequences(options.pop("until"), eos=eos) if text]
        new = options.pop("max_gen_toks")
        if new >= self.max_length:
            raise UserError(
                "a task asks for more new tokens than the context holds",
                got=f"{new:,}",
                expected=f"fewer than {self.max_length:,}",
                remedy="lower it with --gen_kwargs max_gen_toks=..., or raise max_length",
            )
        temperature = options.pop("temperature", None)
        if not options.pop("do_sample"):
            temperature = 0.0
        chosen = {_SAMPLING[name]: options.pop(name) for name in _SAMPLING.keys() & options.keys()}
        if options:
            raise UserError(
                "generation arguments that --model earnest does not have",
                got=", ".join(sorted(options)),
                expected=", ".join(
                    ("until", "max_gen_toks", "do_sample", "temperature", *_SAMPLING)
                ),
            )
        special = {text: token for text in until if (token := self._special(text)) is not None}
        sampling = SamplingParams(
            max_tokens=new,
            temperature=1.0 if temperature is None else float(temperature),
            stop=tuple(text for text in until if text not in special),
            stop_token_ids=tuple(special.values()),
            seed=self._seed + number,
            **chosen,
        )
        ids = self.tok_encode(context)[-(self.max_length - new) :]
        return Request(tuple(ids), sampling), until

    def _answer(self, ids: list[int], until: list[str]) -> str:
        end = self._think_end
        if isinstance(end, int) and end in ids:
            ids = ids[len(ids) - ids[::-1].index(end) :]
            text = self.tok_decode(ids).lstrip()
        else:
            text = self.tok_decode(ids)
        found: str = postprocess_generated_text(
            generation=text, stop=until, think_end_token=end if isinstance(end, str) else None
        )
        return found

    # --- the engine -------------------------------------------------------------------------------

    def _run(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[TokenEvent]]]:
        return run_all(self._model.engine, requests, block_size=self._model.runner.block_size)

    def _text_of(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def _special(self, text: str) -> int | None:
        """The special token that is written so; None: it is ordinary text."""
        tokens = self._tokenizer.encode(text, parse_special=True)
        special = [token for token in tokens if self._tokenizer.is_special(token)]
        return special[0] if len(special) == 1 and self._text_of(special[0]) == text else None

    def _named(self, name: str) -> int | None:
        text = self._tokenizer.special_tokens.get(name)
        return None if text is None else self._special(text)


def _integer(*candidates: int | None) -> int:
    for candidate in candidates:
        if candidate is not None:
            return int(candidate)
    raise TokenizerError(
        "the tokenizer names neither a begin nor an end token, so nothing can stand for an empty "
        "context",
        remedy="pass prefix_token_id=... in --model_args",
    )


def _targets(length: int, continuation: Sequence[int]) -> list[tuple[int, int]]:
    """(position, token) of a continuation whose last token comes behind a prompt so long."""
    return list(enumerate(continuation, length + 1 - len(continuation)))


def _total(scores: Sequence[Score]) -> tuple[float, bool]:
    return sum(score.logprob for score in scores), all(score.greedy for score in scores)
