"""Names of codecs: ours, those of safetensors, those of GGUF."""

from __future__ import annotations

import subprocess
import sys

import pytest
from gguf import GGMLQuantizationType, quants

from earnest import codecs
from earnest.errors import FormatError


@pytest.mark.parametrize("name", sorted(codecs.CODECS))
def test_every_codec_has_its_names(name: str) -> None:
    codec = codecs.codec(name)
    assert codec.name == name
    held = 0
    for to, back in (
        (codecs.to_safetensors, codecs.from_safetensors),
        (codecs.to_ggml, codecs.from_ggml),
    ):
        try:
            stored = to(codec)
        except FormatError as error:
            assert name in str(error)
        else:
            assert back(stored) is codec
            held += 1
    assert held, f"no container can hold {name}"


def test_every_ggml_type_that_the_package_decodes_is_supported() -> None:
    decodable = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, *quants._type_traits}
    newest = 40  # nvfp4; a later version of the package may know more
    known = {kind for kind in decodable if kind <= newest}
    assert len(known) > 20
    for kind in known:
        assert codecs.from_ggml(int(kind)).name == kind.name.lower()


@pytest.mark.parametrize("type_id", [4, 9, 15, 31, 36, 41, 999, 2**32 - 1])
def test_unsupported_ggml_types_are_named(type_id: int) -> None:
    with pytest.raises(FormatError, match=str(type_id)) as caught:
        codecs.from_ggml(type_id)
    assert "q4_k (12)" in str(caught.value)


@pytest.mark.parametrize("dtype", ["F4", "C64", "F8_E8M0", "bf16", "", "x" * 10_000])
def test_unsupported_safetensors_types_are_named(dtype: str) -> None:
    with pytest.raises(FormatError) as caught:
        codecs.from_safetensors(dtype)
    message = str(caught.value)
    assert repr(dtype)[:80] in message
    assert "BF16" in message
    assert len(message) < 1000


def test_unknown_codec_is_named() -> None:
    with pytest.raises(FormatError, match="q9_9"):
        codecs.codec("q9_9")


def test_importing_codecs_does_not_import_the_gguf_package() -> None:
    """It costs 0.2 s and is needed for the iq grids only."""
    code = "import sys, earnest, earnest.codecs; sys.exit('gguf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
