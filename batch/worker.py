"""A worker: one of Ray's actors, with a ComfyUI of its own, that draws one row after the other."""

from __future__ import annotations

import json
import os
import platform
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import ray

from batch import manifest
from batch.comfy import Comfy, Setup
from batch.ledger import HEARTBEAT, MOST_STARTS, Answer, Ended, Verdict
from batch.manifest import Outcome
from batch.plan import Recipe
from batch.store import LOCK, File, StorageError, Store
from batch.workflow import Graph
from tools.harness.client import GraphError, Interrupted
from tools.harness.errors import UserError

NO_ROOM = "No space left on device"
BROKEN = re.compile(r"(CUDA|HIP) error|AcceleratorError", re.IGNORECASE)
"""Errors after which nothing runs on the GPU in that process any more."""
STARTS = 2
"""Of a ComfyUI before its worker gives up: a port may be taken in the meantime."""


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
    """Takes blocks of rows (each with ``row``, ``id``, ``values`` as JSON) and gives the manifest's rows for them."""

    def __init__(self, recipe: Recipe, store: Store, ledger: Any, start: Callable[[], Artist], threads: bool):
        """``ledger`` is the handle of a Ledger; ``threads``: each thread of this actor counts as a worker.

        A worker whose ComfyUI does not start leaves the rows to the others.
        """
        self._recipe, self._store, self._ledger = recipe, store, ledger
        self._process, self._threads = f"{platform.node()}:{os.getpid()}", threads
        self._artist: Artist | None = None
        self._left = False
        threading.Thread(target=_beat, args=(ledger, self._process), daemon=True).start()
        if ray.get(ledger.progress.remote()).stopped:
            return
        folder = store.local()
        if folder and not (folder / LOCK).exists():
            self._retire(
                f"{platform.node()}: {folder} is not the folder that the job writes to. Give an --out that all "
                "machines share, under the same path, or an object store."
            )
            return
        for last in range(STARTS):
            try:
                self._artist = start()
                return
            except (UserError, OSError) as error:
                if last == STARTS - 1:
                    self._retire(str(error))

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
        made: list[Outcome] = []
        ended: Ended | None = None
        for row in block["rows"][0].as_py():
            one = None if self._left else self._row(row["row"], row["id"], tuple(json.loads(row["values"])), ended)
            if one is None:
                break
            made.append(one)
            ended = Ended(one.id, one.error is not None)
        if ended:
            self._ledger.end.remote(self._name, ended)  # nobody waits: the picture is there
        return manifest.table(made)

    def _row(self, number: int, row_id: str, values: tuple[Any, ...], before: Ended | None) -> Outcome | None:
        """What becomes of a row; ``before``: the one that the ledger is still to be told of."""
        blank = Outcome(number, row_id, self._recipe.inputs(values), worker=self._name)
        try:
            made = self._draw(blank, values, before)
        except StorageError as error:
            ray.get(self._ledger.stop.remote(str(error)))
            made = None
        if made is None:
            self._left = True
            ray.get(self._ledger.leave.remote(self._name))
            return None
        return replace(made, finished=time.time())

    def _draw(self, blank: Outcome, values: tuple[Any, ...], before: Ended | None) -> Outcome | None:
        """Until the row has its picture or its error; None if the job ends before. Raises StorageError."""
        why = ""
        while True:
            if self._artist is None:
                self._wait()
                return None
            answer: Answer = ray.get(self._ledger.begin.remote(self._name, blank.id, why, before))
            if answer.verdict is Verdict.LEAVE:
                return None
            if answer.tried and (pictures := self._store.find(blank.id)):  # a worker that was killed had come so far
                return blank.with_pictures(pictures)
            if answer.verdict is Verdict.SET_ASIDE:
                last = f"; at last: {answer.why}" if answer.why else ""
                return replace(blank, error=f"Set aside: its server or worker ended {MOST_STARTS} times{last}")
            started = time.monotonic()
            try:
                graph = self._recipe.graph(blank.row, values)
                files = self._artist.run(graph, self._recipe.canvas(graph))
            except ConnectionError as error:
                why = str(error)
                self._restart()
                continue
            except (GraphError, Interrupted) as error:
                if NO_ROOM in str(error):
                    raise StorageError(f"{platform.node()}: ComfyUI cannot save ({NO_ROOM})") from error
                if BROKEN.search(str(error)):
                    why = str(error)
                    self._restart()
                    continue
                return replace(blank, error=str(error), seconds=time.monotonic() - started)
            except Exception as error:  # whatever it is, it is this row's
                told = f"{type(error).__name__}: {error}"
                return replace(blank, error=told, seconds=time.monotonic() - started)
            pictures = self._store.save(blank.id, files)
            return replace(blank.with_pictures(pictures), seconds=time.monotonic() - started)

    def _restart(self) -> None:
        try:
            self._artist.restart()  # type: ignore[union-attr]
        except (UserError, OSError) as error:
            self._artist = None
            self._retire(str(error))

    def _retire(self, reason: str) -> None:
        ray.get(self._ledger.retire.remote(reason))

    def _wait(self) -> None:
        """Keep the rows of a worker that cannot draw, until the others have drawn theirs."""
        ray.get(self._ledger.leave.remote(self._name))
        while not ray.get(self._ledger.is_over.remote()):
            time.sleep(1)


def _beat(ledger: Any, worker: str) -> None:
    with suppress(ray.exceptions.RayError):
        while True:
            ray.get(ledger.beat.remote(worker))
            time.sleep(HEARTBEAT)
