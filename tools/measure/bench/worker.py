"""The other side of ``process.Worker``: python -m tools.measure.bench.worker ENGINE DEVICE.

Reads a task a line on stdin, [name, arguments], and answers with a line of JSON on stdout. It ends with stdin, in the
middle of a task, too, or with a traceback on stderr at the first task that fails.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from tools.harness import lifeline
from tools.measure.bench.tasks import tasks


def main(engine: str, device: str) -> None:
    """Do tasks until there are no more."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no answer
    functions = tasks(engine, device)
    with torch.inference_mode():  # as ComfyUI runs its nodes
        for line in lifeline.lines(sys.stdin):
            name, arguments = json.loads(line)
            print(json.dumps(functions[name](**arguments)), file=replies, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
