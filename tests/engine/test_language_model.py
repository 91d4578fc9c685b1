"""The object that `load` returns: prompts, streams, chats, logits and routing, and real text."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_runner import (
    BOS,
    EOS,
    VOCAB,
    FakeRunner,
    FakeTokenizer,
    hashed_logits,
    tiny_config,
)

import earnest
from earnest import compiled, env, hub
from earnest.checkpoint import open_checkpoint
from earnest.engine import LanguageModel, SamplingParams, load
from earnest.engine.language_model import BLOCK_SIZE, _plan_context
from earnest.errors import (
    ChatUnsupportedError,
    CheckpointError,
    MemoryBudgetError,
    MissingPackageError,
    ModelNotFoundError,
    PromptError,
    SamplingError,
    TokenizerError,
    UserError,
)
from earnest.runners.native import isa
from earnest.runners.native.runner import NativeRunner, kv_bytes_per_token
from earnest.runners.reference import ReferenceRunner

PARAMS = SamplingParams(max_tokens=12, seed=11, ignore_eos=True)


def fake_model(
    runner: FakeRunner | None = None, tokenizer: FakeTokenizer | None = None, **options: Any
) -> LanguageModel:
    runner = runner or FakeRunner()
    checkpoint = SimpleNamespace(
        path=Path("fake"),
        config=runner.config,
        tokenizer=tokenizer or FakeTokenizer(),
        generation_config={},
    )
    return LanguageModel(checkpoint, runner, **options)  # type: ignore[arg-type]


def idle(model: LanguageModel) -> bool:
    model._engine.blocks.check_idle()
    return not model._engine.has_work and not model._arrived


def test_text_and_ids_are_the_same_prompt() -> None:
    model = fake_model()
    by_text, by_ids = model.generate("abc", PARAMS), model.generate([2, 3, 6], PARAMS)
    assert by_text.token_ids == by_ids.token_ids and len(by_text.token_ids) == 12
    assert by_text.prompt_token_ids == [2, 3, 6]
    assert by_text.text == FakeTokenizer().decode(by_text.token_ids)
    assert by_text.finish_reason == "length"
    assert by_text.logprobs is None and by_text.prompt_logprobs is None
    assert by_text.prompt_seconds >= 0 and by_text.decode_seconds >= 0
    for ids in ((2, 3, 6), np.array([2, 3, 6]), range(2, 3)):
        assert len(model.generate(ids, PARAMS).token_ids) == 12  # type: ignore[call-overload]
    assert idle(model)


def test_a_list_of_prompts_runs_together() -> None:
    runner = FakeRunner()
    model = fake_model(runner)
    together = model.generate(["abc", [3, 2, 2], "c"], PARAMS)
    assert max(len(batch.sequence_starts) - 1 for batch in runner.batches) == 3
    alone = [model.generate(p, PARAMS) for p in ("abc", [3, 2, 2], "c")]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [c.text for c in together] == [c.text for c in alone]
    assert idle(model)


def test_one_bad_prompt_stops_all_before_anything_runs() -> None:
    runner = FakeRunner()
    model = fake_model(runner)
    with pytest.raises(PromptError):
        model.generate(["abc", [VOCAB]], PARAMS)
    assert not runner.batches and idle(model)


def test_logprobs_are_handed_on() -> None:
    model = fake_model()
    params = SamplingParams(max_tokens=5, seed=1, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    completion = model.generate([2, 3, 4], params)
    assert completion.logprobs is not None and completion.prompt_logprobs is not None
    assert [entry.token_id for entry in completion.logprobs] == completion.token_ids
    assert completion.prompt_logprobs[0] is None
    row = hashed_logits([2, 3]).astype(np.float64)
    expected = row[4] - np.logaddexp.reduce(row)
    assert completion.prompt_logprobs[2] is not None
    assert completion.prompt_logprobs[2].logprob == pytest.approx(expected, abs=1e-9)


def test_no_tokens_but_a_score() -> None:
    completion = fake_model().generate([2, 3], SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert completion.token_ids == [] and completion.text == ""
    assert completion.prompt_logprobs is not None and len(completion.prompt_logprobs) == 2


def test_stream_is_generate_in_pieces() -> None:
    model = fake_model()
    events = list(model.stream("abc", PARAMS))
    whole = model.generate("abc", PARAMS)
    assert "".join(event.text for event in events) == whole.text
    assert [event.token_id for event in events] == whole.token_ids
    assert [event.finish_reason for event in events] == [None] * 11 + ["length"]
    assert idle(model)


def test_a_stream_is_checked_at_once_but_costs_nothing_until_read() -> None:
    runner = FakeRunner()
    model = fake_model(runner)
    with pytest.raises(PromptError):
        model.stream([VOCAB], PARAMS)
    with pytest.raises(SamplingError):
        model.stream([2], SamplingParams(logit_bias={VOCAB: 1.0}))
    unread = model.stream("abc", PARAMS)
    assert idle(model)
    unread.close()
    assert not runner.batches


@pytest.mark.parametrize("how", ["close", "garbage", "interrupt"])
def test_leaving_a_stream_frees_what_it_holds(how: str) -> None:
    runner = FakeRunner()
    model = fake_model(runner)
    stream = model.stream("abc", PARAMS)
    for _ in range(3):
        next(stream)
    assert not idle_quietly(model)
    if how == "close":
        stream.close()
    elif how == "garbage":
        del stream
    else:
        runner.step = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        del runner.step
    assert idle(model)
    assert len(model.generate("abc", PARAMS).token_ids) == 12


@pytest.mark.timeout(30)
def test_a_stream_may_be_closed_in_the_middle_of_a_step_of_another() -> None:
    """As the garbage collector does to a stream that was left in a reference cycle."""
    runner = FakeRunner()
    model = fake_model(runner)
    expected = model.generate("abc", PARAMS).text
    left, read = model.stream("b", PARAMS), model.stream("abc", PARAMS)
    next(left)
    text, honest = next(read).text, runner.step

    def closing(*args: Any) -> Any:
        left.close()
        return honest(*args)

    runner.step = closing  # type: ignore[method-assign]
    text += "".join(event.text for event in read)
    assert text == expected and idle(model)


def idle_quietly(model: LanguageModel) -> bool:
    try:
        return idle(model)
    except RuntimeError:
        return False


def interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_an_error_ends_a_stream_and_frees_it() -> None:
    def logits(history: Any, vocab_size: int) -> Any:
        row = hashed_logits(history, vocab_size)
        return row * np.nan if len(history) == 6 else row

    model = fake_model(FakeRunner(logits=logits))
    stream = model.stream("abc", PARAMS)
    with pytest.raises(CheckpointError, match="not finite"):
        list(stream)
    assert idle(model)


def test_streams_read_in_turn_share_batches() -> None:
    runner = FakeRunner()
    model = fake_model(runner)
    streams = [model.stream(prompt, PARAMS) for prompt in ("abc", "b", "ca")]
    texts = ["", "", ""]
    for events in zip(*streams, strict=True):
        for number, event in enumerate(events):
            texts[number] += event.text
    assert texts == [model.generate(p, PARAMS).text for p in ("abc", "b", "ca")]
    assert idle(model)


def test_threads_may_share_a_model() -> None:
    model = fake_model()
    prompts = [[2 + n % 9, 3] for n in range(12)]
    found: dict[int, list[int]] = {}

    def work(number: int) -> None:
        found[number] = model.generate(prompts[number], PARAMS).token_ids
        model.logits(prompts[number])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert idle(model)
    assert [found[n] for n in range(12)] == [c.token_ids for c in model.generate(prompts, PARAMS)]


@pytest.mark.parametrize("length", [1, 5, 64])
def test_logits_of_every_position(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("earnest.engine.language_model._CHUNK_TOKENS", 7)
    model, ids = fake_model(), [2 + n % 10 for n in range(length)]
    logits = model.logits(ids)
    assert logits.dtype == np.float32 and logits.shape == (length, VOCAB)
    for row in range(length):
        assert (logits[row] == hashed_logits(ids[: row + 1])).all()
    assert (model.logits(np.array(ids)) == logits).all()
    assert idle(model)


def test_logits_within_memory_and_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("earnest.env.free_memory", lambda: 2 * 4 * VOCAB * 10)
    model = fake_model()
    assert model.logits([2] * 10).shape == (10, VOCAB)
    with pytest.raises(MemoryBudgetError, match="prompt_logprobs"):
        model.logits([2] * 11)
    for bad in ([], [VOCAB], [2.0], [2] * 65):
        with pytest.raises(PromptError):
            model.logits(bad)  # type: ignore[arg-type]
    assert idle(model)


def test_logits_beside_a_stream_that_holds_everything() -> None:
    model = fake_model(FakeRunner(num_blocks=16))
    params = SamplingParams(max_tokens=None, ignore_eos=True, seed=3)
    stream = model.stream([2] * 60, params)
    text = next(stream).text
    assert model.logits([2] * 64).shape == (64, VOCAB)  # the stream has to wait, and goes on
    text += "".join(event.text for event in stream)
    assert text == model.generate([2] * 60, params).text
    assert idle(model)


def test_routing_joins_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("earnest.engine.language_model._CHUNK_TOKENS", 4)
    runner = FakeRunner(config=tiny_config(experts=4))
    ids = [2, 3, 4, 5, 6, 7, 8, 2, 2]
    ((experts, weights),) = fake_model(runner).routing(ids)
    assert experts.shape == weights.shape == (9, 2)
    assert experts.tolist() == [[i % 2, 2 + i % 2] for i in ids]
    assert experts.dtype == np.int32 and weights.dtype == np.float32
    assert all(len(batch.logits_rows) == 0 for batch in runner.batches)
    assert fake_model().routing(ids) == []


@pytest.mark.parametrize("prompt", ["", [], ()])
def test_empty_prompts(prompt: Any) -> None:
    tokenizer = FakeTokenizer()
    tokenizer.bos_id = None
    with pytest.raises(PromptError, match="empty"):
        fake_model(tokenizer=tokenizer).generate(prompt, PARAMS)


def test_an_empty_text_begins_with_the_beginning_of_text() -> None:
    assert fake_model().generate("", PARAMS).prompt_token_ids == [BOS]


@pytest.mark.parametrize("prompt", [None, 3, ["a", 3], {"a": 1}, [[2.5]], [None]])
def test_things_that_are_no_prompts(prompt: Any) -> None:
    with pytest.raises(PromptError):
        fake_model().generate(prompt, PARAMS)
    with pytest.raises(PromptError):
        fake_model().stream(prompt, PARAMS)


def test_chat() -> None:
    tokenizer = FakeTokenizer()
    model = fake_model(tokenizer=tokenizer)
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    for call in (model.chat, model.stream_chat):
        with pytest.raises(ChatUnsupportedError, match="Base"):
            call(messages, PARAMS)
    tokenizer.chat_template = object()
    answer = model.chat(messages, PARAMS)
    assert answer.prompt_token_ids == [2, 3, 6]
    assert "".join(event.text for event in model.stream_chat(messages, PARAMS)) == answer.text


def test_a_model_without_a_tokenizer_takes_ids_and_says_so() -> None:
    class Nameless(SimpleNamespace):
        @property
        def tokenizer(self) -> Any:
            raise TokenizerError("there is no tokenizer here")

    runner, said = FakeRunner(), list[str]()
    checkpoint = Nameless(path=Path("fake"), config=runner.config, generation_config={})
    model = LanguageModel(checkpoint, runner, notice=said.append)  # type: ignore[arg-type]
    assert len(said) == 1 and "no tokenizer here" in said[0]
    completion = model.generate([2, 3], PARAMS)
    assert len(completion.token_ids) == 12 and completion.text == ""
    for call in (lambda: model.generate("ab"), lambda: model.chat([])):
        with pytest.raises(TokenizerError):
            call()


@pytest.mark.parametrize(
    ("positions", "asked", "room", "context"),
    [
        (512, None, 2**40, 512),  # all the model can
        (131_072, None, 64 * 1000, 1000),  # what there is room for
        (131_072, None, 0, BLOCK_SIZE),  # never nothing
        (131_072, 100_000, 0, 100_000),  # as asked; the runner sees whether it fits
        (131_072, 1, 2**40, 1),
    ],
)
def test_how_long_the_context_is(
    positions: int, asked: int | None, room: int, context: int
) -> None:
    found, num_blocks = _plan_context(tiny_config(context=positions), asked, room, 64)
    assert found == context
    assert context <= num_blocks * BLOCK_SIZE <= 4 * context + BLOCK_SIZE


@pytest.mark.parametrize("asked", [0, -1, 513])
def test_contexts_that_are_refused(asked: int) -> None:
    with pytest.raises(UserError, match=r"max_context \(--context "):
        _plan_context(tiny_config(context=512), asked, 2**30, 64)


# --- real models -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def goldens(shared: Path) -> dict[str, Any]:
    path = shared / "data" / "goldens" / "stories260k.json"
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=["reference", "native"])
def stories_ids(shared: Path, request: pytest.FixtureRequest) -> LanguageModel:
    """The published weights; their folder has no tokenizer of a known kind."""
    if request.param == "native" and not isa.installed():
        pytest.skip("the compiled kernels are not built")
    return load(shared / "data" / "models" / "stories260k-ernie", runner=request.param)


@pytest.fixture
def off(stories_ids: LanguageModel) -> float:
    """How far logits may be from the published ones. Keys and values of the native runner are
    integers of 16 bits, and activations are rounded to 15."""
    return 1e-4 if isinstance(stories_ids.runner, ReferenceRunner) else 0.03


@pytest.fixture(scope="module", params=["reference", "native"])
def stories(request: pytest.FixtureRequest) -> LanguageModel:
    """The built-in model, which ships with its tokenizer."""
    if request.param == "native" and not isa.installed():
        pytest.skip("the compiled kernels are not built")
    return load("stories", runner=request.param)


def test_published_ids(stories_ids: LanguageModel, goldens: dict[str, Any]) -> None:
    golden = goldens["greedy_ids_from_bos"]
    params = SamplingParams(temperature=0, max_tokens=len(golden) - 1)
    assert stories_ids.generate(golden[:1], params).token_ids == golden[1:]


def test_published_continuations(stories_ids: LanguageModel, goldens: dict[str, Any]) -> None:
    cases = goldens["cases"]
    params = SamplingParams(temperature=0, max_tokens=32)
    found = stories_ids.generate([case["ids"] for case in cases], params)
    assert [c.token_ids for c in found] == [case["greedy_next_32"] for case in cases]


def test_published_logits(stories_ids: LanguageModel, goldens: dict[str, Any], off: float) -> None:
    for case in goldens["cases"]:
        row = stories_ids.logits(case["ids"])[-1]
        assert np.abs(row - case["last_logits"]).max() < off


def test_published_logprobs(
    stories_ids: LanguageModel, goldens: dict[str, Any], off: float
) -> None:
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    for case in goldens["cases"]:
        found = stories_ids.generate(case["ids"], params).prompt_logprobs
        assert found is not None and found[0] is None
        values = [entry.logprob for entry in found if entry is not None]
        assert values == pytest.approx(case["logprob_of_each_next_prompt_token"], abs=off)


def test_published_text(stories: LanguageModel, goldens: dict[str, Any]) -> None:
    ids = goldens["greedy_ids_from_bos"]
    params = SamplingParams(temperature=0, max_tokens=len(ids) - 1)
    completion = stories.generate("", params)
    assert completion.token_ids == ids[1:]
    assert completion.text == goldens["published_greedy_text_200_steps"]


def test_prompt_and_completion_join(stories: LanguageModel, goldens: dict[str, Any]) -> None:
    text = goldens["published_greedy_text_200_steps"]
    prompt = text[: text.index(" named")]
    completion = stories.generate(prompt, SamplingParams(temperature=0, max_tokens=100))
    assert text.startswith(prompt + completion.text)
    stopped = stories.generate(
        prompt, SamplingParams(temperature=0, max_tokens=100, stop=("red ball", "nothing"))
    )
    assert prompt + stopped.text == text[: text.index("red ball")]
    assert stopped.finish_reason == "stop"


def test_stories_goes_on_to_the_end_of_its_context(stories: LanguageModel) -> None:
    params = SamplingParams(max_tokens=None, seed=1, ignore_eos=True)
    completion = stories.generate("Once upon a time", params)
    assert len(completion.prompt_token_ids) + len(completion.token_ids) == stories.max_context
    assert completion.finish_reason == "length"


def test_stories_has_no_chat(stories: LanguageModel) -> None:
    with pytest.raises(ChatUnsupportedError):
        stories.chat([{"role": "user", "content": "Hello"}])


def test_seeds_are_reproducible(stories: LanguageModel) -> None:
    params = SamplingParams(max_tokens=40, seed=77, temperature=1.3, top_p=0.95)
    one, other, batched = (
        stories.generate("Once", params),
        stories.generate("Once", params),
        stories.generate(["The dog", "Once", "A"], params)[1],
    )
    assert one.text == other.text == batched.text


def test_a_path_is_not_a_built_in_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError):
        load(Path("stories"))


def test_a_context_that_does_not_fit_is_said() -> None:
    said = list[str]()
    # 64 positions of 5 layers with 32 float32 keys and values, and as much again for weights.
    budget = 2 * 64 * 5 * 2 * 32 * 4
    model = load("stories", runner="reference", memory_budget=budget, notice=said.append)
    assert model.max_context == 64 and len(said) == 1 and "64 of 512" in said[0]
    assert "max_context (--context on the command line) sets another" in said[0]
    with pytest.raises(PromptError, match="max_context"):
        model.generate([5] * 64, PARAMS)
    ids = list(range(260, 320))
    whole = load("stories", runner="reference").logits(ids)
    assert np.abs(model.logits(ids[:8]) - whole[:8]).max() < 1e-4
    assert load("stories", max_context=512, memory_budget=0).max_context == 512


# --- which runner, and what it may take ---------------------------------------------------------

needs_kernels = pytest.mark.skipif(not isa.installed(), reason="the compiled kernels are not built")


@needs_kernels
def test_the_native_runner_is_the_default(recwarn: pytest.WarningsRecorder) -> None:
    assert isinstance(load("stories").runner, NativeRunner)
    assert isinstance(load("stories", runner="auto").runner, NativeRunner)
    assert isinstance(load("stories", runner="reference").runner, ReferenceRunner)
    assert not recwarn.list


def test_without_kernels_the_reference_runs_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled, "module", lambda: None)
    isa.warn_without_kernels.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"install a C\+\+ compiler") as said:
            # What only the native runner can do is asked for in vain, and harms nobody.
            models = [load("stories", kv="bf16", threads=2), load("stories")]
        assert len(said) == 1
        assert all(isinstance(model.runner, ReferenceRunner) for model in models)
        with pytest.raises(MissingPackageError, match="compiler"):
            load("stories", runner="native")
    finally:
        isa.warn_without_kernels.cache_clear()


def test_runners_and_options_that_there_are_not() -> None:
    with pytest.raises(UserError, match="no such runner"):
        load("stories", runner="gpu")  # type: ignore[arg-type]
    for options in ({"kv": "f32"}, {"threads": 1}, {"activation_bits": 8}, {"lock": True}):
        with pytest.raises(UserError, match="options of the native runner"):
            load("stories", runner="reference", **options)  # type: ignore[arg-type]


@needs_kernels
def test_options_reach_the_native_runner() -> None:
    ids = list(range(260, 320))
    logits = {
        (kv, bits): load("stories", kv=kv, activation_bits=bits, threads=1).logits(ids)
        for kv, bits in [("f32", None), ("bf16", None), ("bf16", 8)]
    }
    exact = load("stories", runner="reference").logits(ids)
    off = {key: np.abs(found - exact).max() for key, found in logits.items()}
    assert off["f32", None] < 1e-4 < off["bf16", None] < 0.3
    # The weights are float32: no block codec, and so nothing that is rounded to 8 bits.
    np.testing.assert_array_equal(logits["bf16", 8], logits["bf16", None])
    for options in ({"kv": "f8"}, {"activation_bits": 0}, {"threads": 0}):
        with pytest.raises(UserError):
            load("stories", **options)  # type: ignore[arg-type]


@needs_kernels
def test_the_context_is_what_the_weights_leave_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native runner's keys and values share the free memory with its weights."""
    config = open_checkpoint(hub.locate("stories")).config
    per_token = kv_bytes_per_token(config)
    weights = load("stories").runner.weight_bytes  # type: ignore[attr-defined]
    monkeypatch.setattr(env, "free_memory", lambda: weights + 2 * 100 * per_token)
    said = list[str]()
    # What the scratch needs is not there: asked for nothing, the plan is made and then refused.
    with pytest.raises(MemoryBudgetError, match="scratch"):
        load("stories", memory_budget=2**40, notice=said.append)
    assert "the context is 100 of 512" in said[0]


@needs_kernels
def test_a_model_that_does_not_fit_is_refused_with_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(env, "free_memory", lambda: 500_000)
    with pytest.raises(MemoryBudgetError, match="GiB of weights") as refused:
        load("stories", notice=lambda _: None)
    assert "quantise" in str(refused.value)


def test_top_level_names() -> None:
    for name in earnest.__all__:
        assert getattr(earnest, name) is not None
        assert name in dir(earnest)
    with pytest.raises(AttributeError):
        _ = earnest.nonsense
    assert EOS == 0
