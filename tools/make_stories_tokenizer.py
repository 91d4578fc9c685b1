"""Write the tokenizer of the 260K-parameter story model as `tokenizer.model`.

The model's own files (llama2.c, MIT licence) hold a SentencePiece vocabulary as a bare list of
scores and pieces, spaces spelt out. This writes it as the SentencePiece model it once was, with the
configuration that says how llama2.c uses it: a space before every text, the begin token in front
of it, and again the begin token where a story ends.

    python tools/make_stories_tokenizer.py tok512.json src/earnest/hub/stories
"""

from __future__ import annotations

import sys
from pathlib import Path

from earnest.files import read_json, staged_file, write_json
from earnest.tokenizer.sentencepiece_proto import SPACE, PieceType, SentencePieceModel, byte_of

SPECIAL = {"<unk>": PieceType.UNKNOWN, "<s>": PieceType.CONTROL, "</s>": PieceType.CONTROL}


def stories_model(pieces: list[tuple[str, float]]) -> SentencePieceModel:
    """The SentencePiece model of a llama2.c vocabulary: (piece, score) by id."""
    texts = [text.strip("\n") for text, _ in pieces[: len(SPECIAL)]]
    if texts != list(SPECIAL):
        raise SystemExit(f"not a llama2.c vocabulary: it begins with {texts}")
    texts += [text.replace(" ", SPACE) for text, _ in pieces[len(SPECIAL) :]]
    return SentencePieceModel(
        texts,
        [score for _, score in pieces],
        [
            SPECIAL.get(text, PieceType.NORMAL if byte_of(text) is None else PieceType.BYTE)
            for text in texts
        ],
        byte_fallback=True,
        add_dummy_prefix=True,
    )


def main(source: Path, destination: Path) -> None:
    """Read the JSON form of the vocabulary, write the two files."""
    pieces = [(text, score) for text, score in read_json(source)["pieces"]]
    destination.mkdir(parents=True, exist_ok=True)
    with staged_file(destination / "tokenizer.model") as file:
        file.write(stories_model(pieces).serialized())
    write_json(
        destination / "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "add_prefix_space": True,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 512,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "eot_token": "<s>",
            "pad_token": "<unk>",
            "unk_token": "<unk>",
        },
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
