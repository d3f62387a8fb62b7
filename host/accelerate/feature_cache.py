"""One run of a sampler on an accelerated MODEL: its full steps, and the cached features of the others."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Sequence

import torch

from ..protocols import Model
from .plan import Gates, distance

CACHED_FEATURES = 2
"""Features cached for each prompt: the next is extrapolated from the last two."""
LOOK_AHEAD = 1
"""Steps by which a sampler may go back within a run: heunpp2 looks two steps ahead, and comes back to the next."""
MAX_TREND_ERROR = 0.9
"""With patches, a feature is extrapolated only where this share of its last change, or less, was missed at the last
full step. On koala-tiny 0.29 to 0.72 was missed without patches, up to 0.83 with an IP-Adapter at weight 0.3, and 0.92
to 1.6 with one at weight 1, whose images fewer steps kept better than extrapolated features."""

Key = Hashable
"""What a feature belongs to: a prompt, and whatever else makes features incomparable."""


class Run:
    """Made when sampling begins and gone when it ends, also by an error or a cancellation: nothing outlives it.

    ``sigmas``: the noise level at which each step begins, falling. ``full``: the full steps. ``patcher``: the MODEL
    that is sampled. ``no_reuse``: why every evaluation of this run is full; empty where features are reused.
    """

    def __init__(
        self,
        sigmas: Sequence[float],
        full: frozenset[int],
        patcher: Model | None = None,
        gates: Gates | None = None,
    ) -> None:
        self.sigmas = tuple(sigmas)
        self.full = full
        self.patcher = patcher
        self.gates = gates or Gates()
        self.no_reuse = ""
        self.evaluations = self.guided = 0
        self._computed: set[int] = set()  # evaluations, by number
        self._extrapolated: set[int] = set()
        self._sigma = math.inf
        self._step = -1
        self._refresh = True
        self._asked: set[Key] = set()
        self._on_trend: set[Key] = set()
        self._unsteady = 0  # evaluations that are full because a patched U-Net's features were not on their trend
        self._features: dict[Key, deque[tuple[float, torch.Tensor]]] = {}
        self._newest = math.inf  # noise level of the last computed feature

    def __str__(self) -> str:
        full = self.evaluations - len(self._extrapolated - self._computed)
        why = f": {self.no_reuse}" if self.no_reuse else ""
        if self._unsteady and not why:
            why = f": {self._unsteady} of them as patches on the MODEL change the features too fast to extrapolate"
        return f"{full} of {self.evaluations} passes ran the full U-Net, {self.guided} with guidance{why}"

    @property
    def phase(self) -> Hashable:
        """Between which gates the noise level is."""
        return self.gates.phase(self._sigma)

    def begin(self, sigma: float) -> None:
        """Begin a new evaluation of the model, at a noise level."""
        step = max((step for step, at in enumerate(self.sigmas) if at >= sigma), default=0)
        if step < self._step - LOOK_AHEAD:
            self._stop("the sampler returned to a higher noise level, as with restarts")
        self._refresh = step in self.full and step > self._step
        self._step = max(step, self._step)
        self._sigma = sigma
        self._asked.clear()
        self.evaluations += 1

    def extrapolated(self, keys: Sequence[Key]) -> torch.Tensor | None:
        """The deep feature for this evaluation, [batch of all keys, channels, height, width]; None: compute it."""
        if self._asked.intersection(keys):
            self._stop("the model ran more than once a step for the same prompt, as in tiled sampling")
        self._asked.update(keys)
        if self._refresh or self.no_reuse or not all(map(self._is_cached, keys)):
            return None
        if self.gates.patched and not self._on_trend.issuperset(keys):
            self._unsteady += 1
            return None
        self._extrapolated.add(self.evaluations)
        return torch.cat([self._extrapolate(key) for key in keys])

    def store(self, keys: Sequence[Key], feature: torch.Tensor) -> None:
        """Cache a computed deep feature, [batch of all keys, channels, height, width]."""
        if self.no_reuse:
            return
        self._computed.add(self.evaluations)
        self._newest = self._sigma
        for key, part in zip(keys, feature.chunk(len(keys)), strict=True):
            cached = self._features.setdefault(key, deque(maxlen=CACHED_FEATURES))
            while cached and cached[-1][0] <= self._sigma:
                cached.pop()
            if self.gates.patched and len(cached) == CACHED_FEATURES:
                (self._on_trend.add if self._follows_trend(key, part) else self._on_trend.discard)(key)
            cached.append((self._sigma, part))

    def _stop(self, why: str) -> None:
        """Every further evaluation of this run is full."""
        self.no_reuse = self.no_reuse or why
        self._features.clear()

    def _is_cached(self, key: Key) -> bool:
        """Whether there are two features, the later of the last full evaluation: a prompt that comes and goes begins
        anew. Their trend goes on from the earlier one's noise level downwards."""
        cached = self._features.get(key)
        if cached is None or len(cached) < CACHED_FEATURES:
            return False
        (earlier, _), (later, _) = cached
        return later == self._newest and later > 0 and 0 < self._sigma <= earlier < math.inf

    def _follows_trend(self, key: Key, computed: torch.Tensor) -> bool:
        """Whether extrapolating would have come nearer to a computed feature than reusing the last one, by enough."""
        last = self._features[key][-1][1]
        error, change = (torch.linalg.vector_norm(other - computed) for other in (self._extrapolate(key), last))
        return bool(error <= MAX_TREND_ERROR * change)

    def _extrapolate(self, key: Key) -> torch.Tensor:
        """A damped trend (Gardner and McKenzie 1985) through the last two features in log sigma. On koala-tiny it was
        closer than the undamped line, and that closer than one in time steps or in sigma. Between the two, where
        samplers that look ahead come back to, it is the line."""
        (earlier, first), (later, second) = self._features[key]
        away = distance(earlier, later, self._sigma)
        return torch.lerp(first, second, 1 + away if away < 0 else 2 - math.exp(-away))
