"""The parts of the reference forward pass, one by one, against independent statements of them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from earnest.runners.reference import model
from earnest.runners.reference.model import (
    attend,
    inverse_frequencies,
    rms_norm,
    rotate,
    rotations,
    route,
)

FAR = 131_071


def test_inverse_frequencies_of_the_published_models() -> None:
    inverse_F = inverse_frequencies(128, 500_000.0)
    assert inverse_F.dtype == np.float32
    assert inverse_F.shape == (64,)
    np.testing.assert_allclose(inverse_F[[0, 1, 63]], [1, 0.814617, 2.45514e-06], rtol=1e-6)
    exact = 500_000.0 ** (-np.arange(64) / 64)
    np.testing.assert_allclose(inverse_F, exact, rtol=6e-7)


@pytest.mark.parametrize("theta", [10_000.0, 100_000.0, 500_000.0, 1_000_000.0])
def test_rotations_are_those_of_transformers(theta: float) -> None:
    torch = pytest.importorskip("torch", reason="the reference implementation needs torch")
    transformers = pytest.importorskip("transformers", reason="there is nothing to compare with")
    from transformers.models.ernie4_5.modeling_ernie4_5 import Ernie4_5RotaryEmbedding

    positions = np.concatenate([np.arange(64), np.arange(FAR - 63, FAR + 1)])
    different = total = 0
    for head_dim in (8, 16, 24, 32, 48, 64, 80, 96, 128, 192, 256):
        rotary = Ernie4_5RotaryEmbedding(
            transformers.Ernie4_5Config(
                head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": theta}
            )
        )
        theirs = rotary.inv_freq.numpy()
        ours = inverse_frequencies(head_dim, theta)
        different += int((ours != theirs).sum())
        total += len(ours)
        np.testing.assert_array_max_ulp(ours, theirs, 1)
        if head_dim == 128 and theta == 500_000.0:
            np.testing.assert_array_equal(ours, theirs)
        # Given the same frequencies, the angles are the same floats and so are, but for the last
        # place, their cosines and sines; also at the far end of the context.
        cos, sin = rotary(torch.zeros(1), torch.from_numpy(positions)[None])
        half = head_dim // 2
        for ours_TF, theirs_TF in zip(
            rotations(positions, theirs), (cos[0, :, :half], sin[0, :, :half]), strict=True
        ):
            np.testing.assert_allclose(ours_TF, theirs_TF.numpy(), rtol=0, atol=1.2e-7)
    assert different <= total / 100, f"{different} of {total} differ in the last place"


@settings(deadline=None)
@given(
    x=hnp.arrays(np.float32, (3, 2, 8), elements=st.floats(-4, 4, width=32)),
    positions=hnp.arrays(np.int32, 3, elements=st.integers(0, FAR)),
)
def test_rotation_turns_neighbouring_channels(x: np.ndarray, positions: np.ndarray) -> None:
    """As complex numbers: channel pair `(2i, 2i + 1)` times `exp(i angle)`."""
    inverse_F = inverse_frequencies(8, 500_000.0)
    turned = rotate(x, *rotations(positions, inverse_F))
    angle = (positions.astype(np.float32)[:, None] * inverse_F).astype(np.float64)
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, None]
    np.testing.assert_allclose(turned[..., 0::2], pairs.real, atol=2e-6)
    np.testing.assert_allclose(turned[..., 1::2], pairs.imag, atol=2e-6)


def test_rms_norm_in_float64() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 96)).astype(np.float32) * np.float32(30)
    x[0] = 0
    weight = rng.standard_normal(96).astype(np.float32)
    wide = x.astype(np.float64)
    expected = weight * wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(rms_norm(x, weight, 1e-5), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scores", [1, 100, 2**26])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize(("new", "length"), [(1, 1), (1, 19), (7, 7), (6, 20)])
def test_attention_position_by_position(
    new: int,
    length: int,
    heads: int,
    kv_heads: int,
    scores: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model, "MAX_SCORES", scores)
    rng = np.random.default_rng(new + heads)
    q = rng.standard_normal((new, heads, 8)).astype(np.float32)
    k = rng.standard_normal((kv_heads, length, 8)).astype(np.float32)
    v = rng.standard_normal((kv_heads, length, 8)).astype(np.float32)
    expected = np.empty((new, heads, 8))
    for t in range(new):
        seen = length - new + t + 1
        for h in range(heads):
            kv = h // (heads // kv_heads)
            score = k[kv, :seen].astype(np.float64) @ q[t, h] / np.sqrt(8)
            weight = np.exp(score - score.max())
            expected[t, h] = weight / weight.sum() @ v[kv, :seen]
    np.testing.assert_allclose(attend(q, k, v), expected, atol=2e-6)


def test_huge_scores_do_not_overflow() -> None:
    q = np.full((2, 1, 4), 1e4, np.float32)
    k = np.full((1, 2, 4), 1e4, np.float32)
    out = attend(q, k, np.ones((1, 2, 4), np.float32))
    np.testing.assert_array_equal(out, 1)


# Logits on a coarse grid, so that equal scores are common.
router_inputs = st.integers(1, 12).flatmap(
    lambda experts: st.tuples(
        hnp.arrays(np.float32, (4, experts), elements=st.integers(-3, 3).map(float)),
        hnp.arrays(np.float32, experts, elements=st.sampled_from([0.0, -0.25, 0.5])),
        st.integers(1, experts),
    )
)


@given(router_inputs)
def test_the_router_selects_by_score_and_weighs_by_probability(
    inputs: tuple[np.ndarray, np.ndarray, int],
) -> None:
    logits, bias, active = inputs
    experts, weights = route(logits.copy(), bias, active, 1e-12)
    power = np.exp(logits.astype(np.float64))
    probability = (power / power.sum(-1, keepdims=True)).astype(np.float32)
    for t in range(len(logits)):
        chosen = experts[t].tolist()
        assert len(set(chosen)) == active
        # Best first, and the lower id first among equal logits with equal bias.
        rank = [(-(probability[t, e] + bias[e]), e) for e in range(len(bias))]
        slack = 1e-6
        worst_in = max(rank[e][0] for e in chosen)
        best_out = min((rank[e][0] for e in range(len(bias)) if e not in chosen), default=np.inf)
        assert worst_in <= best_out + slack
        assert all(
            a < b for a, b in pairwise(chosen) if (logits[t, a], bias[a]) == (logits[t, b], bias[b])
        )
        expected = probability[t, chosen] / probability[t, chosen].sum()
        np.testing.assert_allclose(weights[t], expected, rtol=1e-5)


def test_the_router_breaks_ties_towards_the_lower_id() -> None:
    experts, weights = route(np.zeros((1, 8), np.float32), None, 3, 1e-12)
    assert experts.tolist() == [[0, 1, 2]]
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


def test_the_correction_bias_changes_the_selection_and_not_the_weight() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    bias = np.array([-1, 0, 0, 1], np.float32)
    experts, weights = route(logits.copy(), bias, 2, 1e-12)
    assert experts.tolist() == [[3, 1]]
    np.testing.assert_allclose(weights, [[0.05 / 0.35, 0.3 / 0.35]], rtol=1e-5)


def test_the_sum_of_weights_is_clamped() -> None:
    """Experts chosen for their bias alone may have next to no probability."""
    logits = np.array([[0, -200, -200]], np.float32)
    bias = np.array([-2, 0, 0], np.float32)
    experts, weights = route(logits, bias, 2, 1e-12)
    assert experts.tolist() == [[1, 2]]
    np.testing.assert_array_equal(weights, 0)
