"""Do SDXL's adapters show on a KOALA, by lineage and learned anew? Trains, carries over, draws and counts.

Usage: python -m tools.run koala_sdxl.distill.study.effects --teacher DIR --work DIR [--student FILE]
                                   [--effects NAME ...] [--seeds N ...]

Every part is kept in the work folder, so that an interrupted run goes on; several, of different effects or seeds, can
run side by side. The figures of all that is there go to runs/effects.json in the work folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from tools.tiny import SHIPPED

from ....koala.files.atomic_write import replace_file
from .applied import Family
from .measure import Study, say
from .table import EFFECTS


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="effects", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--teacher", type=Path, required=True, help="sdxl-tiny's diffusers folder")
    parser.add_argument("--student", type=Path, default=SHIPPED, help="a koala-tiny's checkpoint file")
    parser.add_argument("--work", type=Path, required=True, help="folder of all that is made")
    names = [effect.name for effect in EFFECTS]
    parser.add_argument("--effects", nargs="*", choices=names, default=names)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="of prompts, noise and carrying over")
    given = parser.parse_args(argv)
    study = Study(Family(given.teacher.resolve(), given.student.resolve()), given.work.resolve())
    for seed in given.seeds:
        for effect in EFFECTS:
            if effect.name in given.effects:
                started = time.monotonic()
                for row in study.rows(effect, seed):
                    say(f"{row} ({time.monotonic() - started:.0f} s)")
                replace_file(study.file("runs", "effects.json"), json.dumps(study.figures(), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
