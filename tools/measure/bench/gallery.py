"""Pictures of koala-tiny on many prompts, whole and with work left out: how far apart they are, and what each cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from comfy_extras.nodes_custom_sampler import CFGOverride
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

from koala_sdxl import koala_loader
from koala_sdxl.host.accelerate import cpu_routines as kernels
from koala_sdxl.host.accelerate.patch import accelerate
from koala_sdxl.koala.architecture.layout import KOALA_700M
from koala_sdxl.nodes.prompt import KoalaPrompt
from koala_sdxl.nodes.sample import KoalaSampler
from tools.measure.bench import macs
from tools.measure.bench.variants import VARIANTS
from tools.tiny import evaluate

SEED = 5
SIDE = 16  # of koala-tiny's latents
PATCHES: dict[str, Callable[[Any, Any], Any]] = {
    "": lambda model, _: model,
    "KOALA Accelerate": lambda model, variant: accelerate(model, VARIANTS[variant], lambda _: None).model,
    # start and end as the nodes have them by default
    "EasyCache": lambda model, threshold: EasyCacheNode.execute(model, threshold, 0.15, 0.95, False).result[0],
    "LazyCache": lambda model, threshold: LazyCacheNode.execute(model, threshold, 0.15, 0.95, False).result[0],
    "CFGOverride": lambda model, start: CFGOverride.execute(model, 1.0, start, 1.0).result[0],
}
"""What can stand between loader and sampler, with its one setting."""


class Made(NamedTuple):
    """Pictures (prompts, height, width, 3) in 0..1; passes through the U-Net's deepest part and through its last layer
    for one picture, prompt and negative each counting; the multiplications of these in whole passes."""

    pictures: torch.Tensor
    trunk: float
    head: float
    passes: float


class Gallery:
    """koala-tiny, the prompts and the pictures that others are held against. All prompts are sampled at once."""

    def __init__(self, prompts: Sequence[int], seed: int = SEED) -> None:
        """``prompts``: which of ``evaluate.grid_prompts``, by number; ``seed``: the noise's."""
        grid, asked = evaluate.grid_prompts(max(prompts) + 1)
        texts, self.asked, self.seed = [grid[i] for i in prompts], asked.pick(torch.tensor(prompts)), seed
        self.model, clip, self.vae = koala_loader.load_checkpoint(koala_loader.BUILT_IN)
        encoded = [KoalaPrompt.execute(clip, text, "", "no style", "reference").result for text in texts]
        self.positive, self.negative = (_joined([pair[side] for pair in encoded]) for side in (0, 1))
        self.unet = self.model.model.diffusion_model
        self.head = macs.head_share(macs.network(KOALA_700M), KOALA_700M)
        self.whole: dict[str, Made] = {}

    def make(self, model: Any, sampler: str, steps: int, cfg: float, spacing: str) -> Made:
        """A picture for each prompt."""
        latent = {"samples": torch.zeros(len(self.asked.colour), 4, SIDE, SIDE)}
        preset = {"preset": "custom", "steps": steps, "cfg": cfg, "spacing": spacing}
        with self.counted() as rows:
            made = KoalaSampler.execute(model, self.positive, self.negative, latent, self.seed, preset, sampler, 1.0)
        pictures = torch.cat([self.vae.decode(part) for part in made.result[0]["samples"].split(36)])
        trunk, head = (rows[kind] / len(pictures) for kind in ("trunk", "head"))
        return Made(pictures, trunk, head, trunk * (1 - self.head) + head * self.head)

    @contextmanager
    def counted(self) -> Iterator[dict[str, int]]:
        """Rows that went through the U-Net's deepest part and through its last layer, prompts and negatives."""
        rows = {"trunk": 0, "head": 0}

        def count(kind: str) -> Callable[[Any, tuple[Any, ...], Any], None]:
            def add(_: Any, given: tuple[Any, ...], __: Any) -> None:
                rows[kind] += given[0].shape[0]

            return add

        # the modules that both halves and the whole U-Net share, so that a pass counts whoever asked for it
        hooks = [
            self.unet.input_blocks[-1][0].register_forward_hook(count("trunk")),
            self.unet.out.register_forward_hook(count("head")),
        ]
        try:
            yield rows
        finally:
            for hook in hooks:
                hook.remove()


_open: list[Gallery] = []


def open_gallery(prompts: int) -> dict[str, Any]:
    """Load and encode; the share of a full step that a step on a foretold feature costs, KOALA-700M's."""
    _open[:] = [Gallery(range(prompts))]
    return {"head": _open[0].head}


def judged(patch: str, value: Any, run: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Pictures of ``run`` (sampler, steps, cfg, spacing) with a patch, against those of ``reference`` without any.

    ``cost``: U-Net multiplications over the reference's. ``psnr``: mean of the pictures', in dB (100 for the same
    picture). ``fidelity``: percent of the prompts drawn right. ``trunk`` and ``head``: as in ``Made``.

    What a preset computes in bf16 where that is faster is computed in bf16 here on every processor: it is judged by its
    pictures, and those of a slow bf16 are the same but for rounding.
    """
    (gallery,) = _open
    key = str(sorted(reference.items()))
    if key not in gallery.whole:
        gallery.whole[key] = gallery.make(gallery.model, **reference)
    with mock.patch.object(kernels, "bf16_is_faster", return_value=True):
        model = PATCHES[patch](gallery.model, value)
    whole, made = gallery.whole[key], gallery.make(model, **run)
    return {
        "cost": made.passes / whole.passes,
        "psnr": psnr(made.pictures, whole.pictures),
        "fidelity": evaluate.score(made.pictures.permute(0, 3, 1, 2) * 2 - 1, gallery.asked).all,
        "trunk": made.trunk,
        "head": made.head,
    }


def psnr(made: torch.Tensor, whole: torch.Tensor) -> float:
    """Mean over pictures in 0..1 of each one's PSNR to the other's, in dB; 100 for the same picture."""
    error = (made - whole).square().flatten(1).mean(1).clamp(min=1e-10)
    return float((-10 * error.log10()).mean())


def _joined(conditionings: list[Any]) -> list[Any]:
    """Many prompts as one CONDITIONING with a row for each."""
    (_, rest) = conditionings[0][0]
    pooled = torch.cat([one[0][1]["pooled_output"] for one in conditionings])
    return [[torch.cat([one[0][0] for one in conditionings]), {**rest, "pooled_output": pooled}]]
