"""Who owns which KV block of a runner."""

from __future__ import annotations

from collections.abc import Sequence


class BlockPool:
    """Hands out the KV blocks of a runner.

    Freed blocks are handed out again before fresh ones, so that memory which was never touched
    stays untouched.

    Args:
        num_blocks: blocks there are; ids are 0 to `num_blocks - 1`.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._taken = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks, or none at all (None) if fewer are free."""
        if count > len(self._free):
            return None
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._taken[block] = 1
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Give blocks back.

        Raises:
            RuntimeError: a block was not taken: a defect of the engine, never of its input.
        """
        for block in reversed(blocks):
            if not self._taken[block]:
                raise RuntimeError(f"KV block {block} was freed twice")
            self._taken[block] = 0
            self._free.append(block)

    def check_idle(self) -> None:
        """Assert that every block is free, exactly once.

        Raises:
            RuntimeError: blocks leaked.
        """
        if any(self._taken) or sorted(self._free) != list(range(self.num_blocks)):
            raise RuntimeError(f"{self.num_blocks - self.num_free} KV blocks were not given back")
