"""One headless ComfyUI with the pack in it, warm from row to row: what a worker draws with."""

from __future__ import annotations

import hashlib
import os
import re
import tomllib
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import requests

from batch.store import File
from tools.harness import server, testhost
from tools.harness.client import Client, GraphError, Image, Prompt

NO_MODELS, OF_FOLDERS = ("configs", "custom_nodes"), "diffusers"
"""Kinds of the server's folders: those whose files are no weights, and the one in which a folder is a model."""
SILENCE = 3600.0  # seconds without a word from the server after which it is started again
NAN = "invalid value encountered in cast"
"""What NumPy says when ComfyUI turns a picture with NaN into bytes: the picture comes out black."""


@dataclass(frozen=True)
class Setup:
    """How each worker starts its ComfyUI; paths are those of the worker's machine."""

    folder: Path | None
    """The user's own ComfyUI with its models and other packs; None: the tested release, with koala-tiny alone."""
    python: str | None
    """What runs it, where that is not its own environment's."""
    inputs: Path | None
    """Pictures for Load Image; None: the ComfyUI's own input folder."""
    on_cpu: bool
    """No GPU is used, if there is one."""
    share: int
    """How many workers a machine has: each gets its part of the cores."""


class Comfy:
    """A running server. ``close`` ends it; so does the end of this process, whatever it is."""

    def __init__(self, setup: Setup, pack: Path):
        """``pack`` is the registry's zip, put in unless the user's own ComfyUI has the pack. Raises UserError."""
        self._setup, self._pack = setup, pack
        self._host = testhost.own_host(setup.folder, setup.python) if setup.folder else testhost.test_host()
        self._running = ExitStack()
        self._kept: set[Image] = set()
        self.restart()

    def restart(self) -> None:
        """Start again, after the server has gone, say. Raises UserError."""
        self.close()
        self._kept = set()
        _set_environment(self._setup.share)
        arguments = ["--cpu"] if self._setup.on_cpu else []
        options: dict[str, Any] = {"install": self._install, "arguments": arguments}
        if self._host.borrowed:
            options["model_folders"] = {"custom_nodes": [self._host.folder / "custom_nodes"]}
        if self._inputs:
            arguments += ["--input-directory", str(self._inputs)]
        self._server = self._running.enter_context(server.running(self._host, **options))
        self._client = Client(self._server.url, SILENCE)

    def close(self) -> None:
        """End the server."""
        self._running.close()

    def object_info(self) -> dict[str, Any]:
        """Every node's schema, by class name."""
        return self._client.object_info()

    def run(self, graph: Prompt, canvas: dict[str, Any] | None) -> tuple[File, ...]:
        """Run a graph and take what it has saved, in the order of its nodes.

        Raises GraphError if the server refuses the graph, a node fails, nothing is saved or a picture has NaN in it;
        ConnectionError if the server has gone.
        """
        said = self._server.log.stat().st_size
        result = self._client.run(graph, canvas)
        saved = [output for output in _outputs(result.outputs) if output.type == "output"]
        with open(self._server.log, encoding="utf-8", errors="replace") as log:
            log.seek(said)
            has_nan = NAN in log.read()
        if has_nan:
            self.restart()  # it would name the picture again for the next row, and say no more of it
            raise GraphError("The picture has NaN in it and would be saved black", {})
        self._forget_all_but({*saved})
        if not saved:
            raise GraphError("The graph saves nothing: it needs a node such as Save Image", {})
        try:
            return tuple(File(PurePosixPath(one.filename).suffix, self._client.view(one)) for one in saved)
        except requests.HTTPError as error:
            raise GraphError(f"What the graph has saved cannot be fetched ({error})", {}) from error

    def pack_version(self) -> str:
        """Of the KOALA pack that is in it."""
        with zipfile.ZipFile(self._pack) as packed:
            project = _project(packed)
        return self._own_packs().get(project["name"], project["version"])

    def hashes(self, names: Iterable[str]) -> dict[str, str]:
        """SHA-256 of the files and folders of these names, such as "sdxl.safetensors", of those that are there.

        Models and input pictures; a name that is in several of the server's folders stands for all of them.
        """
        kinds = [kind for kind in self._client.get("/experiment/models") if kind["name"] not in NO_MODELS]
        places = [(Path(folder), kind["name"] == OF_FOLDERS) for kind in kinds for folder in kind["folders"]]
        places += [(self._inputs, False)] if self._inputs else []
        wanted, found = {name.replace("\\", "/").removesuffix(" [input]"): name for name in names}, defaultdict(list)
        for place, folders in places:
            for path in _below(place, folders):
                if name := wanted.get(path.relative_to(place).as_posix()):
                    found[name].append(path)
        return {name: _hash(sorted(set(paths))) for name, paths in found.items()}

    def _forget_all_but(self, saved: set[Image]) -> None:
        """Remove what earlier graphs have saved, but for what this one names again: ComfyUI does not save it anew."""
        for one in self._kept - saved:
            (self._server.base / "output" / one.subfolder / one.filename).unlink(missing_ok=True)
        self._kept = saved

    @property
    def _inputs(self) -> Path | None:
        """The folder with pictures for Load Image."""
        return self._setup.inputs or (self._host.folder / "input" if self._host.borrowed else None)

    def _install(self, custom_nodes: Path) -> None:
        with zipfile.ZipFile(self._pack) as packed:
            name = _project(packed)["name"]
            if name not in self._own_packs():
                packed.extractall(custom_nodes / name)

    def _own_packs(self) -> dict[str, str]:
        """Name and version of the packs in the user's own ComfyUI."""
        return _packs(self._host.folder / "custom_nodes") if self._host.borrowed else {}


def candidates(values: Iterable[object]) -> set[str]:
    """Of a graph's values those that can be names of model files: a short line of text."""
    return {value for value in values if isinstance(value, str) and 0 < len(value) < 256 and "\n" not in value}


def _set_environment(share: int) -> None:
    """For the server that this process starts next.

    Ray gives an actor one OpenMP thread; two servers with PyTorch's default wait for each other.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // share))
    os.environ.update(testhost.OPENMP)
    os.environ["PYTHONWARNINGS"] = f"always:{NAN}:RuntimeWarning"  # said for each picture, not once


def _outputs(outputs: dict[str, dict[str, Any]]) -> list[Image]:
    """All files that nodes have shown: pictures, and what other packs call gifs, audio and so on."""

    def order(node: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", node)]

    entries = [
        entry
        for node in sorted(outputs, key=order)
        for shown in outputs[node].values()
        if isinstance(shown, list)
        for entry in shown
        if isinstance(entry, dict) and {"filename", "subfolder", "type"} <= entry.keys()
    ]
    return [Image(entry["filename"], entry["subfolder"], entry["type"]) for entry in entries]


def _project(packed: zipfile.ZipFile) -> dict[str, str]:
    """What the packed pack says of itself."""
    project: dict[str, str] = tomllib.loads(packed.read("pyproject.toml").decode())["project"]
    return project


def _packs(custom_nodes: Path) -> dict[str, str]:
    """Name and version of the packs that are installed."""
    found = {}
    for file in custom_nodes.glob("*/pyproject.toml"):
        try:
            project = tomllib.loads(file.read_text("utf-8"))["project"]
            if file.parent.suffix != ".disabled":
                found[str(project["name"])] = str(project["version"])
        except (tomllib.TOMLDecodeError, KeyError, UnicodeDecodeError):
            continue  # another pack's, which is none of ours
    return found


def _below(folder: Path, folders: bool) -> Iterator[Path]:
    """All files in a folder, at any depth, and if ``folders`` all folders."""
    for place, inside, files in os.walk(folder, followlinks=True):
        yield from (Path(place, name) for name in (*(inside if folders else ()), *files))


def _hash(paths: list[Path]) -> str:
    """Of the content of files, and of all files of folders."""
    whole = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                with open(file, "rb") as stream:
                    whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()
