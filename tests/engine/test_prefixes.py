"""Remembered blocks: what is found is what was stored, whatever the hash does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from earnest.engine.blocks import BlockPool, keyed_digest

SIZE = 2


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 2), max_size=12), st.sampled_from([b"", b"a", b"b"])),
        max_size=30,
    ),
    st.sampled_from([0, 2, 128]),
    st.integers(6, 40),
)
def test_only_what_the_same_tenant_stored_is_found(
    prompts: list[tuple[list[int], bytes]], bits: int, num_blocks: int
) -> None:
    def digest(key: bytes, content: bytes) -> bytes:
        return (int.from_bytes(keyed_digest(key, content)) & ((1 << bits) - 1)).to_bytes(16)

    pool = BlockPool(num_blocks, digest=digest)
    holds: dict[int, tuple[bytes, list[int]]] = {}
    for tokens, salt in prompts:
        start = pool.beginning(salt)
        found = pool.find(start, tokens, SIZE)
        for index, link in enumerate(found):
            assert holds[link.block] == (salt, tokens[: (index + 1) * SIZE])
        blocks = [link.block for link in found]
        fresh = pool.allocate(len(tokens) // SIZE - len(found))
        assert fresh is not None
        for block in fresh:
            holds.pop(block, None)
        blocks += fresh
        link = found[-1] if found else start
        for index in range(len(found), len(blocks)):
            part = tokens[index * SIZE : (index + 1) * SIZE]
            holds[blocks[index]] = (salt, tokens[: (index + 1) * SIZE])
            link = pool.remember(link, blocks[index], part)
        pool.free(blocks)
        pool.check_idle()
        assert pool.num_free == num_blocks


def test_the_longest_unused_is_forgotten_first_and_ends_before_beginnings() -> None:
    pool = BlockPool(4)
    first, second = [1, 1, 1, 1], [2, 2, 2, 2]
    for tokens in (first, second):
        blocks = pool.allocate(2)
        assert blocks is not None
        link = pool.beginning(b"")
        for index, block in enumerate(blocks):
            link = pool.remember(link, block, tokens[2 * index : 2 * index + 2])
        pool.free(blocks)
    assert pool.num_remembered == 4 and pool.num_free == 4
    taken = pool.allocate(1)
    assert taken is not None
    start = pool.beginning(b"")
    found = pool.find(start, first, 2)
    assert len(found) == 1  # its end is gone
    others = pool.find(start, second, 2)
    assert len(others) == 2
    for links in (found, others):
        pool.free([link.block for link in links])
    pool.free(taken)
    pool.check_idle()
