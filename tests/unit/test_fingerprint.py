"""What is read of a folder is what counts when someone asks whether it changed."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from koala_sdxl.koala.architecture.layout import KOALA_TINY
from koala_sdxl.koala.files.folder import folder_files
from koala_sdxl.koala.files.inspect import inspect_folder
from koala_sdxl.koala.files.stamp import fingerprint
from tests.unit.test_folder import published

_opened: list[Path] = []


def _listen(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | os.PathLike):
        _opened.append(Path(arguments[0]))


sys.addaudithook(_listen)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return published(tmp_path / "koala", KOALA_TINY)


@pytest.fixture
def opened(folder: Path) -> Callable[[], set[Path]]:
    """The folder's files that Python opened since the test began."""
    _opened.clear()
    return lambda: {path for path in _opened if path.is_relative_to(folder)}


def look(folder: Path) -> str:
    return fingerprint(folder_files(folder).values())


def test_every_file_that_is_read_counts(folder: Path, opened: Callable[[], set[Path]]) -> None:
    """Each is touched in turn: if one of them did not count, nothing would notice that it changed."""
    inspect_folder(folder)
    read = opened()
    assert len(read) == 6
    for path in read:
        before = look(folder)
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
        assert look(folder) != before, path


def _overwrite(path: Path) -> None:
    before = path.stat()
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replace(path: Path) -> None:
    shutil.copy2(path, path.with_name("other"))
    path.with_name("other").replace(path)


@pytest.mark.parametrize("change", [_overwrite, _replace, Path.unlink])
@pytest.mark.parametrize("part", ["unet", "text_encoder_2", "vae", "scheduler/scheduler_config.json"])
def test_a_change_shows_even_with_the_size_and_time_of_before(
    change: Callable[[Path], None], part: str, folder: Path
) -> None:
    before = look(folder)
    change(folder_files(folder)[part])
    assert look(folder) != before


def test_what_is_added_and_read_from_then_on_shows(folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").rename(folder / "away")
    before = look(folder)
    (folder / "away").rename(folder / "scheduler" / "scheduler_config.json")
    assert look(folder) != before
    before = look(folder)
    shutil.copy2(folder_files(folder)["vae"], folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert look(folder) != before


def test_what_is_not_read_does_not_count(folder: Path) -> None:
    before = look(folder)
    (folder / "README.md").write_text("text")
    (folder / "model_index.json").write_text("{}")
    assert look(folder) == before


def test_the_target_of_a_link_counts(tmp_path: Path, folder: Path) -> None:
    """Hugging Face's cache: a snapshot of links to blobs, and a folder name that never changes."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "models--etri-vilab--koala-700m" / "snapshots" / "0123"
    blobs.mkdir()
    for number, path in enumerate(sorted(item for item in folder.rglob("*") if item.is_file())):
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / str(number))
        link.symlink_to(blobs / str(number))
    inspect_folder(snapshot)
    for path in folder_files(snapshot).values():
        before = look(snapshot)
        _overwrite(path.resolve())
        assert look(snapshot) != before, path
        before = look(snapshot)
        other = Path(shutil.copy2(path.resolve(), blobs / "other"))
        path.unlink()
        path.symlink_to(other)
        assert look(snapshot) != before, path
        other.rename(blobs / f"{path.name}-new")
        path.unlink()
        path.symlink_to(blobs / f"{path.name}-new")
