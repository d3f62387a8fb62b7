"""Do SDXL's adapters show on a KOALA, by lineage and learned anew? Trains, carries over, draws and counts.

Usage: python -m tools.run koala_sdxl.distill.study.effects --teacher DIR --work DIR [--students NAME ...]
                                   [--effects NAME ...] [--seeds N ...]

Every part is kept in the work folder, so that an interrupted run goes on; several, of different effects or seeds, can
run side by side. The figures go to runs/effects.json in the work folder: run once more with all of them at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from ....koala.files.atomic_write import replace_file
from .applied import Family
from .measure import Row, Study, figures, say
from .student import STUDENTS, distilled
from .table import EFFECTS


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="effects", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--teacher", type=Path, required=True, help="sdxl-tiny's diffusers folder")
    parser.add_argument("--work", type=Path, required=True, help="folder of all that is made")
    names = [effect.name for effect in EFFECTS]
    parser.add_argument("--students", nargs="*", choices=list(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--effects", nargs="*", choices=names, default=names)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="of prompts, noise and carrying over")
    given = parser.parse_args(argv)
    teacher, work = given.teacher.resolve(), given.work.resolve()
    families = [Family(teacher, distilled(name, teacher, work), name) for name in given.students]
    rows: list[Row] = []
    for seed in given.seeds:
        for effect in (effect for effect in EFFECTS if effect.name in given.effects):
            for family in families:
                started = time.monotonic()
                for row in Study(family, work).rows(effect, seed):
                    say(f"{row} ({time.monotonic() - started:.0f} s)")
                    rows.append(row)
    out = work / "runs" / "effects.json"
    out.parent.mkdir(exist_ok=True)
    replace_file(out, json.dumps(figures(rows, families, work), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
