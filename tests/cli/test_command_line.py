"""Every verb as a user meets it: as a process, with good and bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

import earnest as earnest_package
from earnest.cli.main import VERBS, group, main
from earnest.runners.native import isa

EARNEST = [sys.executable, "-m", "earnest"]


def earnest(
    *arguments: str, timeout: float = 120, **options: object
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"EARNEST_OFFLINE": "1"} | dict(options.pop("env", {}))  # type: ignore[call-overload]
    return subprocess.run(
        [*EARNEST, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        stdin=subprocess.DEVNULL,
        **options,  # type: ignore[call-overload]
    )


@pytest.fixture(scope="module")
def small_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "small-moe"
    done = earnest("synth", str(folder), "--preset", "small-moe", "--seed", "3", "--mtp")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_has_examples_and_names_every_option_once(verb: str) -> None:
    done = earnest(*([verb] if verb else []), "--help")
    assert done.returncode == 0, done.stderr
    assert "Examples:" in done.stdout
    assert "earnest run" in done.stdout or f"earnest {verb}" in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_has_a_help_text(verb: str) -> None:
    command = group.get_command(click.Context(group), verb)
    assert command is not None
    options = [found for found in command.params if isinstance(found, click.Option)]
    assert options
    for option in options:
        assert re.fullmatch(r".{10,}[.)]", option.help or ""), (option.opts, option.help)


def test_version() -> None:
    done = earnest("--version")
    assert done.returncode == 0
    assert "earnest" in done.stdout


def test_unknown_verb_is_a_usage_error() -> None:
    done = earnest("frobnicate")
    assert done.returncode == 2
    assert "frobnicate" in done.stderr


def test_help_does_not_import_the_engine() -> None:
    code = (
        "import sys, earnest.cli.main as m\n"
        "try: m.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("False")


def test_nothing_below_verify_needs_torch(small_moe: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import earnest\n"
        f"model = earnest.load({str(small_moe)!r})\n"
        "print(model.logits([1, 2, 3]).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(3, 1024)"


# --- run --------------------------------------------------------------------------------------


def test_run_stories_says_what_it_is_and_tells_a_story() -> None:
    done = earnest("run", "stories", "Once upon a time", "--temperature", "0", "--max-tokens", "40")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time, there was a little girl named Lily.")
    assert "260" in done.stderr


def test_run_json() -> None:
    arguments = ["run", "stories", "-p", "Once upon a time", "--max-tokens", "8"]
    done = earnest(*arguments, "--temperature", "0", "--logprobs", "2", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["prompt_ids"] == [1, 403, 407, 261, 378]
    assert len(result["completion_ids"]) == 8
    assert result["finish_reason"] == "length"
    assert result["text"].startswith(", there was")
    assert len(result["logprobs"]) == 8
    assert {len(entry["top"]) for entry in result["logprobs"]} == {2}
    took = result["timings"]
    assert took["decode_seconds"] > 0
    # The first token belongs to the prompt: seven were decoded.
    rate = 7 / took["decode_seconds"]
    assert took["decode_tokens_per_second"] == pytest.approx(rate)
    assert took["prompt_tokens_per_second"] == pytest.approx(5 / took["prompt_seconds"])
    assert took["peak_memory_bytes"] > 2**20
    assert took["runner"] == ("native" if isa.installed() else "reference")
    assert ("tier" in took and "threads" in took) == isa.installed()


def test_messages_about_the_context_name_the_option() -> None:
    arguments = ["run", "stories", "-p", "Tim", "--context"]
    for context in ("1", "100000"):
        done = earnest(*arguments, context)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "--context" in done.stderr


def test_run_json_of_one_token_has_no_decode_rate() -> None:
    arguments = ["run", "stories", "-p", "Tim", "--max-tokens", "1", "--json"]
    assert json.loads(earnest(*arguments).stdout)["timings"]["decode_tokens_per_second"] is None


@pytest.mark.parametrize("runner", ["native", "reference"])
def test_run_shows_timings_on_request(runner: str) -> None:
    if runner == "native" and not isa.installed():
        pytest.skip("the compiled kernels are not built")
    arguments = ["run", "stories", "Tim", "--max-tokens", "5", "--ignore-eos"]
    done = earnest(*arguments, "--runner", runner, "--timings")
    assert done.returncode == 0, done.stderr
    for words in ("tokens/s", "first token after", "answer: 5 tokens", "peak memory"):
        assert words in done.stderr
    assert f"runner {runner}" in done.stderr
    assert "tokens/s" not in earnest(*arguments, "--runner", runner).stderr


@pytest.mark.skipif(not isa.installed(), reason="the compiled kernels are not built")
def test_run_takes_options_of_the_native_runner() -> None:
    arguments = ["run", "stories", "Once upon", "--max-tokens", "5", "--temperature", "0"]
    options = ["--kv", "f32", "--activation-bits", "15", "--threads", "1"]
    done = earnest(*arguments, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == earnest(*arguments, "--runner", "reference").stdout
    refused = earnest(*arguments, "--runner", "reference", "--kv", "f32")
    assert refused.returncode == 2
    assert "native runner" in refused.stderr
    assert earnest(*arguments, "--kv", "f64").returncode == 2


def test_run_without_kernels_says_so_once_and_runs() -> None:
    code = (
        "from earnest import compiled\n"
        "compiled.module = lambda: None\n"
        "import earnest.cli.main as m\n"
        "m.main(['run', 'stories', 'Tim', '--max-tokens', '3', '--timings'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: earnest was installed without its compiled kernels") == 1
    assert "RuntimeWarning" not in done.stderr and ".py:" not in done.stderr
    assert "runner reference" in done.stderr


@pytest.mark.skipif(not isa.installed(), reason="the compiled kernels are not built")
def test_what_the_runner_warns_of_is_told_once_and_beside_the_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: a model of 260,000 weights is not worth packing otherwise."""
    monkeypatch.setattr("earnest.runners.native.runner._WORTH_PACKING", 1000)
    with pytest.raises(SystemExit) as ended:
        main(["run", "stories", "-p", "Once", "--max-tokens", "1", "--json"])
    said = capsys.readouterr()
    assert ended.value.code in (0, None)
    assert said.err.count("earnest pack") == 1
    assert json.loads(said.out)


def test_run_is_reproducible_with_a_seed() -> None:
    arguments = ["run", "stories", "-p", "Tim", "--seed", "5", "--max-tokens", "20", "--json"]
    texts = [json.loads(earnest(*arguments).stdout)["text"] for _ in range(2)]
    assert texts[0] == texts[1]


def test_run_writes_the_same_with_and_without_guesses() -> None:
    arguments = [
        "run",
        "stories",
        "-p",
        "Tim had a ball. Tim had a",
        "--seed",
        "5",
        "--speculation",
    ]
    texts = [earnest(*arguments, name).stdout for name in ("prompt", "off")]
    assert texts[0] == texts[1] and "Tim had a ball" in texts[0]
    assert earnest(*arguments, "magic").returncode == 2


def test_run_reads_the_prompt_from_standard_input() -> None:
    done = subprocess.run(
        [*EARNEST, "run", "stories", "--temperature", "0", "--max-tokens", "5"],
        input="Once upon a time\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time, there was")


def test_run_without_a_network_falls_back_to_stories_and_says_so(tmp_path: Path) -> None:
    done = earnest(
        "run", "Once upon a time", "--max-tokens", "5", env={"EARNEST_CACHE": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    assert "could not be fetched" in done.stderr
    assert "260" in done.stderr


def test_a_named_model_that_cannot_be_fetched_is_an_error(tmp_path: Path) -> None:
    done = earnest("run", "smollm2", "-p", "hi", env={"EARNEST_CACHE": str(tmp_path)})
    assert done.returncode == 4
    assert "EARNEST_OFFLINE" in done.stderr


def test_chat_of_a_base_model_is_refused_clearly() -> None:
    done = earnest("run", "stories", "-p", "hi", "--chat")
    assert done.returncode == 2
    assert "Base model" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "stories", "-p", "x", "--temperature", "-1"], "temperature"),
        (["run", "stories", "-p", "x", "--top-p", "0"], "top_p"),
        (["run", "stories", "-p", "x", "--temperature", "nan"], "temperature"),
        (["run", "stories", "-p", "x", "--max-tokens", "1", "--min-tokens", "2"], "min_tokens"),
        (["run", "stories", "-p", "x", "--raw", "--chat"], "contradict"),
        (["run", "stories", "x", "-p", "y"], "two prompts"),
        (["run", "stories", "-p", "word " * 2000], "512"),
    ],
)
def test_run_refuses_bad_arguments(arguments: list[str], words: str) -> None:
    done = earnest(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


# --- the tools on files -----------------------------------------------------------------------


def test_inspect_and_its_json(small_moe: Path) -> None:
    done = earnest("inspect", str(small_moe))
    assert done.returncode == 0, done.stderr
    facts = json.loads(earnest("inspect", str(small_moe), "--json").stdout)
    assert facts["config"]["moe_num_experts"] == 8
    assert facts["container"] == "safetensors"


def test_inspect_preset_gives_the_real_counts() -> None:
    facts = json.loads(earnest("inspect", "--preset", "21b-a3b", "--json").stdout)
    text = json.dumps(facts)
    assert "21825437888" in text
    assert "3352148480" in text


def test_convert_there_and_back_changes_nothing(small_moe: Path, tmp_path: Path) -> None:
    paddle, back = tmp_path / "paddle", tmp_path / "back"
    for source, destination, layout in ((small_moe, paddle, "paddle"), (paddle, back, "hf")):
        done = earnest("convert", str(source), str(destination), "--to", layout)
        assert done.returncode == 0, done.stderr
    for one, other in ((small_moe, paddle), (small_moe, back)):
        done = earnest("diff", str(one), str(other), "--json")
        assert done.returncode == 0, done.stdout
    weights = "model.safetensors"
    assert (small_moe / weights).read_bytes() == (back / weights).read_bytes()


def test_diff_says_what_differs(small_moe: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert (
        earnest("synth", str(other), "--preset", "small-moe", "--seed", "4", "--mtp").returncode
        == 0
    )
    done = earnest("diff", str(small_moe), str(other))
    assert done.returncode == 1
    assert "model.embed_tokens.weight" in done.stdout


def test_verify_manifest(small_moe: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    written = earnest(
        "verify", str(small_moe), "--no-self-check", "--write-manifest", str(manifest)
    )
    assert written.returncode == 0, written.stdout + written.stderr
    checked = earnest("verify", str(small_moe), "--no-self-check", "--manifest", str(manifest))
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_verify_passes_a_real_model() -> None:
    done = earnest("verify", "stories", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] is True
    assert report["self_check"]["passed"] is True


def test_verify_fails_and_names_the_mistake(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    stories = Path(earnest_package.__file__).parent / "hub" / "stories"
    broken = tmp_path / "broken"
    shutil.copytree(stories, broken)
    tensors = safetensors.load_file(broken / "model.safetensors")
    for name in list(tensors):
        if name.endswith("gate_proj.weight"):
            twin = name.replace("gate_proj", "up_proj")
            tensors[name], tensors[twin] = tensors[twin], tensors[name]
    safetensors.save_file(tensors, broken / "model.safetensors")
    done = earnest("verify", str(broken))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "swapped gate and up" in done.stdout
    assert done.stdout.rstrip().endswith("FAIL")


def test_verify_notices_a_changed_weight(small_moe: Path, tmp_path: Path) -> None:
    manifest, copy = tmp_path / "manifest.json", tmp_path / "copy"
    arguments = ["--no-self-check", "--write-manifest", str(manifest)]
    assert earnest("verify", str(small_moe), *arguments).returncode == 0
    shutil.copytree(small_moe, copy)
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-10, os.SEEK_END)
        byte = file.read(1)
        file.seek(-10, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    done = earnest("verify", str(copy), "--no-self-check", "--manifest", str(manifest))
    assert done.returncode == 1, done.stdout + done.stderr


def test_verify_against_transformers(small_moe: Path) -> None:
    pytest.importorskip("transformers")
    done = earnest(
        "verify", str(small_moe), "--no-self-check", "--against", "transformers", "--json"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["exactness"]["passed"] is True


BAD_PATHS = [
    ["inspect"],
    ["verify"],
    ["run", "-p", "x"],
]


@pytest.mark.parametrize("call", BAD_PATHS, ids=lambda call: call[0])
def test_a_path_that_is_not_there(call: list[str], tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    done = earnest(call[0], missing, *call[1:])
    assert done.returncode == 2, done.stdout + done.stderr
    assert "nowhere" in done.stderr
    assert "to do" in done.stderr
    as_json = earnest(call[0], missing, *call[1:], "--json")
    assert json.loads(as_json.stdout)["error"]["type"] == "ModelNotFoundError"


@pytest.mark.parametrize("call", BAD_PATHS, ids=lambda call: call[0])
def test_an_empty_folder(call: list[str], tmp_path: Path) -> None:
    done = earnest(call[0], str(tmp_path), *call[1:])
    assert done.returncode in (2, 3), done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", ["inspect", "verify", "convert"])
def test_no_permission(verb: str, small_moe: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    (locked / "config.json").write_text("{}")
    locked.chmod(0)
    extra = [str(tmp_path / "out"), "--to", "hf"] if verb == "convert" else []
    arguments = [verb, str(locked), *extra]
    # Root may read everything, so the command is run as somebody else; everything is imported
    # before, since that somebody may not be allowed to read the installation.
    code = (
        "import importlib, os\n"
        "import earnest.cli.main as m, earnest.verify, earnest.checkpoint.convert\n"
        f"importlib.import_module('earnest.cli.{verb}')\n"
        "os.geteuid() == 0 and os.seteuid(65534)\n"
        f"m.main({arguments!r})\n"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    finally:
        locked.chmod(0o700)
    assert done.returncode == 4, done.stdout + done.stderr
    assert "permission" in done.stderr.lower()
    assert "Traceback" not in done.stderr


def test_a_destination_that_cannot_be_written(small_moe: Path) -> None:
    done = earnest("convert", str(small_moe), "/proc/nowhere/out", "--to", "hf")
    assert done.returncode in (2, 4), done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["convert", "nowhere", "out", "--to", "hf"], 2, "nowhere"),
        (["convert", "stories", "out", "--to", "onnx"], 2, "onnx"),
        (["convert", "stories", "out"], 2, "--to"),
        (["convert", "stories", "out.gguf", "--to", "hf"], 2, "--to gguf"),
        (["pack", "stories", "x.gguf"], 2, "earnest convert SRC x.gguf --to gguf"),
        (["diff", "stories", "nowhere"], 2, "nowhere"),
        (["diff", "nowhere", "stories"], 2, "nowhere"),
        (["synth", "out", "--preset", "7b"], 2, "21b-a3b"),
        (["synth", "out", "--preset", "tiny-moe", "--layers", "99"], 2, "layers"),
        (["synth", "out", "--preset", "tiny-dense", "--mtp"], 2, "multi-token"),
        (
            ["synth", "out", "--preset", "tiny-moe", "--codec", "q4_0", "--dtype", "f16"],
            2,
            "--codec q4_0 --dtype f16",
        ),
        (["pull", "no-owner"], 2, "owner/name"),
        (["pull", "owner/name"], 4, "EARNEST_OFFLINE"),
        (["inspect"], 2, "PATH"),
        (["inspect", "--preset", "7b"], 2, "300b-a47b"),
        (["verify", "stories", "--manifest", "nowhere.json"], 2, "nowhere.json"),
        (["run", "owner/name", "-p", "x"], 2, "earnest pull owner/name"),
        (["run", "./nowhere.gguf", "-p", "x"], 2, "nowhere.gguf"),
        (["run", "storiez", "-p", "x"], 2, "did you mean stories"),
    ],
)
def test_bad_calls(arguments: list[str], status: int, words: str, tmp_path: Path) -> None:
    done = earnest(*arguments, cwd=tmp_path)
    assert done.returncode == status, done.stdout + done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir()), "a refused call leaves nothing behind"


def test_a_destination_that_exists(small_moe: Path, tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    done = earnest("convert", str(small_moe), str(tmp_path), "--to", "hf")
    assert done.returncode == 2
    assert "--force" in done.stderr
    assert (tmp_path / "keep.txt").read_text() == "mine"


def test_a_full_disk_leaves_nothing(small_moe: Path, tmp_path: Path) -> None:
    # A file-size limit stands in for the full disk: the system reports both in the same way.
    call = f"{sys.executable} -m earnest convert {small_moe} {tmp_path}/out --to hf"
    script = f"ulimit -f 2000; exec {call}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 4, done.stdout + done.stderr
    assert "free some space" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_convert_is_finished_by_the_same_command(
    how: signal.Signals, tmp_path: Path
) -> None:
    source, destination = tmp_path / "source", tmp_path / "out"
    synth = earnest("synth", str(source), "--preset", "21b-a3b", "--layers", "2", "--dtype", "bf16")
    assert synth.returncode == 0, synth.stderr
    call = ["convert", str(source), str(destination), "--to", "paddle", "--shard-size", "0.1"]
    process = subprocess.Popen(
        [*EARNEST, *call], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    partial = tmp_path / ".out.partial"
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if len(list(partial.glob("model-*.safetensors"))) >= 2:
            break
        time.sleep(0.01)
    assert process.poll() is None, "the conversion was over before it could be interrupted"
    process.send_signal(how)
    process.wait(timeout=60)
    assert process.returncode != 0
    said = process.stderr.read() if process.stderr else ""
    assert "Traceback" not in said
    if how == signal.SIGINT:
        assert f"is kept in {partial}: the same command goes on" in " ".join(said.split())
        assert "delete that folder to start over" in said
    assert not destination.exists()
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("model-*.safetensors")}
    assert kept
    done = earnest(*call)
    assert done.returncode == 0, done.stderr
    assert f"an interrupted run left {partial}: what it finished is not made again" in done.stderr
    assert "continuing an interrupted run" in done.stdout
    assert not partial.exists()
    for name, when in kept.items():
        assert (destination / name).stat().st_mtime_ns == when, "a finished shard was written again"
    assert earnest("diff", str(source), str(destination), "--json").returncode == 0


def test_ctrl_c_during_an_answer_says_interrupted() -> None:
    process = subprocess.Popen(
        [*EARNEST, "run", "stories", "x", "--ignore-eos", "--max-tokens", "500"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.read(1)  # it has begun to answer
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert "Traceback" not in stderr
    assert process.returncode in (0, 130)  # 0 if the answer was over before the signal came


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m earnest inspect stories | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout
    assert done.stderr == ""
