"""One run of a sampler on an accelerated MODEL: its full steps, and the cached features of the others."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch

from ..protocols import Model
from .plan import Gates, distance

CACHED_FEATURES = 2
"""Features cached for each prompt: the next is extrapolated from the last two."""
LOOK_AHEAD = 1
"""Steps by which a sampler may go back within a run: heunpp2 looks two steps ahead, and comes back to the next."""
POSITIVE = 0
"""ComfyUI's number of the positive prompt among the sides of a guided pass."""

Key = Hashable
"""What a feature belongs to: a prompt, and whatever else makes features incomparable."""


class _Checked(NamedTuple):
    """A U-Net's output from a computed feature, [batch, channels, height, width], for a positive or negative prompt,
    and how far that from an extrapolated one was off."""

    positive: bool
    output: torch.Tensor
    error: torch.Tensor


class Run:
    """Made when sampling begins and gone when it ends, also by an error or a cancellation: nothing outlives it.

    ``sigmas``: the noise level at which each step begins, falling. ``full``: the full steps. ``max_error``: at a full
    step, what would have been extrapolated is checked. While the output would be farther off than this, relative to its
    own size, all steps are full steps; infinite: nothing is checked. ``patcher``: the MODEL that is sampled.
    ``no_reuse``: why every evaluation of this run is full; empty where features are reused.
    """

    def __init__(
        self,
        sigmas: Sequence[float],
        full: frozenset[int],
        max_error: float = math.inf,
        patcher: Model | None = None,
        gates: Gates | None = None,
    ) -> None:
        self.sigmas = tuple(sigmas)
        self.full = full
        self.patcher = patcher
        self.gates = gates or Gates()
        self.max_error = max_error
        self.no_reuse = ""
        self.evaluations = self.guided = 0
        self._computed: set[int] = set()  # evaluations, by number
        self._extrapolated: set[int] = set()
        self._sigma = math.inf
        self._step = -1
        self._refresh = True
        self._asked: set[Key] = set()
        self._checked: list[_Checked] = []  # of this evaluation
        self._checks = math.isfinite(max_error)
        self._on_trend = False  # whether what was last checked was near enough
        self._off_trend: set[int] = set()  # evaluations that are full because it was not
        self._features: dict[Key, deque[tuple[float, torch.Tensor]]] = {}
        self._newest = math.inf  # noise level of the last computed feature

    def __str__(self) -> str:
        full = self.evaluations - len(self._extrapolated - self._computed)
        why = f": {self.no_reuse}" if self.no_reuse else ""
        if self._off_trend and not why:
            why = f": {len(self._off_trend)} of them as the features changed too fast to extrapolate"
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
        if self._checks and not self._on_trend:
            self._off_trend.add(self.evaluations)
            return None
        self._extrapolated.add(self.evaluations)
        return torch.cat([self._extrapolate(key) for key in keys])

    def to_check(self, keys: Sequence[Key]) -> torch.Tensor | None:
        """What would have been extrapolated for an evaluation that is computed, as ``extrapolated``; None where nothing
        would, or where the next step is a full step in any case."""
        following = self._step + 1
        if not self._checks or self.no_reuse or following in self.full or following == len(self.sigmas):
            return None
        if not all(map(self._is_cached, keys)):
            return None
        return torch.cat([self._extrapolate(key) for key in keys])

    def check(self, sides: Sequence[int], output: torch.Tensor, extrapolated: torch.Tensor) -> None:
        """Keep how far the output from extrapolated features is off, both [batch of all sides, channels, height,
        width], for ``end``. ``sides``: for which of the sides of guidance each part is, by ComfyUI's numbers."""
        parts = zip(sides, output.chunk(len(sides)), extrapolated.chunk(len(sides)), strict=True)
        self._checked += [_Checked(side == POSITIVE, right, other - right) for side, right, other in parts]

    def end(self, scale: float) -> None:
        """End an evaluation, of guidance at a scale: if it was checked, the next steps are extrapolated only where the
        error was small enough."""
        if self._checked:
            self._on_trend = self._error(scale) <= self.max_error
            self._checked.clear()

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
            if len(cached) < CACHED_FEATURES:
                self._on_trend = False  # of this prompt there is none yet
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

    def _error(self, scale: float) -> float:
        """The largest of the images' errors, of the guided output, relative to it. Areas of different sizes are judged
        each by itself."""
        found: dict[torch.Size, list[_Checked]] = defaultdict(list)
        for one in self._checked:
            found[one.output.shape].append(one)
        return float(torch.stack([_guided_error(alike, scale) for alike in found.values()]).max())

    def _extrapolate(self, key: Key) -> torch.Tensor:
        """A damped trend (Gardner and McKenzie 1985) through the last two features in log sigma. On koala-tiny it was
        closer than the undamped line, and that closer than one in time steps or in sigma. Between the two, where
        samplers that look ahead come back to, it is the line."""
        (earlier, first), (later, second) = self._features[key]
        away = distance(earlier, later, self._sigma)
        return torch.lerp(first, second, 1 + away if away < 0 else 2 - math.exp(-away))


def _guided_error(parts: Sequence[_Checked], scale: float) -> torch.Tensor:
    """The largest error of a guided output, relative to the output, of a batch's images. Where there are as many
    positive as negative prompts, as for areas, each belongs to one of the others; otherwise their means count."""

    def guided(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        sides: dict[bool, list[torch.Tensor]] = defaultdict(list)
        for part, tensor in zip(parts, tensors, strict=True):
            sides[part.positive].append(tensor.float())
        found = [torch.stack(sides[positive]) for positive in sorted(sides)]  # the negative first
        if len(set(map(len, found))) > 1:
            found = [side.mean(0, keepdim=True) for side in found]
        return torch.lerp(found[0], found[-1], scale).flatten(0, 1)  # one side alone stays as it is

    error, output = (
        torch.linalg.vector_norm(guided(tensors), dim=(1, 2, 3))
        for tensors in ([part.error for part in parts], [part.output for part in parts])
    )
    largest: torch.Tensor = (error / output).max()
    return largest
