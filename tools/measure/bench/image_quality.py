"""Images of koala-tiny on many prompts, with all steps and with work left out: how they differ, and what each cost."""

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
    """Images (prompts, height, width, 3) in 0..1; passes through the U-Net's deep branch and through its last layer for
    one image, prompt and negative each counting; the multiplications of these, in passes through the whole U-Net."""

    images: torch.Tensor
    deep: float
    shallow: float
    passes: float


class Prompts:
    """koala-tiny and the prompts; ``references``: the images of runs without a patch, by their settings."""

    def __init__(self, prompts: Sequence[int], seed: int = SEED) -> None:
        """``prompts``: which of ``evaluate.grid_prompts``, by number; ``seed``: the noise's."""
        grid, asked = evaluate.grid_prompts(max(prompts) + 1)
        texts, self.asked, self.seed = [grid[i] for i in prompts], asked.pick(torch.tensor(prompts)), seed
        self.model, clip, self.vae = koala_loader.load_checkpoint(koala_loader.BUILT_IN)
        encoded = [KoalaPrompt.execute(clip, text, "", "no style", "reference").result for text in texts]
        self.positive, self.negative = (_joined([pair[side] for pair in encoded]) for side in (0, 1))
        self.unet = self.model.model.diffusion_model
        self.shallow = macs.shallow_share(macs.network(KOALA_700M), KOALA_700M)
        self.references: dict[str, Made] = {}

    def make(self, model: Any, sampler: str, steps: int, cfg: float, spacing: str, alone: bool = False) -> Made:
        """An image for each prompt, all sampled at once, or each of them ``alone``: from the same noise."""
        preset = {"preset": "custom", "steps": steps, "cfg": cfg, "spacing": spacing}
        every = range(len(self.asked.colour))

        def sample(some: Sequence[int]) -> torch.Tensor:
            latent = {"samples": torch.zeros(len(some), 4, SIDE, SIDE), "batch_index": list(some)}
            positive, negative = (prompts_of(side, some) for side in (self.positive, self.negative))
            made = KoalaSampler.execute(model, positive, negative, latent, self.seed, preset, sampler, 1.0)
            return made.result[0]["samples"]

        with self.counted() as rows:
            sampled = torch.cat([sample(some) for some in ([one] for one in every)]) if alone else sample(every)
        images = torch.cat([self.vae.decode(latents) for latents in sampled.split(36)])
        deep, shallow = (rows[branch] / len(images) for branch in ("deep", "shallow"))
        return Made(images, deep, shallow, deep * (1 - self.shallow) + shallow * self.shallow)

    @contextmanager
    def counted(self) -> Iterator[dict[str, int]]:
        """Rows that went through the U-Net's deep branch and through its last layer, prompts and negatives."""
        rows = {"deep": 0, "shallow": 0}

        def count(branch: str) -> Callable[[Any, tuple[Any, ...], Any], None]:
            def add(_: Any, given: tuple[Any, ...], __: Any) -> None:
                rows[branch] += given[0].shape[0]

            return add

        # modules that the branches share with the whole U-Net, so that a pass counts whoever asked for it
        hooks = [
            self.unet.input_blocks[-1][0].register_forward_hook(count("deep")),
            self.unet.out.register_forward_hook(count("shallow")),
        ]
        try:
            yield rows
        finally:
            for hook in hooks:
                hook.remove()


_loaded: list[Prompts] = []


def load_prompts(prompts: int) -> dict[str, Any]:
    """Load the model and encode prompts; ``shallow``: the share of a full step that a step on extrapolated features
    costs, KOALA-700M's."""
    _loaded[:] = [Prompts(range(prompts))]
    return {"shallow": _loaded[0].shallow}


def compare(patch: str, value: Any, run: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Images of ``run`` (sampler, steps, cfg, spacing) with a patch, against those of ``reference`` without any.

    ``cost``: U-Net multiplications over the reference's. ``psnr``: mean of the images', in dB (100 for the same
    image). ``fidelity``: percent of the prompts drawn right. ``deep`` and ``shallow``: as in ``Made``.

    What a preset computes in bf16 where that is faster is computed in bf16 here on every processor: it is judged by its
    images, and those of a slow bf16 are the same but for rounding.
    """
    (prompts,) = _loaded
    key = str(sorted(reference.items()))
    if key not in prompts.references:
        prompts.references[key] = prompts.make(prompts.model, **reference)
    with mock.patch.object(kernels, "bf16_is_faster", return_value=True):
        model = PATCHES[patch](prompts.model, value)
    compared, made = prompts.references[key], prompts.make(model, **run, alone=looks(patch, value))
    return {
        "cost": made.passes / compared.passes,
        "psnr": psnr(made.images, compared.images),
        "fidelity": evaluate.score(made.images.permute(0, 3, 1, 2) * 2 - 1, prompts.asked).all,
        "deep": made.deep,
        "shallow": made.shallow,
    }


def looks(patch: str, value: Any) -> bool:
    """Whether a patch decides by what is sampled, of a batch by all of it; then each image is sampled by itself."""
    ours = patch == "KOALA Accelerate" and bool(VARIANTS[value].reuse.single_step.levels)
    return ours or patch in ("EasyCache", "LazyCache")


def psnr(made: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over images in 0..1 of each one's PSNR to its reference, in dB; 100 for the same image."""
    error = (made - reference).square().flatten(1).mean(1).clamp(min=1e-10)
    return float((-10 * error.log10()).mean())


def prompts_of(conditioning: list[Any], rows: Sequence[int]) -> list[Any]:
    """Some rows of one CONDITIONING of many prompts."""
    [[context, rest]] = conditioning
    part = list(rows)
    return [[context[part], {**rest, "pooled_output": rest["pooled_output"][part]}]]


def _joined(conditionings: list[Any]) -> list[Any]:
    """Many prompts as one CONDITIONING with a row for each."""
    (_, rest) = conditionings[0][0]
    pooled = torch.cat([one[0][1]["pooled_output"] for one in conditionings])
    return [[torch.cat([one[0][0] for one in conditionings]), {**rest, "pooled_output": pooled}]]
