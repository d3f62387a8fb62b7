"""What is said before and after a job, and its contact sheet."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence

from PIL import UnidentifiedImageError

from batch import columns, manifest
from batch.plan import Plan, Row
from batch.store import Store
from tools.harness.contact_sheet import contact_sheet
from tools.harness.testhost import say

SHEET = "contact-sheet.png"
SHEET_ROWS, SHEET_COLUMNS, SHEET_SIDE = 5, 8, 192  # the side in pixels
SHOWN = 3
"""How many graphs a dry run shows, and kinds of errors the end."""


def say_plan(job: Plan, store: Store, left: Sequence[Row]) -> None:
    """How many rows there are and where their columns go."""
    repeated = f" ({job.repeated} repeat another row)" if job.repeated else ""
    say(f"{len(job.rows)} pictures{repeated}, {len(left)} to draw now; output: {store.location}")
    for column, place in columns.describe(job.recipe.workflow.graph, job.recipe.places):
        say(f"  {column} -> {place}")
    for name, digest in job.recipe.files.items():
        say(f"  {name}: SHA-256 {digest[:16]}...")


def say_first_graphs(job: Plan, left: Sequence[Row]) -> None:
    """The first rows' graphs as they are sent."""
    for row in left[:SHOWN]:
        graph = job.recipe.graph(row.number, row.values)
        say(f"\nRow {row.number}, {row.id}:\n{json.dumps(graph, indent=2, ensure_ascii=False)}")


def say_end(job: Plan, store: Store) -> int:
    """Say what is there, what is not and why, and how to go on; returns the number of errors. Raises StorageError."""
    known = manifest.read(store)
    mine = [known[row.id] for row in job.rows if row.id in known]
    done, errors = [one for one in mine if one.error is None], [one for one in mine if one.error]
    draw_sheet(job, store)
    say(f"{len(done)} of {len(job.rows)} pictures are in {store.location}/pictures, listed in {manifest.FILE}.")
    for error, count in Counter((one.error or "").splitlines()[0] for one in errors).most_common(SHOWN):
        say(f"  {count} rows with an error: {error}")
    if errors:
        say("  The column error of the manifest has all; --retry-errors tries these rows again.")
    if left := len(job.rows) - len(done) - len(errors):
        say(f"  {left} rows are left: run the same command again.")
    return len(errors)


def draw_sheet(job: Plan, store: Store) -> None:
    """Pictures from all over the job, each above its row. Raises StorageError."""
    known = manifest.read(store)
    done = [known[row.id] for row in sorted(job.rows, key=lambda row: row.number) if row.id in known]
    done = [one for one in done if one.files and one.files[0].endswith(".png")]
    if not done:
        return
    step = max(1, -(-len(done) // (SHEET_ROWS * SHEET_COLUMNS)))
    pictures, captions = [], []
    for one in done[::step]:
        content = store.read(one.files[0])
        if content is not None:
            pictures.append(content)
            values = ", ".join(str(value) for value in json.loads(one.inputs).values() if value is not None)
            captions.append(f"{one.row}: {values[:60]}")
    try:
        sheet = contact_sheet(pictures, captions, SHEET_COLUMNS, SHEET_SIDE)
    except UnidentifiedImageError:
        return
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    store.write(SHEET, buffer.getvalue())
