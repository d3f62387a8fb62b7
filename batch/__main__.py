"""`dev.py batch`: from a workflow and a table to a folder of pictures and a manifest."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import ray
from filelock import FileLock, Timeout

from batch import engine, manifest, plan, progress, resume, summary, table, workflow
from batch.comfy import Comfy, Setup
from batch.ending import Ending
from batch.engine import Asked, Pool
from batch.ledger import Progress
from batch.manifest import Recorder
from batch.plan import Plan, Row
from batch.store import LOCK, StorageError, Store
from batch.table import Table
from tools import commands
from tools.harness import lifeline, pack
from tools.harness.errors import UserError
from tools.harness.testhost import ROOT

STOPPED = 130
"""Exit status after Ctrl+C."""


def main(arguments: list[str]) -> int:
    """``dev.py batch``; returns 0, 1 if a row has an error, 130 after Ctrl+C. Raises UserError."""
    options = commands.parser("batch").parse_args(arguments)
    store = Store(options.out if "://" in options.out else str(Path(options.out).expanduser().absolute()))
    rows = asked(options.table, options.grid)
    try:
        with ExitStack() as stack:
            ending = stack.enter_context(Ending.watched())
            if not options.dry_run:
                stack.enter_context(alone(store))
            packed = pack.archive(ROOT)
            if options.address:
                stack.enter_context(engine.connected(options.address, options.workers, packed))
            own = Setup(
                _whole(options.comfyui),
                os.environ.get("COMFYUI_PYTHON"),
                _whole(options.inputs),
                on_cpu=bool(options.workers),
                share=1,
            )
            with asked_comfy(own, packed, engine.pool(options.workers, 1) if options.address else None) as comfy:
                found = comfy.object_info()
                read = workflow.read(options.workflow, lambda: found)
                job = plan.make(read, rows, found, comfy.hashes, comfy.pack_version())
            before = resume.state(job, store)
            left = resume.to_draw(job, before, options.retry_errors, options.limit)
            summary.say_plan(job, store, left)
            if options.dry_run:
                summary.say_first_graphs(job, left)
                return 0
            store.clear()
            manifest.append(store, before.untold)
            now = Progress()
            if left:
                if not options.address:
                    stack.enter_context(engine.connected(None, options.workers, packed))
                pool = engine.pool(options.workers, options.per_gpu)
                now = draw(job, left, store, pool, replace(own, share=pool.share), ending)
            return finish(job, store, now, ending)
    except StorageError as error:
        raise UserError(f"{error}. Nothing that was drawn is lost: run the same command again.") from error
    except ray.exceptions.RayError as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"Ray has ended the job ({first}). What is drawn is kept: run the same command again."
        ) from error


def _whole(path: Path | None) -> Path | None:
    """Workers run in another folder."""
    return path.expanduser().absolute() if path else None


def asked(file: Path | None, grids: Sequence[str]) -> Table:
    """The rows: of the file, of the grid, or each of the file's with each of the grid's. Raises UserError."""
    if file is None and not grids:
        raise UserError("No rows: expected a TABLE (.csv, .jsonl, .parquet), --grid COLUMN=VALUES, or both.")
    if file is None:
        return table.grid(grids)
    return table.crossed(table.read(file), table.grid(grids)) if grids else table.read(file)


@contextmanager
def asked_comfy(setup: Setup, packed: bytes, pool: Pool | None) -> Iterator[Asked]:
    """A ComfyUI to plan by: one of the cluster's if there is a pool of it, else one of here. Raises UserError."""
    if pool:
        with engine.elsewhere(setup, pool) as there:
            yield there
        return
    with lifeline.folder("koala-batch-") as folder:
        (folder / engine.PACK).write_bytes(packed)
        here = Comfy(setup, folder / engine.PACK)
        try:
            yield here
        finally:
            here.close()


@contextmanager
def alone(store: Store) -> Iterator[None]:
    """No other job writes to a folder meanwhile. Raises UserError if one does."""
    folder = store.local()
    if folder is None:  # an object store has no locks
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout as error:
        raise UserError(f"{folder}: another job is writing here. Wait for its end, or give another --out.") from error
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}). Give another --out.") from error


def draw(job: Plan, rows: Sequence[Row], store: Store, pool: Pool, setup: Setup, ending: Ending) -> Progress:
    """Draw rows and write down what becomes of them."""
    ending.be_patient()
    with Recorder(store) as record:
        running = engine.run(job.recipe, rows, store, pool, setup)
        with progress.shown(running.ledger, len(rows), ending):
            for outcomes in running.outcomes:
                record.add(outcomes)
        now: Progress = ray.get(running.ledger.progress.remote())
        return now


def finish(job: Plan, store: Store, now: Progress, ending: Ending) -> int:
    """One manifest and the contact sheet; returns the exit status. Raises UserError with what has ended the job."""
    found = resume.state(job, store)
    manifest.append(store, found.untold)  # of workers that were killed after the picture
    manifest.merge(store)
    summary.say_end(job, store, found)
    summary.draw_sheet(store, found)
    if found.left and not ending.asked and (reasons := [*filter(None, [now.stopped]), *now.retired]):
        raise UserError(f"{reasons[0].rstrip('.')}. What is drawn is kept: run the same command again.")
    return STOPPED if ending.asked else int(bool(found.errors))
