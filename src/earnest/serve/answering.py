"""From a question in any interface's words to a stream of pieces: the part they all share."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence, Set
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from earnest.engine import Request, SamplingParams, TokenEvent
from earnest.engine.constraint import Constraint
from earnest.errors import ChatUnsupportedError, GrammarError, PromptError
from earnest.serve.blocks import Block, Blocks
from earnest.serve.constraints import Banned, ThinkingBudget
from earnest.serve.formats import Delta, Form, OutputParser, calls_schema, form_of, with_tools
from earnest.serve.journal import current
from earnest.serve.metrics import Finish
from earnest.serve.state import Served
from earnest.serve.strict_calls import StrictCalls
from earnest.tokenizer.vocabulary import is_unicode

MakeConstraint = Callable[[], Constraint]
# Turns the grammar of the answer into that of the text, which may begin with thoughts.
MakeGrammar = Callable[[], str]


@dataclass(frozen=True)
class Ask:
    """What is to be written.

    Attributes:
        prompt_ids: what it goes on from.
        sampling: how.
        count: answers.
        parser: reads thoughts and calls out of the text; None: it is only text.
        constraint: what the text must follow.
        salt: only requests of the same salt, and of the same tenant, share computed prefixes.
        priority: the lower, the sooner.
        one_call: end after the first call of a tool.
        loose: names of tools that were to be strict by default, and cannot.
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    count: int = 1
    parser: Callable[[], OutputParser] | None = None
    constraint: MakeConstraint | None = None
    salt: bytes = b""
    priority: int = 0
    one_call: bool = False
    loose: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Piece:
    """What came with one token.

    Attributes:
        which: of the answers.
        event: the token.
        deltas: what it means.
        finish: set on the last piece of an answer.
    """

    which: int
    event: TokenEvent
    deltas: list[Delta]
    finish: Finish | None = None


@dataclass
class Usage:
    """Tokens of a request, as they are counted."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0

    def count(self, piece: Piece) -> None:
        """Take a piece into account."""
        if piece.event.token_id is not None:
            self.completion += 1
            self.reasoning += any(delta.reasoning for delta in piece.deltas)
        if piece.event.cached_tokens and piece.which == 0:
            self.cached += piece.event.cached_tokens


@dataclass
class Answer:
    """Everything of one answer, collected."""

    blocks: Blocks = field(default_factory=Blocks)
    events: list[TokenEvent] = field(default_factory=list)
    finish: Finish | None = None

    def take(self, piece: Piece) -> None:
        """The next piece."""
        self.events.append(piece.event)
        self.finish = piece.finish
        self.blocks.take(piece.deltas)

    @property
    def content(self) -> str:
        """All that is neither thoughts nor calls."""
        return "".join(block.text for block in self.blocks.all if block.kind == "text")

    @property
    def reasoning(self) -> str:
        """All thoughts."""
        return "".join(block.text for block in self.blocks.all if block.kind == "thoughts")

    @property
    def calls(self) -> list[Block]:
        """Calls of tools."""
        return [block for block in self.blocks.all if block.kind == "call"]


async def answers(served: Served, ask: Ask) -> AsyncGenerator[Piece, None]:
    """Have it written; leaving the loop gives up the rest."""
    requests = [
        Request(
            ask.prompt_ids,
            _seeded(ask.sampling, which),
            priority=ask.priority,
            salt=current().tenant + ask.salt,
            constraint=ask.constraint,
        )
        for which in range(ask.count)
    ]
    record = current()
    record.asks(served.name, len(ask.prompt_ids), ask.sampling, ask.count)
    parsers = [ask.parser() if ask.parser else None for _ in requests]
    watches = [served.metrics.clock() for _ in requests]
    left = set(range(ask.count))
    stream = served.service.stream(requests, timeout=served.limits.request_seconds)
    async with aclosing(stream):
        async for which, event in stream:
            if which not in left:
                continue
            parser, finish = parsers[which], None
            if parser is None:
                deltas = [Delta(content=event.text)] if event.text else []
            else:
                deltas = parser.push(event.text)
                if event.finish_reason is not None:
                    deltas += parser.finish()
            if event.finish_reason is not None:
                finish = _finish(event, parser)
            elif ask.one_call and any(
                delta.call is not None and delta.call > 0 for delta in deltas
            ):
                deltas = [d for d in deltas if not d.call]
                finish = "tool_calls"
            now = watches[which].token(event, finish)
            record.took(which, event, now, finish)
            yield Piece(which, event, deltas, finish)
            if finish is not None:
                left.discard(which)
            if not left:
                return


async def collected(served: Served, ask: Ask) -> tuple[list[Answer], Usage]:
    """All answers, when they are complete."""
    found = [Answer() for _ in range(ask.count)]
    usage = Usage(prompt=len(ask.prompt_ids))
    async with aclosing(answers(served, ask)) as stream:
        async for piece in stream:
            usage.count(piece)
            found[piece.which].take(piece)
    return found, usage


def _seeded(sampling: SamplingParams, which: int) -> SamplingParams:
    if sampling.seed is None or which == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + which) % 2**64)


def _finish(event: TokenEvent, parser: OutputParser | None) -> Finish:
    if event.finish_reason == "length":
        return "length"
    return "tool_calls" if parser is not None and parser.called else "stop"


# --- conversations ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Talk:
    """A conversation to go on with, in the words of OpenAI's interface.

    Attributes:
        messages: oldest first; tool calls have their arguments as objects.
        tools: descriptions of functions.
        tool_choice: "auto", "none", "required", or the name of one.
        parallel_calls: whether an answer may call several tools.
        strict: names of the tools whose calls follow their parameters' schema, however they come.
        strict_by_default: the same, unless no grammar can follow their schema.
        variables: more variables for the template.
        grammar: of the answer; None: it is free.
        thinking_tokens: most tokens of thoughts; None: as many as it takes.
        bad_words: texts that must not be written.
    """

    messages: Sequence[Mapping[str, Any]]
    sampling: SamplingParams
    count: int = 1
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str = "auto"
    parallel_calls: bool = True
    strict: frozenset[str] = frozenset()
    strict_by_default: frozenset[str] = frozenset()
    variables: Mapping[str, Any] = field(default_factory=dict)
    grammar: MakeGrammar | None = None
    thinking_tokens: int | None = None
    bad_words: Sequence[str] = ()
    salt: bytes = b""
    priority: int = 0


def ask_of(served: Served, talk: Talk) -> Ask:
    """What a conversation asks the model to write.

    Raises:
        ChatUnsupportedError, TemplateError, PromptError, GrammarError: see there.
    """
    template = served.model.tokenizer.chat_template
    if template is None:
        raise ChatUnsupportedError(
            "this model has no chat format: it is a Base model, which continues text",
            remedy="use /v1/completions, or serve a post-trained model",
        )
    tools = [] if talk.tool_choice == "none" else _chosen(talk)
    messages, known = list(talk.messages), form_of(template.source)
    if tools and not known.takes_tools:
        messages = list(with_tools(messages, tools))
    given = tools if tools and known.takes_tools else None
    ids = served.model.chat_ids(messages, tools=given, **talk.variables)
    tail = served.model.tokenizer.decode(ids[-16:], skip_special_tokens=False)
    form = form_of(template.source, tail)
    constraint, loose = _constraint(served, talk, tools, form)
    return Ask(
        prompt_ids=tuple(ids),
        sampling=replace(talk.sampling, skip_special_tokens=False)
        if known.takes_tools
        else talk.sampling,
        count=talk.count,
        parser=lambda: OutputParser(thinks=form.thinks, tools=bool(tools)),
        constraint=constraint,
        salt=talk.salt,
        priority=talk.priority,
        one_call=not talk.parallel_calls,
        loose=loose,
    )


def _chosen(talk: Talk) -> list[Mapping[str, Any]]:
    if talk.tool_choice in ("auto", "required"):
        if talk.tool_choice == "required" and not talk.tools:
            raise PromptError("tool_choice asks for a tool, and there are none")
        return list(talk.tools)
    named = [tool for tool in talk.tools if tool["function"]["name"] == talk.tool_choice]
    if not named:
        raise PromptError(
            "tool_choice names a tool that is not there",
            got=talk.tool_choice,
            expected=", ".join(tool["function"]["name"] for tool in talk.tools) or "no tools given",
        )
    return named


def _constraint(
    served: Served, talk: Talk, tools: Sequence[Mapping[str, Any]], form: Form
) -> tuple[MakeConstraint | None, frozenset[str]]:
    """What the text must follow, and the tools that are `Ask.loose`."""
    grammar: str | None = None
    loose = frozenset[str]()
    if tools and talk.tool_choice != "auto":
        schema = calls_schema(tools, form, several=talk.parallel_calls)
        several = talk.parallel_calls and form.takes_tools
        grammar = served.grammars.calls(schema, several=several)
    elif talk.grammar is not None:
        grammar = talk.grammar()
    if grammar is not None and form.thinks:
        grammar = served.grammars.after_thinking(grammar)
    made = None if grammar is None else served.grammars.constraint(grammar)
    if made is None:
        made, loose = _strict(served, talk, tools, form)
    if talk.thinking_tokens is not None and form.thinks:
        made = _thinking(served, talk.thinking_tokens, made)
    return banning(served, talk.bad_words, made), loose


# Tools whose schemas are looked at one by one, to find those that cannot be followed.
_MOST_TRIED = 64


def _strict(
    served: Served, talk: Talk, tools: Sequence[Mapping[str, Any]], form: Form
) -> tuple[MakeConstraint | None, frozenset[str]]:
    """Calls are not asked for; if they come, they are of a known tool and follow its schema where
    it is strict. Returns the tools that are `Ask.loose`, too."""
    there = frozenset(map(_name, tools))
    asked = talk.strict & there
    wanted = asked | (talk.strict_by_default & there)

    def calls_of(strict: Set[str], of: Sequence[Mapping[str, Any]]) -> MakeConstraint | None:
        if not strict:
            return None
        followed = [t if _name(t) in strict else {"function": {"name": _name(t)}} for t in of]
        schema = calls_schema(followed, form, several=talk.parallel_calls)
        return served.grammars.constraint(served.grammars.call(schema))

    def able(tool: Mapping[str, Any]) -> bool:
        name = _name(tool)
        try:
            return calls_of(wanted & {name}, [tool]) is not None
        except GrammarError as error:
            if name not in asked:
                return False
            problem = f"the tool {name} cannot be strict: {error.problem}"
            raise GrammarError(problem, got=error.got, expected=error.expected) from error

    def attempts() -> Iterator[frozenset[str]]:
        yield wanted
        if len(tools) <= _MOST_TRIED:
            yield frozenset(_name(tool) for tool in tools if able(tool))
        yield asked

    for strict in attempts():
        try:
            inside = calls_of(strict, tools)
        except GrammarError as error:
            problem = error
        else:
            break
    else:
        raise problem
    if inside is None:
        return None, wanted
    overruns, pieces, make = served.overruns, served.pieces, inside
    return lambda: StrictCalls(make, overruns, pieces, thinks=form.thinks), wanted - strict


def _name(tool: Mapping[str, Any]) -> str:
    return str(tool["function"]["name"])


def _thinking(served: Served, most: int, other: MakeConstraint | None) -> MakeConstraint:
    closing = served.grammars.spelled("\n</think>\n")
    vocab_size = served.model.config.vocab_size

    def make() -> Constraint:
        inner = None if other is None else other()
        return ThinkingBudget(most, closing, served.pieces, b"</think>", vocab_size, inner)

    return make


def banning(
    served: Served, words: Sequence[str], other: MakeConstraint | None
) -> MakeConstraint | None:
    """`other`, and none of `words`, at the beginning of a text or after a space."""
    if not words:
        return other
    if not all(words):
        raise PromptError("bad_words holds an empty text")
    if not all(map(is_unicode, words)):
        raise PromptError("bad_words holds half of a surrogate pair")
    if len(words) > served.limits.texts:
        raise PromptError("bad_words holds too many", expected=f"at most {served.limits.texts:,}")
    encode, spelled = served.model.tokenizer.encode, served.grammars.spelled
    runs = [
        ids
        for word in words
        for text in (word, f" {word}")
        for ids in (encode(text, add_special_tokens=False, parse_special=False), spelled(text))
        if ids
    ]
    vocab_size = served.model.config.vocab_size
    return lambda: Banned(runs, vocab_size, None if other is None else other())
