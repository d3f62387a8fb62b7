"""What is said before and after a job, and its contact sheet."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence

from PIL import Image

from batch import columns, manifest
from batch.plan import Plan, Row
from batch.resume import State
from batch.store import Store
from tools.harness.contact_sheet import contact_sheet
from tools.harness.testhost import say

SHEET = "contact-sheet.png"
SHEET_ROWS, SHEET_COLUMNS, SHEET_SIDE = 5, 8, 192  # the side in pixels
SHOWN = 3
"""How many graphs a dry run shows, and kinds of errors the end."""
MOST_FILES = 8


def say_plan(job: Plan, store: Store, left: Sequence[Row]) -> None:
    """How many rows there are and where their columns go."""
    repeated = f" ({job.repeated} more rows repeat one of them)" if job.repeated else ""
    say(f"{len(job.rows)} rows{repeated}, {len(left)} to draw now; output: {store.shown}")
    for column, place in columns.describe(job.recipe.workflow.graph, job.recipe.places):
        say(f"  {column} -> {place}")
    files = list(job.recipe.files.items())
    for name, digest in files[:MOST_FILES]:
        say(f"  {name}: SHA-256 {digest[:16]}...")
    if len(files) > MOST_FILES:
        say(f"  ... and {len(files) - MOST_FILES} more files")


def say_first_graphs(job: Plan, left: Sequence[Row]) -> None:
    """The first rows' graphs as they are sent."""
    for row in left[:SHOWN]:
        graph = job.recipe.graph(row.number, row.values)
        say(f"\nRow {row.number}, {row.id}:\n{json.dumps(graph, indent=2, ensure_ascii=False)}")


def say_end(job: Plan, store: Store, now: State) -> None:
    """What is there now, what is not and why, and how to go on."""
    say(f"Rows done: {len(now.done)} of {len(job.rows)}; {store.shown}/{manifest.FILE} lists them.")
    if now.errors:
        say(f"Rows with an error: {len(now.errors)}; --retry-errors tries them again. The most frequent:")
    for error, count in Counter((one.error or "").splitlines()[0] for one in now.errors).most_common(SHOWN):
        say(f"  {count} x {error}")
    if now.left:
        say(f"Rows left: {len(now.left)}; run the same command again.")


def draw_sheet(store: Store, now: State) -> None:
    """Pictures from all over the job, each above its row. Raises StorageError."""
    known = manifest.read(store)
    done = [known[row.id] for row in sorted(now.done, key=lambda row: row.number)]
    step = max(1, -(-len(done) // (SHEET_ROWS * SHEET_COLUMNS)))
    pictures, captions = [], []
    for one in done[::step]:
        small = _small(store.read(one.files[0]) or b"")
        if small:
            pictures.append(small)
            values = ", ".join(str(value) for value in json.loads(one.inputs).values() if value is not None)
            captions.append(f"{one.row}: {values[:60]}")
    if pictures:
        store.write(SHEET, _png(contact_sheet(pictures, captions, SHEET_COLUMNS)))


def _small(content: bytes) -> bytes | None:
    """A picture's thumbnail as PNG; None for what is no picture, such as a video."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.draft("RGB", (SHEET_SIDE, SHEET_SIDE))
            image.thumbnail((SHEET_SIDE, SHEET_SIDE))
            return _png(image.convert("RGB"))
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError):
        return None


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
