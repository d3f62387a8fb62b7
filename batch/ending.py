"""Ctrl+C once while pictures are drawn: those that are begun are finished. Twice, or before: all ends at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Ending:
    """Whether the person, or the system, has asked the job to end."""

    def __init__(self) -> None:
        self.asked = False
        self.waits = False
        """Whether there is something to be finished."""

    @classmethod
    @contextmanager
    def watched(cls) -> Iterator[Ending]:
        """Listens to Ctrl+C and SIGTERM, which a cluster sends before it takes a machine away."""
        ending = cls()
        before = {number: signal.signal(number, ending._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield ending
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self.waits:
            raise KeyboardInterrupt
        self.asked = True
