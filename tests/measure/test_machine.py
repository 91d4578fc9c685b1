"""What the machine is, and what fits on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from earnest import compiled
from earnest.codecs.registry import codec
from earnest.config import PRESETS, Accounting
from earnest.errors import MemoryBudgetError
from earnest.measure import machine
from earnest.runners.native import isa

needs_kernels = pytest.mark.skipif(not isa.installed(), reason="the compiled kernels are not built")


def test_looking_needs_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "module", lambda: None)
    seen = machine.look()
    assert seen.tier is None
    assert seen.compiled_tiers is None
    assert 1 <= seen.threads <= seen.allowed <= seen.cores
    assert seen.free_memory > 0
    monkeypatch.setattr(machine.control_groups, "cpu_quota", lambda: 0.5)
    assert machine.look().threads == 1


@needs_kernels
def test_threads_without_kernels_are_the_threads_with_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = machine.look().threads
    monkeypatch.setattr(compiled, "module", lambda: None)
    assert machine.look().threads == threads


@needs_kernels
def test_rates_are_positive_and_name_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_READ", machine._LEAST_READ)
    monkeypatch.setenv("EARNEST_ISA", "generic")
    rates = machine.measure_rates(1)
    assert (rates.tier, rates.threads) == ("generic", 1)
    assert rates.read > 0
    assert rates.integer > 0
    assert rates.to_dict()["read_gb_s"] == rates.read / 1e9


@needs_kernels
def test_without_memory_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.env, "free_memory", lambda: 2**20)
    with pytest.raises(MemoryBudgetError, match="too little memory"):
        machine.measure_rates(1)


def test_caches_are_read_and_instructions_left_out(tmp_path: Path) -> None:
    for index, (level, kind, size, shared) in enumerate(
        [
            (3, "Unified", "32M", "0-3,8"),
            (1, "Instruction", "32K", "0"),
            (1, "Data", "32K", "0-1"),
            (2, "Unified", "", "0"),
        ]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in {
            "level": level, "type": kind, "size": size, "shared_cpu_list": shared,
        }.items():  # fmt: skip
            (folder / name).write_text(f"{value}\n")
    assert machine._caches(tmp_path) == (
        machine.Cache(1, 32 * 2**10, 2),
        machine.Cache(3, 32 * 2**20, 5),
    )
    assert machine._caches(tmp_path / "absent") == ()


def test_what_fits_is_what_accounting_says() -> None:
    rows = machine.fits(14 * 10**9, read=60e9)
    by_name = {(row["model"], row["type"]): row for row in rows}
    assert len(by_name) == len(rows) == len(machine.MEMBERS) * len(machine.TYPES)
    assert by_name["21b-a3b", "q4_0"]["fits"]
    assert not by_name["21b-a3b", "q8_0"]["fits"]
    assert not any(row["fits"] for row in rows if row["model"] == "300b-a47b")
    # What does not fit but leaves an eighth for keys and values runs from the disk.
    assert by_name["21b-a3b", "q8_0"]["from_disk"] and not by_name["21b-a3b", "q4_0"]["from_disk"]
    one = PRESETS["300b-a47b"]
    keys_values = Accounting(one).kv_bytes_per_token(2) * machine.CONTEXT
    for free, verdict in ((8 * keys_values, True), (8 * keys_values - 8, False)):
        assert {r["from_disk"] for r in machine.fits(free, configs={"300b": one})} == {verdict}
    edge = by_name["0.3b", "bf16"]
    need = edge["weight_bytes"] + edge["kv_bytes"]
    for free, verdict in ((need, True), (need - 1, False)):
        last = machine.fits(free, configs={"0.3b": PRESETS["0.3b"]})[-1]
        assert (last["type"], last["fits"]) == ("bf16", verdict)
    # A token of the 21B model reads its 3.35 B weights and 4,096 keys and values of 28 layers.
    token = 60e9 / by_name["21b-a3b", "q4_0"]["most_tok_s"]
    keys_values = 2 * 2 * 28 * 4 * 128 * 4096
    assert token - keys_values == pytest.approx(3.35e9 * 4.5 / 8, rel=0.02)
    assert all(row["most_tok_s"] is None for row in machine.fits(10**9))


@pytest.mark.parametrize("name", ["0.3b", "21b-a3b", "300b-a47b"])
def test_active_bytes_agree_with_active_parameters(name: str) -> None:
    counted = Accounting(PRESETS[name])
    bits = dict.fromkeys(counted.parts, codec("bf16").bits_per_weight)
    embedding = 0 if counted.config.tie_word_embeddings else counted.parts["embedding"]
    # `active` leaves out the correction bias, which is read all the same.
    expected = 2 * (counted.active - embedding + counted.parts["correction_bias"])
    assert machine.active_bytes(counted, bits) == expected


def test_peak_memory_is_at_least_what_is_held() -> None:
    held = bytearray(b"x" * 10**8)
    peak = machine.peak_memory()
    assert peak is None or peak > len(held)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_not_that_of_the_process_that_started_this_one() -> None:
    held = bytearray(b"x" * 300_000_000)
    script = "from earnest.measure.machine import peak_memory; print(peak_memory())"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < len(held)


ROLLUP = """\
560bb786b000-7ffc4220c000 ---p 00000000 00:00 0                          [rollup]
Rss:             3000000 kB
Anonymous:       1000000 kB
FilePmdMapped:   1500000 kB
"""


@pytest.mark.parametrize(
    ("told", "share"),
    [
        (ROLLUP, 0.75),
        (ROLLUP.replace("1500000", "0"), 0.0),
        (ROLLUP.replace("3000000", "1000128"), None),  # too little is mapped to speak of
        (ROLLUP.replace("FilePmdMapped", "Other"), None),  # an older Linux
        ("", None),  # another system
    ],
)
def test_huge_page_share_is_of_mapped_files(
    told: str, share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_text", lambda path: told)
    assert machine.huge_page_share() == share
