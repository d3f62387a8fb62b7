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

NO_MODELS = ("configs", "custom_nodes")
"""Of the server's folders, those whose files are no weights."""
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
    threads: int | None
    """Of a server on a CPU; None: PyTorch's default."""


class Comfy:
    """A running server. ``close`` ends it; so does the end of this process, whatever it is."""

    def __init__(self, setup: Setup, pack: Path):
        """``pack`` is the registry's zip, put in unless the user's own ComfyUI has the pack. Raises UserError."""
        self._setup, self._pack = setup, pack
        self._host = testhost.own_host(setup.folder, setup.python) if setup.folder else testhost.test_host()
        self._running = ExitStack()
        self.restart()

    def restart(self) -> None:
        """Start again, after the server has gone, say. Raises UserError."""
        self.close()
        _set_environment(self._setup.threads)
        options: dict[str, Any] = {"install": self._install}
        if self._host.borrowed:
            options["model_folders"] = {"custom_nodes": [self._host.folder / "custom_nodes"]}
        if self._inputs:
            options["arguments"] = ["--input-directory", str(self._inputs)]
        self._server = self._running.enter_context(server.running(self._host, **options))
        self._client = Client(self._server.url)

    def close(self) -> None:
        """End the server."""
        self._running.close()

    def object_info(self) -> dict[str, Any]:
        """Every node's schema, by class name."""
        return self._client.object_info()

    def run(self, graph: Prompt, canvas: dict[str, Any] | None) -> tuple[File, ...]:
        """Run a graph and take what it has saved, in the order of its nodes.

        Raises GraphError if the server refuses the graph, a node fails, nothing is saved or a picture has NaN in it;
        ConnectionError or UserError if the server has gone.
        """
        said = self._server.log.stat().st_size
        result = self._client.run(graph, canvas)
        with open(self._server.log, encoding="utf-8", errors="replace") as log:
            log.seek(said)
            if NAN in log.read():
                raise GraphError("The picture has NaN in it and would be saved black", {})
        saved = [output for output in _outputs(result.outputs) if output.type == "output"]
        if not saved:
            raise GraphError("The graph saves nothing: it needs a node such as Save Image", {})
        try:
            files = tuple(File(PurePosixPath(one.filename).suffix, self._client.view(one)) for one in saved)
        except requests.HTTPError as error:
            raise GraphError(f"What the graph has saved cannot be fetched ({error})", {}) from error
        for one in saved:
            (self._server.base / "output" / one.subfolder / one.filename).unlink(missing_ok=True)
        return files

    def hashes(self, names: Iterable[str]) -> dict[str, str]:
        """SHA-256 of the files and folders of these names, such as "sdxl.safetensors", of those that are there.

        Models and input pictures; a name that is in several of the server's folders stands for all of them.
        """
        kinds = self._client.get("/experiment/models")
        folders = [folder for kind in kinds if kind["name"] not in NO_MODELS for folder in kind["folders"]]
        wanted, found = set(names), defaultdict(list)
        for folder in [*folders, *([self._inputs] if self._inputs else [])]:
            for path in _below(Path(folder)):
                name = path.relative_to(folder).as_posix()
                if name in wanted:
                    found[name].append(path)
        return {name: _hash(sorted(set(paths))) for name, paths in found.items()}

    @property
    def _inputs(self) -> Path | None:
        """The folder with pictures for Load Image."""
        return self._setup.inputs or (self._host.folder / "input" if self._host.borrowed else None)

    def _install(self, custom_nodes: Path) -> None:
        with zipfile.ZipFile(self._pack) as packed:
            project = tomllib.loads(packed.read("pyproject.toml").decode())["project"]["name"]
            if self._host.borrowed and project in _packs(self._host.folder / "custom_nodes"):
                return
            packed.extractall(custom_nodes / project)


def candidates(values: Iterable[object]) -> set[str]:
    """Of a graph's values those that can be names of model files: a short line of text."""
    return {value for value in values if isinstance(value, str) and 0 < len(value) < 256 and "\n" not in value}


def _set_environment(threads: int | None) -> None:
    """For the server that this process starts next.

    Ray gives an actor one OpenMP thread; two servers with PyTorch's default wait for each other.
    """
    os.environ.pop("OMP_NUM_THREADS", None)
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
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


def _packs(custom_nodes: Path) -> set[str]:
    found = set()
    for file in custom_nodes.glob("*/pyproject.toml"):
        try:
            found.add(tomllib.loads(file.read_text("utf-8"))["project"]["name"])
        except (tomllib.TOMLDecodeError, KeyError, UnicodeDecodeError):
            continue  # another pack's, which is none of ours
    return found


def _below(folder: Path) -> Iterator[Path]:
    """All files and folders in a folder, at any depth."""
    for place, folders, files in os.walk(folder, followlinks=True):
        yield from (Path(place, name) for name in (*folders, *files))


def _hash(paths: list[Path]) -> str:
    """Of the content of files, and of all files of folders."""
    whole = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                with open(file, "rb") as stream:
                    whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()
