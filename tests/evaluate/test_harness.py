"""lm-evaluation-harness gets the same from `--model earnest`, from our server through its
`local-completions`, and from transformers through its `hf`, on the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from harbour import TEXTS

import earnest
from earnest.errors import PromptError, UserError

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from earnest.evaluate.harness import EarnestLM

sys.path.append(str(Path(__file__).parents[1] / "serve"))
from running import Server

from earnest.serve.state import Served

ENDINGS = (" the harbour.", " cat", ", and the ship", " a", " b", "\n\nNobody")
PAIRS = [(text, ending) for text in (*TEXTS, "", "the cat \n ", "<s>In") for ending in ENDINGS]
ROLLING = [(TEXTS[0],), ("the",), (" ".join(TEXTS[1:3]),)]
LONG = " ".join(TEXTS)
GENERATIONS: list[tuple[str, dict[str, Any]]] = [
    *((text, {"until": ["e", " ship\n"], "max_gen_toks": 24}) for text in TEXTS),
    (TEXTS[1], {"until": [" the", "<|end|>"], "max_gen_toks": 40, "do_sample": False}),
    (TEXTS[2], {"until": [], "max_gen_toks": 30, "temperature": 0.0}),
]

# Relative, and absolute in natural logarithms. The reference runner differs from torch by the order
# of float32 sums; the native one keeps keys and values in int16 and activations in 15 bits.
EXACT = {"rel": 1e-6, "abs": 1e-4}
NATIVE = {"rel": 5e-3, "abs": 5e-2}


def instances(kind: str, arguments: Sequence[Any]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=index)  # type: ignore[arg-type]
        for index, one in enumerate(arguments)
    ]


def scores(model: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    return model.loglikelihood(instances("loglikelihood", pairs))


def rolling(model: Any, texts: Sequence[tuple[str]]) -> list[float]:
    return model.loglikelihood_rolling(instances("loglikelihood_rolling", texts))


def generated(model: Any, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    return model.generate_until(instances("generate_until", asked))


def agree(
    ours: Sequence[tuple[float, bool]],
    theirs: Sequence[tuple[float, bool]],
    by: dict[str, float],
) -> None:
    assert len(ours) == len(theirs)
    for (a, a_greedy), (b, b_greedy) in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, **by)
        assert a_greedy == b_greedy


@pytest.fixture(scope="module")
def ours(model_folder: Path) -> EarnestLM:
    return EarnestLM(str(model_folder), runner="reference")


@pytest.fixture(scope="module")
def native(model_folder: Path) -> EarnestLM:
    return EarnestLM(pretrained=str(model_folder), runner="native", threads=1)


@pytest.fixture(scope="module")
def server(model_folder: Path) -> Iterator[Server]:
    running = Server(Served(earnest.load(model_folder, runner="reference"), "tiny"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def through_server(server: Server, model_folder: Path) -> Any:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model="tiny",
        tokenizer=str(model_folder),
        tokenizer_backend="huggingface",
        add_bos_token=True,
        num_concurrent=8,
        max_length=160,
    )


# --- against transformers -------------------------------------------------------------------------


def test_texts_become_the_same_ids_as_for_transformers(ours: EarnestLM, theirs: Any) -> None:
    for text in (*TEXTS, "<s>Once", "a  b ", "\n\nHi", "x</s>y", " "):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        for add in (False, True):
            assert ours.tok_encode(text, add) == theirs.tok_encode(text, add)
    assert ours.prefix_token_id == theirs.prefix_token_id
    assert ours.eot_token_id == theirs.eot_token_id
    assert ours.max_length == theirs.max_length


@pytest.mark.parametrize(
    "runner, by", [("ours", EXACT), ("native", NATIVE)], ids=["reference", "native"]
)
def test_continuations_are_as_likely_as_for_transformers(
    runner: str, by: dict[str, float], theirs: Any, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(runner)
    too_long = [(LONG, " the cat"), (LONG, " a"), (LONG, " " + TEXTS[0])]
    agree(scores(model, PAIRS + too_long), scores(theirs, PAIRS + too_long), by)
    # What greedy decoding gives is known to be just that, whatever stands before it.
    (text,) = generated(theirs, GENERATIONS[-1:])
    context = theirs.tok_encode(GENERATIONS[-1][0])
    ids = theirs.tok_encode(text, add_special_tokens=False)
    asked = [((str(n), ""), context + ids[:at], ids[at:n]) for at in (0, 3) for n in (4, 9)]
    asked += [(("x", ""), context, [*ids[:2], 7])]
    found = model._loglikelihood_tokens(asked)
    agree(found, theirs._loglikelihood_tokens(asked), by)


@pytest.mark.parametrize(
    "runner, by", [("ours", EXACT), ("native", NATIVE)], ids=["reference", "native"]
)
def test_whole_texts_are_as_likely_as_for_transformers(
    runner: str, by: dict[str, float], theirs: Any, request: pytest.FixtureRequest
) -> None:
    texts = [*ROLLING, (LONG,), (LONG * 2,)]  # the last ones take several windows
    found = rolling(request.getfixturevalue(runner), texts)
    assert found == pytest.approx(rolling(theirs, texts), **by)


@pytest.mark.parametrize("runner", ["ours", "native"])
def test_texts_go_on_as_for_transformers(
    runner: str, theirs: Any, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(runner)
    asked = [*GENERATIONS, (TEXTS[3], {"until": " the", "max_new_tokens": 20})]
    asked.append((LONG, {"until": ["q"], "max_gen_toks": 12}))  # loses its beginning
    found = generated(model, asked)
    assert found == generated(theirs, asked)
    assert any(found) and any(len(text) > 20 for text in found)


def test_published_questions_are_answered_as_by_transformers(
    ours: EarnestLM, native: EarnestLM, theirs: Any, shared: Path
) -> None:
    lines = (shared / "data/eval/arc_challenge_validation.jsonl").read_text("utf-8").splitlines()
    questions = [json.loads(line) for line in lines[:24]]
    pairs = [
        (f"Question: {asked['question']}\nAnswer:", f" {choice}")
        for asked in questions
        for choice in asked["choices"]["text"]
    ]
    expected = scores(theirs, pairs)
    agree(scores(ours, pairs), expected, EXACT)
    agree(scores(native, pairs), expected, NATIVE)


@pytest.mark.parametrize("opening", [True, False])
def test_conversations_are_written_as_by_transformers(
    opening: bool, ours: EarnestLM, theirs: Any
) -> None:
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Where is the cat? "},
    ]
    text = ours.apply_chat_template(talk, add_generation_prompt=opening)
    assert text == theirs.apply_chat_template(talk, add_generation_prompt=opening)
    assert text.endswith("assistant\n" if opening else "Where is the cat? ")
    assert ours.tok_encode(text) == theirs.tok_encode(text)  # one begin token, not two
    assert ours.tok_encode(text).count(ours.prefix_token_id) == 1
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.tokenizer_name


# --- through the server ---------------------------------------------------------------------------


def test_the_server_gives_the_same_through_local_completions(
    ours: EarnestLM, theirs: Any, through_server: Any
) -> None:
    pairs = [pair for pair in PAIRS if not pair[0].startswith("<s>")]  # it would add a second one
    found = scores(through_server, pairs)
    agree(found, scores(theirs, pairs), EXACT)
    agree(found, scores(ours, pairs), EXACT)
    assert rolling(through_server, ROLLING) == pytest.approx(rolling(theirs, ROLLING), **EXACT)
    assert generated(through_server, GENERATIONS) == generated(theirs, GENERATIONS)


def test_the_server_tells_local_completions_its_tokenizer(
    server: Server, model_folder: Path
) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    api = LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", model="tiny")
    assert api.tokenizer_backend == "remote"
    ours = EarnestLM(str(model_folder), runner="reference", add_bos_token=False)
    assert api.prefix_token_id == ours.prefix_token_id
    agree(scores(api, PAIRS[:12]), scores(ours, PAIRS[:12]), EXACT)


# --- how it is done -------------------------------------------------------------------------------


def test_what_requests_have_in_common_is_computed_once(model_folder: Path) -> None:
    model = EarnestLM(str(model_folder), runner="reference")
    context = " ".join(TEXTS[:2])
    asked = [(context, ending) for ending in ENDINGS] + [(context, " c"), (context, " d")]
    alone = [scores(EarnestLM(str(model_folder), runner="reference"), [pair])[0] for pair in asked]
    assert [value for value, _ in scores(model, asked)] == pytest.approx(
        [value for value, _ in alone], abs=1e-5
    )
    counters = model._model.engine.counters
    encoded = [model._encode_pair(*pair) for pair in asked]
    runs = {(*before, *after[:-1]) for before, after in encoded}
    assert 2 <= len(runs) <= len(asked) - 3  # endings that differ in the last token only are one
    whole_blocks = len(encoded[0][0]) // 32 * 32
    assert whole_blocks > 0
    assert counters.prompt_tokens == sum(map(len, runs))
    assert counters.cached_tokens == (len(runs) - 1) * whole_blocks
    model._model.engine.blocks.check_idle()


def test_native_scores_have_the_same_bits_alone_and_together(
    native: EarnestLM, model_folder: Path
) -> None:
    together = scores(native, PAIRS)
    alone = EarnestLM(str(model_folder), runner="native", threads=2)
    for index in range(0, len(PAIRS), 7):
        assert scores(alone, [PAIRS[index]])[0] == together[index]


def test_sampling_can_be_repeated_and_differs_between_repeats(model_folder: Path) -> None:
    asked = [(TEXTS[0], {"until": [], "max_gen_toks": 16, "do_sample": True, "temperature": 1.0})]
    first, again = (
        generated(EarnestLM(str(model_folder), runner="reference"), asked * 3) for _ in range(2)
    )
    assert first == again
    assert len(set(first)) == 3


def test_thoughts_are_left_out(model_folder: Path, ours: EarnestLM) -> None:
    (text,) = generated(ours, GENERATIONS[-1:])
    end = text[4:6]
    thinking = EarnestLM(str(model_folder), runner="reference", think_end_token=end)
    assert generated(thinking, GENERATIONS[-1:]) == [text.split(end)[-1].lstrip()]


def test_what_it_does_not_have_is_refused_by_name(ours: EarnestLM) -> None:
    with pytest.raises(UserError, match="num_beams"):
        generated(ours, [(TEXTS[0], {"until": ["."], "max_gen_toks": 8, "num_beams": 4})])
    with pytest.raises(UserError, match="max_gen_toks"):
        generated(ours, [(TEXTS[0], {"until": ["."], "max_gen_toks": 160})])
    with pytest.raises(PromptError, match="continuation"):
        ours._loglikelihood_tokens([(("a", ""), [1], [])])
    with pytest.raises(UserError, match="which model"):
        EarnestLM()


def test_without_lm_eval_the_remedy_is_said() -> None:
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "import earnest.evaluate.startup\n"
        "from earnest.errors import MissingPackageError\n"
        "try:\n    import earnest.evaluate.harness\n"
        "except MissingPackageError as error:\n    print(error.remedy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert "earnest[eval]" in done.stdout


# --- the command ----------------------------------------------------------------------------------

CHOICES = """\
task: harbour_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {documents}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ANSWERS = """\
task: harbour_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {documents}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 16}}
metric_list: [{{metric: exact_match}}]
"""
TASKS = ["harbour_choices", "harbour_answers"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    documents = folder / "documents.jsonl"
    rows = [
        {"question": f"{text} {other[:20]}", "choices": list(ENDINGS)}
        for text in TEXTS[:6]
        for other in TEXTS[2:6]
    ]
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for task, text in zip(TASKS, (CHOICES, ANSWERS), strict=True):
        (folder / f"{task}.yaml").write_text(text.format(documents=documents), encoding="utf-8")
    return folder


def as_installed(folder: Path) -> dict[str, str]:
    """An environment in which `site` finds `earnest_lm_eval.pth` as beside an installed package."""
    source = Path(earnest.__file__).parents[1]
    (folder / "sitecustomize.py").write_text(
        f"import site; site.addsitedir({str(source / 'earnest' / 'evaluate')!r})\n", "utf-8"
    )
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(source)])}


def test_other_programs_import_nothing_of_it(tmp_path: Path) -> None:
    seen = "import sys; print([name for name in sys.modules if name[:7] in ('earnest', 'lm_eval')])"
    done = subprocess.run(
        [sys.executable, "-c", seen],
        env=as_installed(tmp_path),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_the_command_knows_the_model_and_agrees_with_transformers(
    tasks: Path,
    model_folder: Path,
    ours: EarnestLM,
    theirs: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1"}
    command = [
        *(str(Path(sys.executable).with_name("lm_eval")), "--model", "earnest"),
        *("--model_args", f"path={model_folder},runner=reference"),
        *("--tasks", ",".join(TASKS), "--include_path", str(tasks)),
        *("--output_path", str(tmp_path / "results"), "--log_samples"),
    ]
    done = subprocess.run(
        command,
        env=as_installed(tmp_path) | quiet,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "results").rglob("results_*.json")
    stated = json.loads(results.read_text(encoding="utf-8"))
    assert stated["config"]["earnest_runner"] == "ReferenceRunner"

    for name, value in quiet.items():
        monkeypatch.setenv(name, value)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    expected = simple_evaluate(
        model=theirs,
        tasks=TASKS,
        task_manager=manager,
        bootstrap_iters=0,
    )
    assert expected is not None
    for task in TASKS:
        for metric, value in expected["results"][task].items():
            if isinstance(value, float):
                assert stated["results"][task][metric] == pytest.approx(value, rel=1e-5), metric
    assert len(list((tmp_path / "results").rglob("samples_*.jsonl"))) == len(TASKS)

    talks = [
        simple_evaluate(
            model=model,
            tasks=TASKS[1:],
            task_manager=manager,
            apply_chat_template=True,
            system_instruction="Be brief.",
            bootstrap_iters=0,
        )
        for model in (theirs, ours)
    ]
    said = [[row["resps"] for row in talk["samples"][TASKS[1]]] for talk in talks if talk]
    assert said[0] == said[1] and len(said[0]) == 24
