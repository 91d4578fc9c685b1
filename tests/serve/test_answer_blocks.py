"""An answer's blocks, in the order in which they are written."""

from __future__ import annotations

from earnest.serve.blocks import Block, Blocks
from earnest.serve.formats import Delta


def test_each_kind_begins_grows_and_ends() -> None:
    blocks = Blocks()
    changes = blocks.take([Delta(reasoning="h"), Delta(reasoning="m"), Delta(content="so")])
    changes += blocks.take([])
    changes += blocks.take([Delta(call=0, call_id="a", name="f"), Delta(call=0, arguments="{}")])
    changes += blocks.take([Delta(call=1, call_id="b", name="f"), Delta(call=1, arguments='{"x')])
    changes += blocks.take([Delta(content="!")]) + blocks.end() + blocks.end()
    assert [(change.index, change.what, change.more) for change in changes] == [
        *((0, "begin", ""), (0, "more", "h"), (0, "more", "m"), (0, "end", "")),
        *((1, "begin", ""), (1, "more", "so"), (1, "end", "")),
        *((2, "begin", ""), (2, "more", "{}"), (2, "end", "")),
        *((3, "begin", ""), (3, "more", '{"x'), (3, "end", "")),
        *((4, "begin", ""), (4, "more", "!"), (4, "end", "")),
    ]
    assert blocks.all == [
        Block("thoughts", "hm"),
        Block("text", "so"),
        Block("call", "{}", "a", "f"),
        Block("call", '{"x', "b", "f"),
        Block("text", "!"),
    ]
    assert [block.arguments for block in blocks.all[2:4]] == [{}, None]
