"""`earnest bench` and `earnest doctor`, as a user meets them."""

from __future__ import annotations

import io
import json
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

from earnest import compiled
from earnest.cli import terminal as terminal_module
from earnest.cli.main import main
from earnest.measure import machine, speed
from earnest.runners.native import isa

needs_kernels = pytest.mark.skipif(not isa.installed(), reason="the compiled kernels are not built")
QUICK = ["--depth", "0,16", "--batch", "1,2", "--prefill", "8", "--tokens", "3"]


@pytest.fixture(autouse=True)
def less_memory_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_READ", machine._LEAST_READ)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


@needs_kernels
def test_bench_reports_rows_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "bench", "stories", *QUICK, "--threads", "1", "--json")
    assert status == 0, err
    facts = json.loads(out)
    assert set(facts["machine"]) == {"tier", "threads", "read_gb_s", "int8_tops"}
    assert facts["machine"]["threads"] == 1
    assert len(facts["rows"]) == 8
    wanted = {"kind", "depth", "batch", "tokens", "tok_s", "gb_s", "bandwidth_share"}
    for row in facts["rows"]:
        assert wanted <= set(row)
        share = row["gb_s"] / facts["machine"]["read_gb_s"]
        assert row["bandwidth_share"] == pytest.approx(share)
    assert [entry["prompt"] for entry in facts["first_token"]] == [1, 8]
    assert "1 of 10: first token" in err
    assert "10 of 10: decode at depth 16, batch 2" in err


def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is drawn on standard error, which is a terminal now."""
    drawn = io.StringIO()
    monkeypatch.setattr(terminal_module, "err", Console(file=drawn, force_terminal=True, width=99))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    return drawn


def test_nothing_is_drawn_while_bench_measures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = terminal(monkeypatch)
    step, beside = speed._Bench.step, list[str]()

    def watched(bench: speed._Bench, *arguments: int) -> tuple[float, float]:
        # A thread of rich that was told to end may take a moment.
        beside.extend(
            type(thread).__module__
            for thread in threading.enumerate()
            if not (ending := getattr(thread, "done", None)) or not ending.is_set()
        )
        return step(bench, *arguments)

    monkeypatch.setattr(speed._Bench, "step", watched)
    status, out, _ = run(capsys, "bench", "stories", *QUICK, "--runner", "reference")
    assert status == 0
    assert "tok/s" in out
    assert beside
    assert not any(module.startswith("rich") for module in beside), "a bar was alive"
    before, first, after = drawn.getvalue().partition("1/10")
    assert first, "measurements are numbered"
    assert "opening" in before
    assert "opening" not in after
    assert "first token, cold, after a prompt of 8" in after
    assert "decode at depth 16, batch 2" in after


def test_bench_runs_the_reference_without_kernels(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "module", lambda: None)
    status, out, err = run(capsys, "bench", "stories", *QUICK, "--runner", "reference", "--json")
    assert status == 0, err
    facts = json.loads(out)
    assert facts["runner"] == "reference"
    assert facts["machine"]["read_gb_s"] is None
    assert all(row["bandwidth_share"] is None for row in facts["rows"])


@pytest.mark.parametrize(("share", "said"), [(1.0, False), (0.5, True)])
def test_bench_names_small_pages(
    share: float, said: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "huge_page_share", lambda: share)
    status, out, err = run(capsys, "bench", "stories", *QUICK, "--runner", "reference")
    assert status == 0, err
    out = " ".join(out.split())  # however wide the terminal
    assert f"{100 * share:.1f}% of the weights in memory lie in huge pages" in out
    assert ("read anew" in out) == said


def test_bench_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "bench", "stories", *QUICK, "--runner", "reference")
    assert status == 0, err
    assert "tok/s" in out
    assert out.count("decode") == 4


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--depth", "1,x"], 2, "not a list of whole numbers"),
        (["--depth", "-5"], 2, "cannot be measured"),
        (["--depth", "100000"], 2, "longer than the model's context"),
        (["--batch", ""], 2, "not a list of whole numbers"),
        (["--tokens", "0", "--prefill", "0"], 2, "neither"),
    ],
)
def test_bench_refuses_nonsense(
    capsys: pytest.CaptureFixture[str], options: list[str], status: int, message: str
) -> None:
    left, _, err = run(capsys, "bench", "stories", *options)
    assert left == status
    assert message in err


def test_bench_of_nothing_is_not_found(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, _, err = run(capsys, "bench", str(tmp_path / "absent"))
    assert status == 2
    assert "absent" in err


@needs_kernels
def test_doctor_reports_for_people_and_machines(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "doctor", "--threads", "1")
    assert status == 0, err
    assert "GB/s" in out
    assert "TOP/s" in out
    assert "21b-a3b" in out
    status, out, _ = run(capsys, "doctor", "--threads", "1", "--json")
    facts = json.loads(out)
    assert facts["machine"]["tier"] == facts["rates"]["tier"] == isa.tier()
    assert facts["rates"]["threads"] == 1
    assert facts["problems"] == []
    assert len(facts["fits"]) == 9


@pytest.mark.parametrize("as_json", [False, True])
def test_doctor_says_loudly_that_there_are_no_kernels(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    monkeypatch.setattr(compiled, "module", lambda: None)
    status, out, err = run(capsys, "doctor", *(["--json"] if as_json else []))
    assert status == 0
    if as_json:
        facts = json.loads(out)
        assert facts["rates"] is None
        assert "C++ compiler" in facts["problems"][0]
    else:
        assert "NONE" in out
        assert "pip install" in err


@needs_kernels
def test_doctor_refuses_a_tier_that_cannot_be_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EARNEST_ISA", "sse9")
    status, _, err = run(capsys, "doctor")
    assert status == 2
    assert "EARNEST_ISA" in err


@needs_kernels
def test_doctor_and_bench_show_the_rest_where_memory_is_short(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.env, "free_memory", lambda: 200 * 2**20)
    reason = "too little memory is free to measure how fast it is read (200 MiB"
    status, out, err = run(capsys, "doctor")
    assert status == 0, err
    out = " ".join(out.split())  # however wide the terminal
    assert f"not measured: {reason}" in out
    assert isa.tier() in out and "300b-a47b" in out
    status, out, _ = run(capsys, "doctor", "--json")
    facts = json.loads(out)
    assert (status, facts["rates"]) == (0, None)
    assert facts["rates_skipped"].startswith(reason)
    assert facts["machine"]["tier"] == isa.tier()
    status, out, err = run(capsys, "bench", "stories", *QUICK, "--json")
    assert status == 0, err
    facts = json.loads(out)
    assert (len(facts["rows"]), facts["machine"]["read_gb_s"]) == (8, None)
    assert facts["machine_skipped"].startswith(reason)


def test_doctor_says_which_models_run_from_the_disk(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "module", lambda: None)
    monkeypatch.setattr(machine.env, "free_memory", lambda: 16 * 10**9)
    _, out, _ = run(capsys, "doctor")
    wanted = {("0.3b", "q4_0"): "yes", ("21b-a3b", "bf16"): "from disk"}
    for (model, kind), says in wanted.items():
        (row,) = [line.split() for line in out.splitlines() if line.split()[:2] == [model, kind]]
        assert says in " ".join(row)
    assert "earnest pack" in out
