"""A worker: one of Ray's actors, with a ComfyUI of its own, that draws one row after the other."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import ray

from batch import manifest
from batch.comfy import Comfy, Setup
from batch.ledger import HEARTBEAT, MOST_STARTS, Verdict
from batch.manifest import Outcome
from batch.plan import Recipe
from batch.store import File, Picture, StorageError, Store
from batch.workflow import Graph
from tools.harness.client import GraphError, Interrupted
from tools.harness.errors import UserError

STORE_WAITS = (1.0, 5.0, 25.0)
"""Seconds before each new try of a write: networks come back."""
NO_ROOM = "No space left on device"


class Artist(Protocol):
    """What a worker draws with."""

    def run(self, graph: Graph, canvas: dict[str, Any] | None) -> tuple[File, ...]:
        """As Comfy's."""
        ...

    def restart(self) -> None:
        """As Comfy's."""
        ...

    def close(self) -> None:
        """As Comfy's."""
        ...


def comfy(setup: Setup, pack: Path, files: dict[str, str]) -> Comfy:
    """A ComfyUI whose models and input pictures are those of the plan. Raises UserError."""
    made = Comfy(setup, pack)
    found = made.hashes(files)
    if differing := sorted(name for name in files if found.get(name) != files[name]):
        made.close()
        name = differing[0]
        what = f"its SHA-256 is {found[name]}, expected {files[name]}" if name in found else "it is not there"
        raise UserError(
            f"{platform.node()}: {name} is not the file that the job was planned with ({what}). Put the same files on "
            "all machines."
        )
    return made


class Worker:
    """Takes blocks of rows (columns ``row``, ``id``, ``values`` as JSON) and gives the manifest's rows for them."""

    def __init__(self, recipe: Recipe, store: Store, ledger: Any, start: Callable[[], Artist], threads: bool):
        """``ledger`` is the handle of a Ledger; ``threads``: each thread of this actor counts as a worker.

        A ComfyUI that does not start ends the job, in words.
        """
        self._recipe, self._store, self._ledger = recipe, store, ledger
        self._process, self._threads = f"{platform.node()}:{os.getpid()}", threads
        self._artist: Artist | None = None
        threading.Thread(target=self._beat, daemon=True).start()
        try:
            self._artist = start()
        except UserError as error:
            self._stop(str(error))

    @property
    def _name(self) -> str:
        """By which ledger and manifest know the worker."""
        return f"{self._process}/{threading.get_ident()}" if self._threads else self._process

    def __del__(self) -> None:
        """Ray Data's word for the end of an actor that nobody has killed."""
        if self._artist:
            self._artist.close()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Rows that the end of the job leaves for the next run are not in what is returned."""
        made = (self._row(row["row"], row["id"], tuple(json.loads(row["values"]))) for row in block.to_pylist())
        return manifest.table([one for one in made if one])

    def _row(self, number: int, row_id: str, values: tuple[Any, ...]) -> Outcome | None:
        blank = Outcome(number, row_id, self._recipe.inputs(values), worker=self._name)
        try:
            made = self._draw(blank, values)
        except StorageError as error:
            self._stop(str(error))
            made = None
        if made is None:
            ray.get(self._ledger.leave.remote(self._name))
            return None
        ray.get(self._ledger.end.remote(self._name, row_id, made.error is not None))
        return replace(made, finished=time.time())

    def _draw(self, blank: Outcome, values: tuple[Any, ...]) -> Outcome | None:
        """Until the row has its picture or its error; None if the job ends before. Raises StorageError."""
        while True:
            verdict, tries = ray.get(self._ledger.begin.remote(self._name, blank.id))
            if verdict is Verdict.LEAVE or self._artist is None:
                return None
            if tries and (pictures := self._store.find(blank.id)):  # a worker that was killed had come so far
                return blank.with_pictures(pictures)
            if verdict is Verdict.SET_ASIDE:
                return replace(blank, error=f"Set aside: its server or worker ended {MOST_STARTS} times")
            started = time.monotonic()
            try:
                graph = self._recipe.graph(blank.row, values)
                files = self._artist.run(graph, self._recipe.canvas(graph))
            except (GraphError, Interrupted) as error:
                if NO_ROOM in str(error):
                    raise StorageError(f"{platform.node()}: ComfyUI cannot save ({NO_ROOM})") from error
                return replace(blank, error=str(error), seconds=time.monotonic() - started)
            except (ConnectionError, UserError):
                if not self._restarted():
                    return None
                continue
            pictures = self._saved(blank.id, files)
            return replace(blank.with_pictures(pictures), seconds=time.monotonic() - started)

    def _saved(self, row_id: str, files: Sequence[File]) -> tuple[Picture, ...]:
        for wait in STORE_WAITS:
            try:
                return self._store.save(row_id, files)
            except StorageError:
                time.sleep(wait)
        return self._store.save(row_id, files)

    def _restarted(self) -> bool:
        try:
            self._artist.restart()  # type: ignore[union-attr]
        except UserError as error:
            self._stop(str(error))
            return False
        return True

    def _stop(self, reason: str) -> None:
        ray.get(self._ledger.stop.remote(reason))

    def _beat(self) -> None:
        while True:
            self._ledger.beat.remote(self._process)
            time.sleep(HEARTBEAT)
