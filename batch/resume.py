"""What of a job is done, and what of it is left."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from batch import manifest
from batch.manifest import Outcome
from batch.plan import Plan, Row
from batch.store import Store


@dataclass(frozen=True)
class State:
    """Of a job's rows, as the output has them."""

    done: tuple[Row, ...]
    errors: tuple[Outcome, ...]
    left: tuple[Row, ...]
    """Neither."""
    untold: tuple[Outcome, ...]
    """What the manifest does not say, or says otherwise."""


def state(job: Plan, store: Store) -> State:
    """Pictures decide what is done; the manifest, which rows have an error. Raises StorageError."""
    files, known = set(store.rows()), manifest.read(store)
    done, errors, left, untold = [], [], [], []
    for row in job.rows:
        before = known.get(row.id)
        fresh = Outcome(row.number, row.id, job.recipe.inputs(row.values))
        if row.id in files:
            done.append(row)
            if before is None or before.error:
                untold.append(fresh.with_pictures(store.find(row.id)))
            else:
                untold += _retold(before, fresh)
        elif before and before.error:
            errors.append(before)
            untold += _retold(before, fresh)
        else:
            left.append(row)
    return State(tuple(done), tuple(errors), tuple(left), tuple(untold))


def _retold(before: Outcome, fresh: Outcome) -> Iterable[Outcome]:
    """The same picture may come from another row of a table that has changed."""
    now = replace(before, row=fresh.row, inputs=fresh.inputs)
    return [] if now == before else [now]


def to_draw(job: Plan, found: State, retry_errors: bool, limit: int | None) -> tuple[Row, ...]:
    """In the order of the job."""
    wanted = {row.id for row in found.left} | ({one.id for one in found.errors} if retry_errors else set())
    return tuple(row for row in job.rows if row.id in wanted)[:limit]
