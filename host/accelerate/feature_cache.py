"""One run of a sampler on an accelerated MODEL: its full steps, and the cached features of the others."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch

from ...koala.releases import BASE
from ..protocols import Model
from .plan import Gates, distance

CACHED_FEATURES = 2
"""Features cached for each prompt: the next is extrapolated from the last two."""
LOOK_AHEAD = 1
"""Steps by which a sampler may go back within a run: heunpp2 looks two steps ahead, and comes back to the next."""
POSITIVE = 0
"""ComfyUI's number of the positive prompt where guidance is its own."""
USUAL_SCALE = BASE.settings.cfg
"""Of guidance that is not ComfyUI's own, whose scale is not known."""

Key = Hashable
"""What a feature belongs to: a prompt, and whatever else makes features incomparable."""


class _Checked(NamedTuple):
    """A U-Net's output from a computed feature, [batch, channels, height, width], and how far that from an extrapolated
    one was off."""

    key: Key
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
        self._on_trend: dict[Key, bool] = {}  # whether what was last checked was near enough
        self._off_trend: set[int] = set()  # evaluations that are full because it was not
        self._features: dict[Key, deque[tuple[float, torch.Tensor]]] = {}
        self._newest = self._before = math.inf  # noise level of the last computed feature, and that of before this one

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
        self._sigma, self._before = sigma, self._newest
        self._asked.clear()
        self.evaluations += 1

    def extrapolated(self, keys: Sequence[Key]) -> torch.Tensor | None:
        """The deep feature for this evaluation, [batch of all keys, channels, height, width]; None: compute it."""
        if self._asked.intersection(keys):
            self._stop("the model ran more than once a step for the same prompt, as in tiled sampling")
        self._asked.update(keys)
        if self._refresh or self.no_reuse or not all(self._is_cached(key, self._newest) for key in keys):
            return None
        if self._checks and not self._may_extrapolate(keys):
            return None
        self._extrapolated.add(self.evaluations)
        return torch.cat([self._extrapolate(key) for key in keys])

    def to_check(self, keys: Sequence[Key]) -> torch.Tensor | None:
        """What would have been extrapolated for an evaluation that is computed, as ``extrapolated``; None where nothing
        would, at a noise level that was computed before, or where the next step is a full step in any case."""
        following = self._step + 1
        if not self._checks or self.no_reuse or following in self.full or following == len(self.sigmas):
            return None
        if self._sigma >= self._before or not all(self._is_cached(key, self._before) for key in keys):
            return None
        return torch.cat([self._extrapolate(key) for key in keys])

    def check(self, keys: Sequence[Key], sides: Sequence[int], output: torch.Tensor, other: torch.Tensor) -> None:
        """Keep how far the output from extrapolated features, ``other``, is off, both [batch of all keys, channels,
        height, width], for ``end``. ``sides``: of guidance, by ComfyUI's numbers."""
        parts = zip(keys, sides, output.chunk(len(keys)), other.chunk(len(keys)), strict=True)
        self._checked += [_Checked(key, side == POSITIVE, right, wrong - right) for key, side, right, wrong in parts]

    def end(self, scale: float | None) -> None:
        """End an evaluation: what was checked in it is extrapolated only if the error was small enough. ``scale``: of
        guidance; None where it is not ComfyUI's own."""
        if self._checked:
            is_near = self._error(scale) <= self.max_error
            self._on_trend |= {one.key: is_near for one in self._checked}
            self._checked.clear()

    def store(self, keys: Sequence[Key], feature: torch.Tensor) -> None:
        """Cache a computed deep feature, [batch of all keys, channels, height, width]."""
        if self.no_reuse:
            return
        self._computed.add(self.evaluations)
        self._newest = self._sigma
        for key, part in zip(keys, feature.chunk(len(keys)), strict=True):
            cached = self._features.setdefault(key, deque(maxlen=CACHED_FEATURES))
            if not cached or cached[-1][0] != self._before:
                self._on_trend.pop(key, None)  # it was not computed the last time, so that its trend is not known
            while cached and cached[-1][0] <= self._sigma:
                cached.pop()
            cached.append((self._sigma, part))

    def _stop(self, why: str) -> None:
        """Every further evaluation of this run is full."""
        self.no_reuse = self.no_reuse or why
        self._features.clear()

    def _is_cached(self, key: Key, newest: float) -> bool:
        """Whether there are two features, the later of the last full evaluation, at the level ``newest``: a prompt that
        comes and goes begins anew. Their trend goes on from the earlier one's noise level downwards."""
        cached = self._features.get(key)
        if cached is None or len(cached) < CACHED_FEATURES:
            return False
        (earlier, _), (later, _) = cached
        return later == newest and later > 0 and 0 < self._sigma <= earlier < math.inf

    def _may_extrapolate(self, keys: Sequence[Key]) -> bool:
        """Whether no error is too large. What was not checked yet is used again at the same noise level only."""
        if not all(self._on_trend.get(key, True) for key in keys):
            self._off_trend.add(self.evaluations)
            return False
        return self._sigma == self._newest or all(key in self._on_trend for key in keys)

    def _error(self, scale: float | None) -> float:
        """The largest of the images' errors, of the guided output, relative to it. Areas of different sizes are judged
        each by itself."""
        found: dict[torch.Size, list[_Checked]] = defaultdict(list)
        for one in self._checked:
            found[one.output.shape].append(one)
        return float(torch.tensor([_guided_error(alike, scale) for alike in found.values()]).max())

    def _extrapolate(self, key: Key) -> torch.Tensor:
        """A damped trend (Gardner and McKenzie 1985) through the last two features in log sigma. On koala-tiny it was
        closer than the undamped line, and that closer than one in time steps or in sigma. Between the two, where
        samplers that look ahead come back to, it is the line."""
        (earlier, first), (later, second) = self._features[key]
        away = distance(earlier, later, self._sigma)
        return torch.lerp(first, second, 1 + away if away < 0 else 2 - math.exp(-away))


def _guided_error(parts: Sequence[_Checked], scale: float | None) -> float:
    """The largest error of a guided output, relative to the output, of a batch's images; NaN where there is one.

    Each positive prompt is judged with the negative of its own area where there are as many, or else with the mean of
    the negatives. Without a scale each prompt is judged as if it were the positive, and the others negative.
    """
    positive, negative = ([part for part in parts if part.positive is side] for side in (True, False))
    pairs: list[tuple[_Checked, list[_Checked]]]
    if scale is None:
        pairs = [(part, [other for other in parts if other is not part]) for part in parts]
    elif len(positive) == len(negative):
        pairs = [(part, [other]) for part, other in zip(positive, negative, strict=True)]
    else:
        pairs = [(part, negative) for part in positive] or [(part, []) for part in negative]
    scale = USUAL_SCALE if scale is None else scale
    errors = (_guided_size(part.error, [other.error for other in others], scale) for part, others in pairs)
    outputs = (_guided_size(part.output, [other.output for other in others], scale) for part, others in pairs)
    return float(torch.cat([error / output for error, output in zip(errors, outputs, strict=True)]).max())


def _guided_size(positive: torch.Tensor, negatives: Sequence[torch.Tensor], scale: float) -> torch.Tensor:
    """The norm of each image of a batch, guided away from the mean of the negatives, if there are any; on the CPU, as
    several GPUs may share the work."""
    guided = positive.float().cpu()
    if negatives:
        guided = torch.lerp(torch.stack([negative.float().cpu() for negative in negatives]).mean(0), guided, scale)
    size: torch.Tensor = torch.linalg.vector_norm(guided, dim=(1, 2, 3))
    return size
