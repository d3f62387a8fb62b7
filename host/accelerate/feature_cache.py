"""One run of a sampler on an accelerated MODEL: what is computed in full, and what the rest goes by."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from .plan import reach

KEPT = 2
"""Features kept for each prompt: the next is foretold from the last two."""

Key = Hashable


class Run:
    """Made when sampling begins, gone when it ends, by an error or a cancellation too: nothing outlives it.

    ``sigmas``: the noise level at which each step begins, falling. ``full``: the steps to compute in full. ``patcher``:
    the MODEL that is sampled. ``in_full``: why features are not reused in this run, or nothing.
    """

    def __init__(self, sigmas: Sequence[float], full: frozenset[int], patcher: Any = None) -> None:
        self.sigmas = tuple(sigmas)
        self.full = full
        self.patcher = patcher
        self.in_full = ""
        self.evaluations = self.guided = 0
        self._computed: set[int] = set()  # evaluations, by number
        self._foretold: set[int] = set()
        self._sigma = math.inf
        self._step = -1
        self._is_due = True
        self._seen: set[Key] = set()
        self._features: dict[Key, deque[tuple[float, torch.Tensor]]] = {}
        self._newest = math.inf  # when the last feature was computed

    def __str__(self) -> str:
        full = self.evaluations - len(self._foretold - self._computed)
        why = f": {self.in_full}" if self.in_full else ""
        return f"{full} of {self.evaluations} passes in full, {self.guided} with guidance{why}"

    def begin(self, sigma: float) -> None:
        """A new evaluation of the model, at a noise level."""
        step = max((step for step, at in enumerate(self.sigmas) if at >= sigma), default=0)
        self._is_due = step in self.full and step > self._step
        self._step = max(step, self._step)
        self._sigma = sigma
        self._seen.clear()
        self.evaluations += 1

    def foretold(self, keys: Sequence[Key]) -> torch.Tensor | None:
        """The deep feature to go on with, (batch of all keys, channels, height, width); None: compute it."""
        if self._seen.intersection(keys):
            self.in_full = "a step asked the model more than once for the same prompt, as tiled sampling does"
            self._features.clear()
        self._seen.update(keys)
        if self._is_due or self.in_full or not all(map(self._is_known, keys)):
            return None
        self._foretold.add(self.evaluations)
        return torch.cat([self._foretell(key) for key in keys])

    def keep(self, keys: Sequence[Key], feature: torch.Tensor) -> None:
        """Keep a computed deep feature."""
        if self.in_full:
            return
        self._computed.add(self.evaluations)
        self._newest = self._sigma
        for key, part in zip(keys, feature.chunk(len(keys)), strict=True):
            kept = self._features.setdefault(key, deque(maxlen=KEPT))
            if kept and kept[-1][0] == self._sigma:
                kept.pop()
            kept.append((self._sigma, part))

    def _is_known(self, key: Key) -> bool:
        """Two features, the later one of the last full evaluation: a prompt that comes and goes begins anew."""
        kept = self._features.get(key)
        return kept is not None and len(kept) == KEPT and kept[-1][0] == self._newest

    def _foretell(self, key: Key) -> torch.Tensor:
        """Along the line through the last two in log sigma, ever less the further away: a damped trend (Gardner and
        McKenzie 1985). On koala-tiny it was nearer than the line itself, and that than one in time steps or sigma."""
        (earlier, first), (later, second) = self._features[key]
        return torch.lerp(first, second, 2 - math.exp(-reach(earlier, later, self._sigma)))
