"""Weights where the native step reads them: in the file if it is packed, in memory if not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from earnest.checkpoint.checkpoint import Checkpoint
from earnest.checkpoint.lazy import LazyTensor
from earnest.codecs.panel import PANELS
from earnest.codecs.registry import CODECS
from earnest.config import ErnieConfig
from earnest.engine.batch import Slice, make_batch
from earnest.errors import MemoryBudgetError
from earnest.runners.native import isa, memory
from earnest.runners.native.packing import plan_packing
from earnest.runners.native.runner import NativeRunner

pytestmark = pytest.mark.skipif(not isa.installed(), reason="the compiled kernels are not built")

MIXTURE = ErnieConfig(
    vocab_size=203,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    moe_num_experts=8,
    moe_k=2,
    moe_intermediate_size=32,
    moe_num_shared_experts=1,
    moe_layer_start_index=1,
    tie_word_embeddings=False,
)
GATE = "model.layers.1.mlp.gate"


def packed(checkpoint: Checkpoint, folder: Path, codec: str, router: str = "f32") -> Checkpoint:
    """The checkpoint as if its file held panels, in `codec` and the router in `router`."""

    def as_panels(number: int, tensor: LazyTensor) -> LazyTensor:
        if len(tensor.shape) == 1:
            return tensor
        layout = PANELS[router if tensor.name.endswith("mlp.gate.weight") else codec]
        rows, columns = tensor.shape
        assert layout.codec.encode is not None
        data = layout.pack(layout.codec.encode(tensor.read()), columns)
        path = folder / f"{number}.panels"
        path.write_bytes(data.tobytes())
        mapped = np.memmap(path, np.uint8, "r", shape=data.shape)

        def unpacked() -> np.ndarray:
            return layout.unpack(mapped, rows, columns)

        return replace(tensor, codec=layout.codec, view=unpacked, panels=lambda: mapped)

    tensors = {
        name: as_panels(i, tensor) for i, (name, tensor) in enumerate(checkpoint.tensors.items())
    }
    return replace(checkpoint, tensors=tensors)


def without_panels(checkpoint: Checkpoint) -> Checkpoint:
    tensors = {n: replace(t, panels=None) for n, t in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors)


def logits(runner: NativeRunner) -> np.ndarray:
    return runner.step(make_batch([Slice([5, 9, 3, 100, 7], 0, [0], 5)], 16))


def no_progress_is_needed(*_: object) -> None:
    pass


@pytest.mark.parametrize("codec", ["bf16", "q4_0"])
def test_panels_of_a_file_are_used_where_they_lie(
    checkpoint_of, weights_of, tmp_path: Path, codec: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = packed(checkpoint_of(MIXTURE, weights_of(MIXTURE)), tmp_path, codec)
    packing = plan_packing(checkpoint)
    assert packing.packed_bytes == 0
    assert packing.mapped_bytes == packing.nbytes > 0
    placed, made = packing.place(2, no_progress_is_needed)
    assert made.size == 0
    for matrix in packing.matrices:
        assert matrix.tensor.panels is not None
        assert np.shares_memory(placed[matrix.name], matrix.tensor.panels())
    mapped = NativeRunner(checkpoint, num_blocks=1, block_size=16)
    made_here = NativeRunner(without_panels(checkpoint), num_blocks=1, block_size=16)
    assert mapped.weight_bytes == mapped.mapped_bytes == made_here.weight_bytes
    assert made_here.mapped_bytes == 0
    np.testing.assert_array_equal(logits(mapped), logits(made_here))
    assert not caplog.records


def test_a_router_in_another_type_is_decoded(checkpoint_of, weights_of, tmp_path: Path) -> None:
    checkpoint = packed(checkpoint_of(MIXTURE, weights_of(MIXTURE)), tmp_path, "q8_0", "bf16")
    packing = plan_packing(checkpoint)
    made = [matrix for matrix in packing.matrices if not matrix.is_mapped]
    assert [(m.name, m.codec) for m in made] == [(GATE, "f32")]
    assert packing.notice is None
    placed, _ = packing.place(1, no_progress_is_needed)
    expected = PANELS["f32"].pack(checkpoint.tensors[GATE + ".weight"].read(), 64)
    np.testing.assert_array_equal(placed[GATE], expected)


def test_panels_are_rounded_when_asked(checkpoint_of, weights_of, tmp_path: Path) -> None:
    checkpoint = packed(checkpoint_of(MIXTURE, weights_of(MIXTURE)), tmp_path, "bf16")
    packing = plan_packing(checkpoint, plain="q8_0")
    assert {m.name for m in packing.matrices if m.is_mapped} == {GATE}
    placed, _ = packing.place(2, no_progress_is_needed)
    q8 = CODECS["q8_0"]
    assert q8.encode is not None
    weights = checkpoint.tensors["lm_head.weight"].read()
    expected = PANELS["q8_0"].pack(q8.encode(weights), 64)
    np.testing.assert_array_equal(placed["lm_head"], expected)


def test_every_piece_of_a_large_matrix_finds_its_place(
    checkpoint_of, weights_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = checkpoint_of(MIXTURE, weights_of(MIXTURE))
    monkeypatch.setattr("earnest.runners.native.packing._CHUNK_WEIGHTS", 40 * 64)
    told: list[tuple[int, int]] = []
    forgotten: list[int] = []
    packing = plan_packing(checkpoint)
    placed, made = packing.place(3, forgotten.append, lambda n, of, what: told.append((n, of)))
    for matrix in packing.matrices:
        assert matrix.layout.pack(matrix.tensor.raw(), matrix.tensor.shape[1]).tobytes() == (
            placed[matrix.name].tobytes()
        )
        assert placed[matrix.name].ctypes.data % 64 == 0
        assert np.shares_memory(placed[matrix.name], made)
    assert len(list(packing.matrices[0].slices())) == 7  # 203 rows, 32 at a time
    assert told == sorted(told)
    assert told[-1] == (packing.nbytes, packing.nbytes)
    stored = sum(matrix.tensor.nbytes for matrix in packing.matrices)
    assert 0 <= stored - sum(forgotten) < len(forgotten)  # shares of a tensor are rounded down


def test_an_error_while_packing_is_raised_and_ends_it(checkpoint_of, weights_of) -> None:
    checkpoint = checkpoint_of(MIXTURE, weights_of(MIXTURE))

    def torn() -> np.ndarray:
        raise OSError("the disk is gone")

    name = "lm_head.weight"
    tensors = dict(checkpoint.tensors) | {name: replace(checkpoint.tensors[name], view=torn)}
    packing = plan_packing(replace(checkpoint, tensors=tensors))
    with pytest.raises(OSError, match="the disk is gone"):
        packing.place(2, no_progress_is_needed)


def test_it_says_how_to_open_at_once(
    checkpoint_of, weights_of, tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("earnest.runners.native.runner._WORTH_PACKING", 1000)
    checkpoint = checkpoint_of(MIXTURE, weights_of(MIXTURE))
    NativeRunner(checkpoint, num_blocks=1)
    assert [r.message.count("earnest pack") for r in caplog.records] == [1]
    caplog.clear()
    NativeRunner(packed(checkpoint, tmp_path, "bf16"), num_blocks=1)
    assert not caplog.records


def test_mapped_weights_need_no_memory_but_packed_ones_do(
    checkpoint_of, weights_of, tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = packed(checkpoint_of(MIXTURE, weights_of(MIXTURE)), tmp_path, "bf16")
    probe = NativeRunner(checkpoint, num_blocks=1)
    beside = probe.kv_bytes + probe.scratch_bytes
    free = beside + probe.weight_bytes // 2
    monkeypatch.setattr("earnest.env.free_memory", lambda: free)
    expected = logits(probe)
    runner = NativeRunner(checkpoint, num_blocks=1)
    np.testing.assert_array_equal(logits(runner), expected)
    assert [r.message for r in caplog.records] == [memory.too_large(runner.mapped_bytes, beside)]
    assert "earnest quantize" in caplog.text
    with pytest.raises(MemoryBudgetError, match="earnest pack"):
        NativeRunner(without_panels(checkpoint), num_blocks=1)
    with pytest.raises(MemoryBudgetError, match="do not lock"):
        NativeRunner(checkpoint, num_blocks=1, lock=True)
    free = beside - 1
    with pytest.raises(MemoryBudgetError, match="shorter context"):
        NativeRunner(checkpoint, num_blocks=1)


def locked_kib() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmLck:")[1].split()[0])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_locked_weights_stay_in_ram(checkpoint_of, weights_of, tmp_path: Path) -> None:
    checkpoint = packed(checkpoint_of(MIXTURE, weights_of(MIXTURE)), tmp_path, "bf16")
    before = locked_kib()
    told: list[str] = []
    runner = NativeRunner(
        checkpoint, num_blocks=1, lock=True, progress=lambda n, of, what: told.append(what)
    )
    assert 1024 * (locked_kib() - before) >= runner.weight_bytes
    assert told[-1] == "locking weights"


def test_spans_join_what_shares_pages() -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    room = np.zeros(10 * page, np.uint8)
    first = -room.ctypes.data % page
    base = room.ctypes.data + first
    pieces = [room[first + 3 * page : first + 5 * page], room[first + 10 : first + 20]]
    assert memory.spans(pieces) == [(base, base + page), (base + 3 * page, base + 5 * page)]
    pieces += [room[first + page : first + 3 * page], room[:0]]
    assert memory.spans(pieces) == [(base, base + 5 * page)]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how memory is mapped")
def test_zeros_ask_for_huge_pages() -> None:
    found = memory.zeros(6 * 2**20 + 5)
    assert found.dtype == np.uint8 and found.shape == (6 * 2**20 + 5,) and not found.any()
    found[-1] = 7
    at = found.ctypes.data + len(found) // 2
    smaps = Path("/proc/self/smaps").read_text()
    for found_at in re.finditer(
        r"^([0-9a-f]+)-([0-9a-f]+) .*\n(?:\w+: .*\n)*?VmFlags: (.*)$", smaps, re.M
    ):
        begin, end, flags = found_at.groups()
        if int(begin, 16) <= at < int(end, 16):
            assert "hg" in flags.split()
            return
    pytest.skip("this kernel does not tell")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_may_not_be_locked_is_said_with_a_remedy() -> None:
    script = """
        import os, resource
        import numpy as np
        from earnest.errors import MachineError
        from earnest.runners.native import memory
        if os.geteuid() == 0:
            os.setuid(65534)  # the super-user has no limit
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (2**20, 2**20))
        try:
            memory.lock([np.ones(2**23, np.uint8)])
        except MachineError as error:
            print(error)
        with open("/proc/self/status") as file:
            print([line.split()[1] for line in file if line.startswith("VmLck:")])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert "ulimit -l unlimited" in done.stdout, done.stderr
    assert "it is 1 MiB" in done.stdout
    assert "['0']" in done.stdout  # nothing stays pinned
