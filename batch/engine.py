"""Rows through workers, by Ray Data: it starts the workers, hands out blocks of rows, and starts dead workers again."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from batch import manifest
from batch.comfy import Comfy, Setup
from batch.ledger import Ledger
from batch.manifest import Outcome
from batch.plan import Recipe, Row
from batch.store import Store
from batch.worker import Artist, Worker, comfy
from tools.harness import lifeline
from tools.harness.errors import UserError
from tools.harness.testhost import ROOT

MOST_ROWS = 16
"""In a block: few enough for a worker to be soon through, many enough for Ray to keep up with hundreds of workers."""
SHARE = 2
"""Blocks are so small that each worker gets this many more, until they are single rows: all end together."""
IN_FLIGHT = 2
"""Blocks at a worker, so that it need not wait for the next; more would wait behind a slow card."""
SHIPPED = ("batch/*", "tools/__init__.py", "tools/*.txt", "tools/harness/*", "requirements.txt")
"""What of the checkout the workers import or read, on whatever machine they are."""
PACK = "pack.zip"
"""The packed pack, in the folder in which workers run."""
SHORT = Path("/tmp") if os.name == "posix" else None
"""Where Ray's folder is: a path of more than a hundred characters is none for a socket."""
SETTINGS = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # it would speak of its own works,
    "RAY_USAGE_STATS_ENABLED": "0",  # and to others;
    "RAY_task_events_report_interval_ms": "0",  # nor does anyone here look at its statistics,
    "RAY_enable_metrics_collection": "0",  # which take a hundredth of a core for each of its processes;
    "RAY_event_stats": "0",
    "RAY_worker_niceness": "0",  # a ComfyUI is no less worth than what else the machine does
}
STORE_BYTES = 512 * 2**20
"""Of Ray's shared memory on one machine: only rows and the packed pack are in it."""


@dataclass(frozen=True)
class Pool:
    """How many workers there are, and what each is given of its machine."""

    workers: int
    gpus: float
    """Of one worker: 1, a share of one, or 0 on CPUs."""
    share: int
    """How many of them a machine has, at most."""


@contextmanager
def connected(address: str | None, workers: int | None, pack: bytes) -> Iterator[None]:
    """Ray on this machine, or a cluster's; the workers find the packed pack as PACK. Raises UserError."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    _be_quiet()
    with lifeline.folder("koala-batch-") as shipped, _session(address, workers) as options:
        _ship(shipped)
        (shipped / PACK).write_bytes(pack)
        options |= {"runtime_env": {"working_dir": str(shipped)}, "log_to_driver": False, "configure_logging": False}
        try:
            ray.init(address=address or "local", **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{address or 'this machine'}: Ray cannot be reached or started ({error}). Expected the address that "
                "`ray start --head` printed, and the same versions of Ray and Python there."
            ) from error
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _session(address: str | None, workers: int | None) -> Iterator[dict[str, Any]]:
    """What Ray is started with; its own files, half a gigabyte in ten jobs, go with the job."""
    if address:
        yield {}
        return
    with lifeline.folder("ray-", SHORT) as folder:
        options = {"include_dashboard": False, "object_store_memory": STORE_BYTES, "_temp_dir": str(folder)}
        # One CPU, in Ray's books, for each worker; nothing else is counted there.
        yield options | ({"num_cpus": workers + 1} if workers else {})


def pool(workers: int | None, per_gpu: int) -> Pool:
    """Workers for all GPUs of the cluster; ``workers`` on CPUs instead if it is given. Raises UserError."""
    machines = [node for node in ray.nodes() if node["Alive"]]
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if workers:
        cpus = ray.cluster_resources().get("CPU", 0)
        if cpus < workers:
            raise UserError(f"--workers {workers}: the cluster has {cpus:.0f} CPUs; expected one for each worker.")
        return Pool(workers, 0, -(-workers // len(machines)))
    if not gpus:
        raise UserError(
            "Ray finds no GPU here. Expected one for each worker; give --workers N to draw on CPUs, or --address to "
            "join a cluster that has some."
        )
    most = max(int(machine["Resources"].get("GPU", 0)) for machine in machines)
    return Pool(gpus * per_gpu, 1 / per_gpu, most * per_gpu)


@contextmanager
def elsewhere(setup: Setup, of: Pool) -> Iterator[Asked]:
    """A ComfyUI on one of the cluster's machines, to be asked before the job. Raises UserError."""
    actor = ray.remote(Comfy).options(num_gpus=of.gpus, num_cpus=_cpus(of)).remote(setup, Path(PACK))
    try:
        yield _Elsewhere(actor)
    except ray.exceptions.RayActorError as error:
        raise UserError(f"No ComfyUI can be started on the cluster. {error}") from error
    finally:
        with suppress(ray.exceptions.RayError):
            ray.get(actor.close.remote())
        ray.kill(actor)


class Asked(Protocol):
    """What is asked of a ComfyUI before a job, as Comfy answers it."""

    def object_info(self) -> dict[str, Any]:
        """As Comfy's."""
        ...

    def hashes(self, names: Iterable[str]) -> dict[str, str]:
        """As Comfy's."""
        ...

    def pack_version(self) -> str:
        """As Comfy's."""
        ...


@dataclass(frozen=True)
class _Elsewhere:
    actor: Any

    def object_info(self) -> dict[str, Any]:
        found: dict[str, Any] = ray.get(self.actor.object_info.remote())
        return found

    def hashes(self, names: Iterable[str]) -> dict[str, str]:
        found: dict[str, str] = ray.get(self.actor.hashes.remote(list(names)))
        return found

    def pack_version(self) -> str:
        return str(ray.get(self.actor.pack_version.remote()))


@dataclass(frozen=True)
class Running:
    """A job at work."""

    outcomes: Iterator[list[Outcome]]
    """What becomes of the rows, as it happens."""
    ledger: Any
    """The handle of its Ledger."""


def run(recipe: Recipe, rows: Sequence[Row], store: Store, of: Pool, setup: Setup) -> Running:
    """Start a job on ComfyUI."""
    files = dict(recipe.files)
    return run_with(recipe, rows, store, of, lambda: comfy(setup, Path(PACK), files))


def run_with(
    recipe: Recipe,
    rows: Sequence[Row],
    store: Store,
    of: Pool,
    start: Callable[[], Artist],
    concurrency: int = 1,
) -> Running:
    """Start a job on anything that draws; ``concurrency`` is for artists that only wait."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.memory_usage_poll_interval_s = None  # of no use here: the pictures are in another process
    _be_quiet()
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    ledger = ray.remote(Ledger).options(num_cpus=0, scheduling_strategy=here).remote(of.workers)
    blocks = ray.data.from_arrow([_block(part) for part in parts(rows, of.workers * concurrency)])
    drawn = blocks.map_batches(
        Worker,
        fn_constructor_args=(recipe, store, ledger, start, concurrency > 1),
        batch_size=1,  # a block; where workers get GPUs, Ray does not go on without a number
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=of.workers,
            max_tasks_in_flight_per_actor=IN_FLIGHT * concurrency,
            max_concurrent_calls_per_actor=concurrency,
            enable_true_multi_threading=concurrency > 1,  # else one after the other, whatever the line above says
        ),
        num_gpus=of.gpus or None,
        num_cpus=_cpus(of),
    )
    found = drawn.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    return Running((manifest.outcomes(batch) for batch in found), ledger)


def parts(rows: Sequence[Row], workers: int) -> Iterator[Sequence[Row]]:
    """Blocks of rows, smaller and smaller towards the end."""
    start = 0
    while start < len(rows):
        size = min(MOST_ROWS, max(1, (len(rows) - start) // (workers * SHARE)))
        yield rows[start : start + size]
        start += size


def _block(rows: Sequence[Row]) -> pa.Table:
    """One row of Ray's, as a Worker takes it."""
    return pa.table({"rows": [[{"row": row.number, "id": row.id, "values": json.dumps(row.values)} for row in rows]]})


def _cpus(of: Pool) -> int:
    return 0 if of.gpus else 1


def _be_quiet() -> None:
    """Ray sets these anew when it starts, and when ray.data does."""
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _ship(folder: Path) -> None:
    for source in (file for pattern in SHIPPED for file in ROOT.glob(pattern) if file.is_file()):
        target = folder / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
