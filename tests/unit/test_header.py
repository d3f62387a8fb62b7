"""Headers are read by the safetensors library, once for each file that is inspected."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from koala_sdxl.koala.architecture.layout import KOALA_TINY
from koala_sdxl.koala.files import header
from koala_sdxl.koala.files.header import CheckpointError, Header, Source, read_header
from koala_sdxl.koala.files.inspect import (
    inspect_checkpoint,
    inspect_folder,
    inspect_model,
    inspect_text_and_vae,
    inspect_text_encoder,
    inspect_unet,
    inspect_vae,
)
from tests.unit import files, reference
from tests.unit.test_folder import published
from tools.tiny import SHIPPED


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """How many times each file was opened for its header."""
    found = Counter[Path]()

    def counted(path: Path, **options: Any) -> Any:
        found[path] += 1
        return safe_open(path, **options)

    monkeypatch.setattr(header, "safe_open", counted)
    return found


@pytest.mark.parametrize("look", [inspect_unet, inspect_model, inspect_checkpoint, inspect_text_and_vae])
def test_a_single_file_is_opened_once(look: Callable[[Path], object], opened: Counter[Path]) -> None:
    look(SHIPPED)
    assert opened == {SHIPPED: 1}


def test_each_file_of_a_folder_is_opened_once(tmp_path: Path, opened: Counter[Path]) -> None:
    found = inspect_folder(published(tmp_path / "koala", KOALA_TINY))
    parts = (found.model.unet, found.text_encoder, found.text_encoder_2, found.vae)
    assert opened == {part.path: 1 for part in parts}
    assert len(opened) == 4


def test_what_was_inspected_carries_its_header(tmp_path: Path) -> None:
    unet = inspect_unet(SHIPPED)
    assert unet.header == read_header(SHIPPED)
    assert unet.shapes == unet.header.under("model.diffusion_model.")
    encoder = inspect_text_encoder(files.write(tmp_path / "l.safetensors", reference.clip_l(32, 3)))
    assert encoder.shapes == reference.clip_l(32, 3)
    vae = inspect_vae(files.write(tmp_path / "vae.safetensors", reference.vae()))
    assert (vae.prefix, vae.shapes) == ("", reference.vae())


def test_sources_are_told_apart_by_path_and_prefix() -> None:
    one, other = Header(Path("a"), {}, {}, {}), Header(Path("a"), {"x": "F16"}, {"x": (1,)}, {})
    assert Source(one) == Source(other)
    assert hash(Source(one)) == hash(Source(other))
    assert Source(one) != Source(one, "x")
    assert Source(one) != Source(Header(Path("b"), {}, {}, {}))


def test_tensors_are_listed_in_the_order_of_their_data(tmp_path: Path) -> None:
    shapes = {"b": (2,), "a": (3,), "c": (1,)}
    assert list(read_header(files.write(tmp_path / "any.safetensors", shapes)).shapes) == ["b", "a", "c"]


def _refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    return str(caught.value)


@pytest.mark.skipif(
    not Path("/proc/self/mem").exists(), reason="no file on this system that opens and cannot be mapped"
)
def test_a_file_that_cannot_be_read() -> None:
    assert _refused(Path("/proc/self/mem")).startswith("mem cannot be read (No such device")


NOBODY = 65534


@pytest.fixture
def folder_of_nobody() -> Iterator[Path]:
    """A folder that everybody may enter, and for root, whom nothing is forbidden, the rights of nobody."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextmanager
def without_rights() -> Iterator[None]:
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="no such rights on this system")
def test_a_file_without_permission(folder_of_nobody: Path) -> None:
    path = files.write(folder_of_nobody / "inner" / "it.safetensors", {"a": (1,)})
    says = "it.safetensors cannot be read (Permission denied); expected a .safetensors "
    path.chmod(0)
    with without_rights():
        assert _refused(path).startswith(says)
    path.chmod(0o644)
    path.parent.chmod(0)
    with without_rights():
        assert _refused(path).startswith(says)
    path.parent.chmod(0o755)
    with without_rights():
        read_header(path)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="no such rights on this system")
def test_a_part_without_permission(folder_of_nobody: Path) -> None:
    folder = published(folder_of_nobody / "koala", KOALA_TINY)
    (folder / "vae").chmod(0)
    with without_rights(), pytest.raises(CheckpointError, match=r"^koala/vae/.* cannot be read \(Permission denied\)"):
        inspect_folder(folder)
    (folder / "vae").chmod(0o755)


def test_a_name_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert _refused(tmp_path / "loop").startswith("loop cannot be read (Too many levels of symbolic links)")
    files.write(tmp_path / "file", {"a": (1,)})
    assert _refused(tmp_path / "file" / "it").startswith("it cannot be read (Not a directory)")
    assert "cannot be read (File name too long)" in _refused(tmp_path / ("x" * 300))


HEADERS = {
    "metadata null": (b'{"__metadata__":null,"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', ""),
    "metadata of numbers": (
        b'{"__metadata__":{"x":1},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        "is damaged",
    ),
    "metadata too deep": (b'{"__metadata__":{"x":' + b"[" * 9999 + b"]" * 9999 + b"}}", "is not a safetensors file"),
    "an endless offset": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,1e999]}}', "is not a safetensors file"),
    "an offset of no number": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,NaN]}}',
        "is not a safetensors file",
    ),
    "two of a name": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        "is damaged",
    ),
    "a negative size": (b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', "is damaged"),
    "no UTF-8": (b'{"\xff":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "is not a safetensors file"),
}
"""Headers over 8 bytes of data, and what is said of them; nothing of one that is good."""


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_is_read_or_described(kind: str, tmp_path: Path) -> None:
    text, says = HEADERS[kind]
    path = tmp_path / "it.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    if says:
        assert _refused(path).startswith(f"it.safetensors {says}")
    else:
        assert read_header(path).metadata == {}


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"^{tmp_path.name} is not a file; expected a .safetensors file of LoRA"):
        read_header(tmp_path, "LoRA weights")
