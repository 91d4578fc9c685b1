"""The native runner against the reference on the random configurations of the reference's own
proof, each of them in every codec that the kernels read: all matrices in that codec whose rows are
whole blocks of it; others stay float32, as in files.
The budgets are relative to the largest logit. They were set at about twice the worst that was
measured; these random weights amplify roundings far more than trained ones (test_native_accuracy.py
has real ones).
"""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from differences import causes, swaps, untouched
from random_configs import SEEDS, ernie_config
from test_native_step import arrays_of, scores, stored_in  # noqa: F401

from earnest.codecs.panel import PANELS
from earnest.runners import Routing
from earnest.runners.native import isa
from earnest.runners.reference import ReferenceRunner

pytestmark = pytest.mark.skipif(not isa.installed(), reason="the compiled kernels are not built")

if isa.installed():
    from earnest.runners.native.runner import KvType, NativeRunner

CODECS = sorted(PANELS)
TOKENS, STARTS = 24, (0, 15)  # two sequences

# Largest difference of a logit by the largest logit; how near a tie swapped experts must be, by the
# spread of the scores; how many (token, layer) pairs may be swapped. Seen with float32 keys and
# values: 6e-6 for plain codecs, 1.2e-3 for blocks (activations of 15 bits), at most 3 swaps of a
# codec; with f16 ones 6e-3 (the median configuration: 1.7e-3), with bf16 4e-2 (1.2e-2), with int8
# 0.1 (2.8e-2), and there 40 swaps.
PLAIN = (1e-5, 1e-5, 0.0)
BLOCKS = (3e-3, 1e-3, 0.01)
SHORT_KEYS = {
    "int16": (3e-3, 1e-3, 0.01),
    "f16": (0.015, 0.015, 0.01),
    "bf16": (0.1, 0.1, 0.03),
    "int8": (0.2, 0.7, 0.06),
}


@pytest.mark.parametrize("codec", CODECS)
def test_random_configurations(codec: str, checkpoint_of, weights_of, batch_of, scores) -> None:  # noqa: F811
    errors: dict[str, list[float]] = {kv: [] for kv in get_args(KvType)}
    pairs, swapped = 0, dict.fromkeys(errors, 0)
    for seed in SEEDS:
        config = ernie_config(seed, max(32, PANELS[codec].codec.block_weights))
        arrays = arrays_of(config, weights_of, seed)
        for name, array in arrays.items():
            # Wider rows than the configurations have by themselves: products of the same size.
            if array.ndim == 2:
                arrays[name] = array * np.float32(min(1, 10 / np.sqrt(array.shape[1])))
        checkpoint = stored_in(checkpoint_of(config, arrays), codec)
        ids = np.random.default_rng(seed).integers(config.vocab_size, size=TOKENS).tolist()
        batch = batch_of((ids[: STARTS[1]], 0, [1, 0]), (ids[STARTS[1] :], 0, [2]))
        scores.clear()
        theirs: list[Routing] = []
        want = ReferenceRunner(checkpoint, num_blocks=3).step(batch, theirs)
        pairs += TOKENS * len(theirs)
        for kv in errors:
            runner = NativeRunner(checkpoint, num_blocks=3, kv=kv, threads=1 + seed % 3)
            ours: list[Routing] = []
            got = runner.step(batch, ours)
            plain = PANELS[codec].codec.is_plain and not (codec == "bf16" and runner.tier == "amx")
            budget, tie, share = (PLAIN if plain else BLOCKS) if kv == "f32" else SHORT_KEYS[kv]
            found = swaps(ours, theirs, scores)
            for swap in causes(found, STARTS):
                print(f"{codec}, configuration {seed}, keys and values in {kv}: {swap}")
                assert swap.gap < tie * swap.scale, f"not a tie: {swap}"
            clean = untouched(found, STARTS, TOKENS)
            error = np.abs(got - want)[clean].max(initial=0) / np.abs(want).max()
            assert error < budget, f"configuration {seed}: {error:.2e} of the largest logit"
            errors[kv].append(float(error))
            swapped[kv] += len(found)
            assert swapped[kv] <= 2 + share * pairs, "swaps must be rare"
            for mine, other in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(
                    np.sort(mine.weights)[clean], np.sort(other.weights)[clean], atol=10 * budget
                )
    for kv, seen in errors.items():
        print(
            f"{codec}, keys and values in {kv}: worst {max(seen):.1e}, median "
            f"{np.median(seen):.1e}; {swapped[kv]} of {pairs} (token, layer) pairs swapped"
        )
    assert all(np.median(errors[kv]) < SHORT_KEYS[kv][0] / 3 for kv in SHORT_KEYS if kv in errors)
