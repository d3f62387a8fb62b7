"""A process that holds a GPU's memory but for some, so that others run as on a smaller card.

python -m tools.measure.bench.hog tells the bytes that are free, then reads gigabytes from stdin, a number a line, and
answers each with the bytes that it leaves to everybody else, or with -1 where so much cannot be taken. It lets go of
all when its stdin closes. Start it before them: what is in use then counts as its own.
"""

from __future__ import annotations

import subprocess
import sys
from types import TracebackType

import torch

from tools.harness.errors import UserError
from tools.harness.testhost import ROOT

GIGABYTE = 10**9


class Hog:
    """The process, as the benchmark's process sees it. Where there is no GPU it holds nothing."""

    def __init__(self, device: str) -> None:
        self._process: subprocess.Popen[str] | None = None
        if device == "cuda":
            self._process = subprocess.Popen(
                [sys.executable, "-E", "-m", "tools.measure.bench.hog"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )

    def __enter__(self) -> Hog:
        if self._process is not None:
            assert self._process.stdout
            self._process.stdout.readline()  # it has seen what is free before others begin
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.communicate()

    def leave(self, gigabytes: float) -> int | None:
        """Hold all but so much; returns how many bytes are left, None where nothing is held. Raises UserError."""
        if self._process is None:
            return None
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(f"{gigabytes}\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer or int(answer) < 0:
            raise UserError(
                f"bench fit: the GPU's memory could not be taken but for {gigabytes:g} GB; expected a card that holds "
                "more, of which others use less. End other programs on it, or leave the section out."
            )
        return int(answer)


def main() -> None:
    """Answer until stdin closes; holds nothing after memory could not be had."""
    held = torch.zeros(1, device="cuda")  # so that what CUDA takes for this process is there already
    free, _ = torch.cuda.mem_get_info()
    print(free, flush=True)
    for line in sys.stdin:
        held = torch.empty(0)
        torch.cuda.empty_cache()
        try:
            held = torch.empty(max(0, free - int(float(line) * GIGABYTE)), dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError:
            print(-1, flush=True)
            continue
        torch.cuda.synchronize()
        print(free - held.nbytes, flush=True)


if __name__ == "__main__":
    main()
