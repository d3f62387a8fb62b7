"""docs/reliability.md: what ``dev.py fuzz`` and ``dev.py soak`` found last, and which tests show the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tools.harness import inprocess, testhost
from tools.measure import history
from tools.measure.bench import meter
from tools.measure.markdown import table

PAGE = testhost.ROOT / "docs" / "reliability.md"
HISTORY = PAGE.with_suffix(".json")
OUTCOMES = ("refused", "loaded", "foreign traceback", "silent difference")


def record(kind: str, figures: Mapping[str, Any]) -> None:
    """Add today's figures to the history, and write the page. ``kind``: "fuzz" or "soak"."""
    inprocess.activate()  # the machine's entry names ComfyUI's version
    history.add(HISTORY, {"kind": kind, "machine": meter.machine("cpu"), "figures": dict(figures)})
    PAGE.write_text(page(history.read(HISTORY)), "utf-8")


def page(entries: Sequence[history.Entry]) -> str:
    """The page, with the newest figures of each kind."""
    newest = {kind: entry for (kind,), entry in history.newest(entries, "kind").items()}
    lines = [
        "# Reliability",
        "",
        "What was tried to make the pack fail, and what came of it. Figures are measured; `docs/reliability.json` has "
        "every run with its machine.",
    ]
    if "fuzz" in newest:
        lines += ["", *_fuzz(newest["fuzz"])]
    if "soak" in newest:
        lines += ["", *_soak(newest["soak"])]
    return "\n".join((*lines, "", *TESTS, ""))


def _fuzz(entry: history.Entry) -> Iterator[str]:
    found = entry["figures"]
    kinds: dict[str, dict[str, int]] = found["kinds"]
    faults = sum(counts.get(outcome, 0) for counts in kinds.values() for outcome in OUTCOMES[2:])
    yield "## Damaged files"
    yield ""
    yield (
        f"`python3 dev.py fuzz --seed {found['seed']} --cases {found['cases']}`, {entry['date']}: {found['cases']:,} "
        f"files and folders of every kind that the pack reads, each damaged in one or two ways (a tensor missing, "
        f"renamed, swapped, of another shape or type, NaN, quantised; a header that is cut, flipped or contradicts "
        f"itself; odd JSON; settings of the scheduler; something else under the file's name). {faults} faults."
    )
    yield ""
    yield from table(
        ("kind", *OUTCOMES),
        ((kind, *(counts.get(outcome, 0) for outcome in OUTCOMES)) for kind, counts in kinds.items()),
    )
    yield ""
    yield (
        "*refused*: this pack's own error, with the file's name in its first line. *loaded*: every loaded tensor is "
        "bit for bit the file's, for a LoRA: every patch has the file's numbers, and the report counts what changed; "
        "the U-Net gets the timesteps of diffusers' scheduler. *foreign traceback*: any other error. *silent "
        "difference*: a load that is not the file's. Case 12 again: `python3 dev.py fuzz --only 12`."
    )


def _soak(entry: history.Entry) -> Iterator[str]:
    found, machine = entry["figures"], entry["machine"]
    yield "## Many prompts"
    yield ""
    yield (
        f"`python3 dev.py soak --prompts {found['prompts']}`, {entry['date']}: {found['prompts']} prompts through one "
        f"server (ComfyUI {machine['versions']['ComfyUI']}, {machine['cpu']}, {machine['cores']} cores) with "
        f"koala-tiny; other prompts, seeds and sizes each time, every third with KOALA Accelerate, every fifth with a "
        f"LoRA; after every 25 all models are freed and loaded again. Memory of the server: {found['warm']:.0f} MB "
        f"after 50 prompts, {found['end']:.0f} MB at the end, {found['most']:.0f} MB at most; a straight line through "
        f"the readings after the first 50 prompts changes by {found['growth']:+.1f} MB for 100 prompts."
    )


SHOWN: tuple[tuple[str, str], ...] = (
    (
        "a sample of 200 damaged files on each change",
        "tests/dev/test_fuzz.py::test_damaged_files_are_refused_by_name_or_loaded_as_they_are",
    ),
    ("a cancelled run leaves nothing behind", "tests/host/test_nodes.py::test_a_cancelled_run_leaves_nothing_behind"),
    (
        "a cancelled run with KOALA Accelerate leaves nothing behind",
        "tests/speed/test_accelerate.py::test_a_cancelled_run_leaves_nothing",
    ),
    (
        "a cancelled save leaves nothing behind",
        "tests/parity/test_saver.py::test_a_cancelled_save_leaves_nothing_behind",
    ),
    (
        "what a killed save left is deleted by the next",
        "tests/unit/test_disk.py::test_what_a_killed_process_left_is_deleted_by_the_next",
    ),
    (
        "a file gets its name only when all of it is on the disk",
        "tests/unit/test_disk.py::test_all_is_on_the_disk_before_it_gets_its_name",
    ),
    (
        "a disk that is too small is refused before anything is written",
        "tests/unit/test_disk.py::test_a_disk_that_is_too_small_is_refused_untouched",
    ),
    (
        "a disk that fills up while a model is saved: a message, nothing left",
        "tests/unit/test_disk.py::test_a_disk_that_fills_up_meanwhile_leaves_nothing_behind",
    ),
    (
        "the same by the node in a server",
        "tests/host/test_save_node.py::test_a_full_disk_is_said_and_left_as_it_was",
    ),
    (
        "a file that is overwritten in place does not change a loaded model",
        "tests/parity/test_overwritten.py::test_a_loaded_model_is_not_the_files_any_more",
    ),
    (
        "a file that was replaced is read again",
        "tests/host/test_nodes.py::test_a_model_is_loaded_once_and_again_when_its_file_changes",
    ),
    (
        "a server of `dev.py` ends with the process that started it, whatever ends that",
        "tests/dev/test_killed.py::test_a_signal_ends_the_server_too",
    ),
)
"""What tests assert, and one test of each."""

TESTS = (
    "## Kills, cancels, full disks",
    "",
    "Asserted by tests, of which this table names one each:",
    "",
    *table(("what", "test"), ((what, f"`{test}`") for what, test in SHOWN)),
)
