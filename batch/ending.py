"""Ctrl+C once while pictures are drawn: those that are begun are finished. Twice, or before: all ends at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Ending:
    """Whether the person, or the system, has asked the job to end."""

    def __init__(self) -> None:
        self.asked = False
        self._patient = False

    @classmethod
    @contextmanager
    def watched(cls) -> Iterator[Ending]:
        """Listens to Ctrl+C and SIGTERM, which a cluster sends before it takes a machine away."""
        ending = cls()
        before = {number: signal.getsignal(number) for number in SIGNALS}
        ending._listen()
        try:
            yield ending
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def be_patient(self) -> None:
        """From now on there is something to be finished. Called after Ray has begun: it listens to SIGTERM itself."""
        self._patient = True
        self._listen()

    def _listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self._patient:
            raise KeyboardInterrupt
        self.asked = True
