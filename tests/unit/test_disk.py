"""Weights are written whole or not at all, and never over what is there."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from koala_sdxl.koala.files import atomic_write as disk
from koala_sdxl.koala.files import unfinished
from koala_sdxl.koala.files.atomic_write import SaveError, replace_file, write_bytes, write_safetensors, written_whole

ROOT = Path(__file__).parents[2]
MEGABYTE = 1 << 20
ONE = {"x": torch.ones(1)}


def zeros(megabytes: int) -> dict[str, torch.Tensor]:
    return {"x": torch.zeros(megabytes * MEGABYTE, dtype=torch.uint8)}


def save(target: Path, tensors: dict[str, torch.Tensor]) -> None:
    with written_whole(target, sum(tensor.nbytes for tensor in tensors.values())) as aside:
        write_safetensors(aside, tensors, {"a": "ä"})


def test_tensors_and_metadata_are_read_back(tmp_path: Path) -> None:
    values = torch.linspace(-3, 3, 35).view(5, 7)
    tensors = {"half": values.half(), "fp8": values.to(torch.float8_e4m3fn), "ids": torch.arange(3), "turned": values.T}
    save(tmp_path / "a.safetensors", tensors)
    read = load_file(tmp_path / "a.safetensors")
    assert {name: tensor.dtype for name, tensor in read.items()} == {k: tensor.dtype for k, tensor in tensors.items()}
    assert all(torch.equal(read[name].float(), tensor.float()) for name, tensor in tensors.items())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"a": "ä"}
    assert [item.name for item in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_a_file_may_be_read_by_whom_any_new_file_may(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        save(tmp_path / "a", ONE)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("write", [lambda path: write_safetensors(path, ONE, {}), lambda path: write_bytes(path, b"x")])
def test_all_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any
) -> None:
    flushed = []

    def flush(number: int) -> None:
        flushed.append((os.fstat(number).st_ino, os.fstat(number).st_size, (tmp_path / "a").exists()))

    monkeypatch.setattr(os, "fsync", flush)
    with written_whole(tmp_path / "a", 0) as aside:
        write(aside)
    written = (tmp_path / "a").stat()
    assert flushed == [(written.st_ino, written.st_size, False)]


def test_what_has_the_name_already_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"precious")
    (tmp_path / "b").mkdir()
    for name in ("a", "b"):
        with pytest.raises(SaveError, match=f"{name} is in .* already and was left as it is"):
            save(tmp_path / name, ONE)
    with pytest.raises(SaveError, match=r"a is in .* already"), written_whole(tmp_path / "a", 0) as aside:
        aside.mkdir()
    assert (tmp_path / "a").read_bytes() == b"precious"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a", "b"]


def test_a_file_system_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    save(tmp_path / "a", ONE)
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(SaveError, match="already"):
        save(tmp_path / "a", zeros(1))
    assert (tmp_path / "a").read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    begun = []
    with (
        pytest.raises(SaveError, match=rf"no space left for a: [\d.]+ GB needed in {tmp_path} .* run again"),
        written_whole(tmp_path / "a", 2 * shutil.disk_usage(tmp_path).free) as aside,
    ):
        begun.append(aside)
    assert not begun


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("cancelled"), MemoryError])
def test_what_breaks_off_leaves_nothing_behind(tmp_path: Path, error: BaseException | type[BaseException]) -> None:
    def break_off(aside: Path) -> None:
        write_safetensors(aside, ONE, {})
        assert list(tmp_path.iterdir()) == [aside.parent]
        raise error

    with (
        pytest.raises(error if isinstance(error, type) else type(error)),
        written_whole(tmp_path / "a.safetensors", 0) as aside,
    ):
        break_off(aside)
    assert not list(tmp_path.iterdir())


def test_half_a_folder_is_deleted(tmp_path: Path) -> None:
    def break_off(aside: Path) -> None:
        (aside / "inner").mkdir(parents=True)
        write_bytes(aside / "inner" / "file", b"text")
        raise RuntimeError

    with pytest.raises(RuntimeError), written_whole(tmp_path / "a", 0) as aside:
        break_off(aside)
    assert not list(tmp_path.iterdir())


def test_a_file_larger_than_allowed_leaves_nothing_behind(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MEGABYTE, limits[1]))
    try:
        with pytest.raises(SaveError, match=r"no space left for a: 0\.00 GB needed"):
            save(tmp_path / "a", zeros(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match=r"a could not be written in .*nowhere: No such file or directory\."):
        save(tmp_path / "nowhere" / "a", ONE)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of eight megabytes; only root can make one."""
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_disk_that_is_too_small_is_refused_untouched(small_disk: Path) -> None:
    with pytest.raises(SaveError, match=r"no space left for a: 0\.01 GB needed in .* \(0\.01 GB are free\)"):
        save(small_disk / "a", zeros(10))
    assert not list(small_disk.iterdir())


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_behind(small_disk: Path) -> None:
    def fill_and_write(aside: Path) -> None:
        with suppress(OSError), (small_disk / "other").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(MEGABYTE // 2))
        write_safetensors(aside, zeros(6), {})

    with (
        pytest.raises(SaveError, match=r"no space left for a: .*\(No space left on device\)\. Free space"),
        written_whole(small_disk / "a", 6 * MEGABYTE) as aside,
    ):
        fill_and_write(aside)
    assert [item.name for item in small_disk.iterdir()] == ["other"]


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (
            'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })',
            r"no space left for a: .*\(No space left on device\)\. Free space",
        ),
        (
            'Error while serializing: I/O error: Permission denied (os error 13) at path "b"',
            r"a could not be written in .*: Permission denied\. Make the folder writable",
        ),
        ("something new", r"a could not be written in .*: something new\. Make the folder writable"),
    ],
)
def test_what_the_library_says_in_other_versions_or_of_other_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, text: str
) -> None:
    def fail(*_: object) -> None:
        raise SafetensorError(said)

    monkeypatch.setattr(disk, "save_file", fail)
    with pytest.raises(SaveError, match=text):
        save(tmp_path / "a", ONE)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="255 bytes are POSIX's")
def test_a_name_that_the_file_system_takes_is_written(tmp_path: Path) -> None:
    """However long: what is written to meanwhile has a short name."""
    longest = "ä" * 121 + "." + "safetensors"
    assert len(longest.encode()) == 254
    save(tmp_path / longest, ONE)
    with written_whole(tmp_path / ("b" * 255)) as aside:
        aside.mkdir()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["b" * 255, longest]


@pytest.mark.skipif(os.name == "nt", reason="255 bytes are POSIX's")
def test_a_name_that_is_too_long_is_said_before_anything_is_written(tmp_path: Path) -> None:
    begun = []
    with (
        pytest.raises(SaveError, match=r"^(ä){60}\.\.\. is too long a name for .*: it has 256 bytes with its number"),
        written_whole(tmp_path / ("ä" * 128)) as aside,
    ):
        begun.append(aside)
    assert not begun


def test_a_taken_name_is_said_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    begun = []
    with pytest.raises(SaveError, match="already and was left as it is"), written_whole(tmp_path / "a") as aside:
        begun.append(aside)
    assert not begun


WRITE_AND_WAIT = """
import sys, time
from pathlib import Path
import torch
import tools  # gives the pack its import name
from koala_sdxl.koala.files.atomic_write import write_bytes, write_safetensors, written_whole
target = Path(sys.argv[1])
with written_whole(target) as aside:
    if target.suffix:
        write_safetensors(aside, {"x": torch.ones(1)}, {})
    else:
        (aside / "unet").mkdir(parents=True)
        write_bytes(aside / "model_index.json", b"{}")
    print("written", flush=True)
    time.sleep(600)
"""


@contextmanager
def writing(target: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of writing this file or folder."""
    command = [sys.executable, "-c", WRITE_AND_WAIT, str(target)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "written\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("name", ["a.safetensors", "a"])
def test_what_a_killed_process_left_is_deleted_by_the_next(name: str, tmp_path: Path) -> None:
    with writing(tmp_path / name) as process:
        process.kill()
        process.wait()
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".partial")
    assert not list(tmp_path.rglob("*.safetensors"))  # nothing that a list of models would have
    _age(left)
    save(tmp_path / name, ONE)
    assert [item.name for item in tmp_path.iterdir()] == [name]


def _age(folder: Path) -> None:
    os.utime(folder / unfinished.LOCK, (1e9, 1e9))


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    with writing(tmp_path / "theirs.safetensors"):
        (other,) = tmp_path.iterdir()
        _age(other)
        save(tmp_path / "ours.safetensors", ONE)
        assert (other / "content").is_file()
        assert sorted(item.name for item in tmp_path.iterdir()) == [other.name, "ours.safetensors"]


@pytest.mark.parametrize("name", ["koala-mine.partial", "mine.partial", "koala-" + "0" * 32])
def test_nothing_of_anybody_elses_is_deleted(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / unfinished.LOCK).touch()
    _age(tmp_path / name)
    save(tmp_path / "a.safetensors", ONE)
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted(["a.safetensors", name])


@pytest.mark.parametrize("folder", [False, True])
def test_an_older_one_is_replaced_or_stays(folder: bool, tmp_path: Path) -> None:
    target = tmp_path / "a"

    def write(text: bytes, error: Exception | None = None) -> None:
        with written_whole(target, replace=True) as aside:
            if folder:
                aside.mkdir()
            write_bytes(aside / "file" if folder else aside, text)
            if error:
                raise error

    write(b"old")
    write(b"new")
    with pytest.raises(RuntimeError):
        write(b"half", RuntimeError())
    assert (target / "file" if folder else target).read_bytes() == b"new"
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_a_small_file_is_replaced(tmp_path: Path) -> None:
    replace_file(tmp_path / "a", "ä\n")
    replace_file(tmp_path / "a", "ö\n")
    assert (tmp_path / "a").read_bytes() == "ö\n".encode()
    with pytest.raises(SaveError, match=r"b could not be written in .*nowhere"):
        replace_file(tmp_path / "nowhere" / "b", b"")
