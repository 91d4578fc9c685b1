"""Who owns which KV block of a runner, and which blocks hold a prefix that others may read.

A full block whose keys and values are stored can be *remembered* by what it holds: its tokens,
after those of the block before it. A later sequence that begins with the same tokens reads it
instead of computing it again. Remembered blocks outlive their owners until the room is needed; the
one unused for longest goes first.

Found by a keyed hash, and then compared token by token along the whole chain: whoever finds a
collision finds nothing. Chains begin with a salt, so that sequences of different salts never share
(and cannot learn from timing what the other has asked: CVE-2025-46570).
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Digest = Callable[[bytes, bytes], bytes]


def keyed_digest(key: bytes, content: bytes) -> bytes:
    """128 bits of BLAKE2b with a key."""
    return hashlib.blake2b(content, key=key, digest_size=16).digest()


@dataclass(frozen=True, eq=False)
class Link:
    """A remembered block, or the beginning of a chain (which has no block).

    Attributes:
        block: the KV block; -1 at the beginning.
        tokens: what it holds; at the beginning the salt.
        parent: the link before it.
        digest: of the chain up to here.
    """

    block: int
    tokens: tuple[int, ...] | bytes
    parent: Link | None
    digest: bytes


class BlockPool:
    """Hands out the KV blocks of a runner, and counts who reads them.

    Blocks that were freed are handed out again before fresh ones, so that memory which was never
    touched stays untouched; remembered ones come last.

    Args:
        num_blocks: blocks there are; ids are 0 to `num_blocks - 1`.
        digest: the hash, given a secret key and the content; replaced by tests only.
    """

    def __init__(self, num_blocks: int, *, digest: Digest = keyed_digest) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._users = [0] * num_blocks
        self._digest, self._key = digest, secrets.token_bytes(32)
        self._links: dict[bytes, Link] = {}  # by digest
        self._of_block: dict[int, Link] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # remembered, longest unused first

    @property
    def num_free(self) -> int:
        """Blocks that nobody uses."""
        return len(self._free) + len(self._unused)

    @property
    def num_remembered(self) -> int:
        """Blocks that can be found by their content."""
        return len(self._of_block)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks, or none at all (None) if fewer are free."""
        if count > self.num_free:
            return None
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._unused.popitem(last=False)
            del self._links[self._of_block.pop(block).digest]
        self._users[block] = 1
        return block

    def free(self, blocks: Sequence[int]) -> None:
        """Give blocks back, in the order of the sequence: its end is forgotten first.

        Raises:
            RuntimeError: a block was not taken: a defect of the engine, never of its input.
        """
        for block in reversed(blocks):
            if not self._users[block]:
                raise RuntimeError(f"KV block {block} was freed twice")
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._of_block:
                self._unused[block] = None
            else:
                self._free.append(block)

    # --- prefixes -------------------------------------------------------------------------------

    def beginning(self, salt: bytes) -> Link:
        """Where a chain starts. Only chains of the same salt share blocks."""
        return Link(-1, salt, None, self._digest(self._key, b"salt" + salt))

    def find(self, start: Link, tokens: Sequence[int], size: int) -> list[Link]:
        """The longest run of remembered blocks of `size` tokens that `tokens` begin with.

        Each is taken, as by `allocate`; to be given back with `free`.
        """
        found: list[Link] = []
        link = start
        for at in range(0, len(tokens) - size + 1, size):
            part = tuple(tokens[at : at + size])
            following = self._links.get(self._after(link, part))
            if following is None or following.tokens != part or not _same(following.parent, link):
                break
            link = following
            if self._users[link.block] == 0:
                del self._unused[link.block]
            self._users[link.block] += 1
            found.append(link)
        return found

    def remember(self, after: Link, block: int, tokens: Sequence[int]) -> Link:
        """Make a full block, whose keys and values are stored, known by what it holds.

        Returns:
            Where the chain goes on. If the content is known already (two sequences computed it at
            the same time), the block stays private and the chain follows the known one.
        """
        part = tuple(tokens)
        digest = self._after(after, part)
        known = self._links.get(digest)
        if known is not None:
            if known.tokens == part and _same(known.parent, after):
                return known
            return Link(block, part, after, digest)  # a collision: first come, first remembered
        link = Link(block, part, after, digest)
        self._links[digest] = self._of_block[block] = link
        return link

    def forget(self) -> None:
        """Forget all prefixes that nobody is using."""
        while self._unused:
            block, _ = self._unused.popitem()
            del self._links[self._of_block.pop(block).digest]
            self._free.append(block)

    def _after(self, link: Link, tokens: tuple[int, ...]) -> bytes:
        content = link.digest + np.asarray(tokens, np.int32).tobytes()
        return self._digest(self._key, content)

    def check_idle(self) -> None:
        """Assert that nobody uses any block, and that each is free or remembered, exactly once.

        Raises:
            RuntimeError: blocks leaked.
        """
        known = sorted([*self._free, *self._unused])
        if any(self._users) or known != list(range(self.num_blocks)):
            raise RuntimeError(f"{self.num_blocks - self.num_free} KV blocks were not given back")
        if self._of_block.keys() != self._unused.keys() or len(self._links) != len(self._unused):
            raise RuntimeError("remembered KV blocks and their index disagree")


def _same(a: Link | None, b: Link | None) -> bool:
    """Whether two links stand for the same chain. Remembered ones are unique objects; the
    beginnings are compared by their salt."""
    while a is not b:
        if a is None or b is None or a.tokens != b.tokens:
            return False
        a, b = a.parent, b.parent
    return True
