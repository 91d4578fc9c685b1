"""Text that is hard to tokenise, for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

SPACES = [" ", "  ", "      ", "\n", "\t", "\r\n", "\x85", "\xa0", "\u2028", "\u3000", "\u200b"]
CONTROLS = ["\x00", "\x07", "\x7f", "\u200d", "\ufeff", "\ufffd", "\u2581", "\u2581\u2581"]
WORDS = ["a", "The", " the", "ing", "0", "1234567", "3.14", "'s", "def f(x):\n    return x"]
SCRIPTS = ["½", "٣", "中文", "你好,", "ひら", "한국", "ปี", "é", "e\u0301", "ال", "\U00020000"]
EMOJI = ["🎉", "\U0001f468\u200d\U0001f469\u200d\U0001f467"]
NEARLY_SPECIAL = ["<", ">", "<|", "|>", "<0x41>", "<mask:2>", "<|LOC_", "</", "<s", "nk>"]
SPECIAL = [
    *("<unk>", "<s>", "</s>", "<mask:1>", "<mask:7>", "<|LOC_1|>", "<|LOC_10|>", "<|LOC_1000|>"),
    *("<|begin_of_sentence|>", "<|end_of_sentence|>", "<|IMAGE_PLACEHOLDER|>"),
    *("<|im_start|>", "<|im_end|>"),
]
FRAGMENTS = SPACES + CONTROLS + WORDS + SCRIPTS + EMOJI + NEARLY_SPECIAL + SPECIAL


def hard_text() -> st.SearchStrategy[str]:
    """Text of difficult fragments and random characters, without surrogates."""
    fragment = st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=4))
    return st.lists(fragment, max_size=12).map("".join)
