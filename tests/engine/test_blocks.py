"""The KV block pool."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from earnest.engine.blocks import BlockPool


@given(st.integers(1, 20), st.lists(st.integers(0, 9), max_size=40))
def test_never_the_same_block_twice(size: int, wishes: list[int]) -> None:
    pool, owned = BlockPool(size), list[list[int]]()
    for wish in wishes:
        if wish % 3 == 0 and owned:
            pool.free(owned.pop(wish % len(owned)))
            continue
        free = pool.num_free
        blocks = pool.allocate(wish)
        assert (blocks is None) == (wish > free)
        if blocks is None:
            assert pool.num_free == free
        else:
            assert len(blocks) == wish
            owned.append(blocks)
        flat = [block for blocks in owned for block in blocks]
        assert len(set(flat)) == len(flat) == size - pool.num_free
        assert all(0 <= block < size for block in flat)
    for blocks in owned:
        pool.free(blocks)
    pool.check_idle()


def test_used_memory_is_used_again() -> None:
    pool = BlockPool(100)
    first = pool.allocate(3)
    assert first == [0, 1, 2]
    pool.free(first)
    assert pool.allocate(2) == [0, 1]


def test_defects_are_loud() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    assert blocks is not None
    with pytest.raises(RuntimeError, match="not given back"):
        pool.check_idle()
    pool.free(blocks)
    with pytest.raises(RuntimeError, match="twice"):
        pool.free(blocks)
