"""Our graph against diffusers' pipeline: same weights, same initial noise, fp32 on the CPU.

Each case yields measured differences and the bound that each must stay below. The tests assert them, and
``python3 dev.py parity`` writes them to docs/parity.md. Runs in a process with ComfyUI in it
(tools/harness/inprocess.py).
"""

from __future__ import annotations

import gc
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tools.harness import inprocess, testhost

inprocess.activate()

import torch
from safetensors import safe_open

from koala_sdxl import koala_loader
from koala_sdxl.koala.architecture.components import LATENT_SCALE
from koala_sdxl.koala.files.inspect import inspect_model
from koala_sdxl.koala.releases import SPACINGS
from koala_sdxl.nodes.prompt import KoalaPrompt
from koala_sdxl.nodes.sample import KoalaSampler, KoalaScheduler
from tools.measure import reference
from tools.synthetic import random_weights

PAGE = testhost.ROOT / "docs" / "parity.md"
PROMPT = "a gray koala on a green background"
NEGATIVE = "red (blurry)"
LATENT_BOUND, PIXEL_BOUND, FULL_SIZE_BOUND = 1e-4, 1.0, 1e-5


class Row(NamedTuple):
    """One measured figure: what was compared, the largest difference found, the bound, and the unit."""

    case: str
    difference: float
    bound: float
    unit: str

    @property
    def holds(self) -> bool:
        return self.difference <= self.bound


@dataclass(frozen=True)
class Case:
    """A text-to-image or, with ``denoise`` below 1, an image-to-image run of koala-tiny; sizes in pixels."""

    name: str
    steps: int
    cfg: float
    spacing: str
    negative: str | None = NEGATIVE
    height: int = 128
    width: int = 128
    batch: int = 1
    denoise: float = 1.0
    seed: int = 7


TINY_CASES = (
    Case("25 steps, cfg 7.5, leading (base)", 25, 7.5, "leading"),
    Case("10 steps, cfg 3.5, trailing (Lightning)", 10, 3.5, "trailing"),
    Case("30 steps, leading", 30, 7.5, "leading"),
    Case("12 steps, trailing", 12, 3.5, "trailing"),
    Case("no negative prompt (zeros)", 25, 7.5, "leading", negative=None),
    Case("no negative prompt, 10 steps, trailing", 10, 3.5, "trailing", negative=None),
    Case("non-square, 192 x 128", 25, 7.5, "leading", width=192),
    Case("batch of 2", 25, 7.5, "leading", batch=2),
    Case("image to image, denoise 0.6", 25, 7.5, "leading", denoise=0.6),
    Case("image to image, denoise 0.6, batch of 2, 10 steps, trailing", 10, 3.5, "trailing", batch=2, denoise=0.6),
)
FULL_SIZE = tuple(random_weights.LAYOUTS)


def rows() -> Iterator[Row]:
    """Every figure, measured now."""
    for case in TINY_CASES:
        yield from tiny(case)
    yield from (tiny_custom_graph(), scheduler_sigmas())
    for name in FULL_SIZE:
        yield full_size(name)


@cache
def tiny_models() -> tuple[Any, Any, Any]:
    """koala-tiny as our loader gives it."""
    return koala_loader.load_checkpoint(koala_loader.BUILT_IN)


@cache
def tiny_pipeline() -> Any:
    """koala-tiny in diffusers."""
    return reference.pipeline(koala_loader.BUILT_IN)


@torch.inference_mode()
def tiny(case: Case) -> tuple[Row, Row]:
    """Latents and decoded images of one case: differences of the final latents, and of 8-bit channels."""
    model, clip, vae = tiny_models()
    positive, negative = KoalaPrompt.execute(clip, PROMPT, case.negative or "", "no style", "reference").result
    shape = (case.batch, 4, case.height // 8, case.width // 8)
    start = _start_image(case) if case.denoise < 1 else None
    latent = torch.zeros(shape) if start is None else vae.encode(start.permute(0, 2, 3, 1))
    preset = {"preset": "custom", "steps": case.steps, "cfg": case.cfg, "spacing": case.spacing}
    made = KoalaSampler.execute(
        model, positive, negative, {"samples": latent}, case.seed, preset, "euler", case.denoise
    ).result[0]["samples"]
    wanted = reference_latents(case, start)
    pixels = (vae.decode(made) * 255).floor()  # core's SaveImage truncates where diffusers rounds
    pipe = tiny_pipeline()
    decoded = pipe.vae.decode(wanted / LATENT_SCALE).sample
    wanted_pixels = ((decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255).round()
    return (
        Row(
            f"koala-tiny, {case.name}: final latent",
            _largest(made * LATENT_SCALE, wanted),
            LATENT_BOUND,
            "latent units",
        ),
        Row(f"koala-tiny, {case.name}: image", _largest(pixels, wanted_pixels), PIXEL_BOUND, "of 255"),
    )


@torch.inference_mode()
def tiny_custom_graph() -> Row:
    """KOALA Scheduler in a stock SamplerCustom graph, trailing, where core's noise scale differs by 2e-3 at most."""
    from comfy.samplers import sampler_object
    from comfy_extras.nodes_custom_sampler import SamplerCustom

    case = Case("SamplerCustom, image to image", 25, 7.5, "leading", denoise=0.6)
    model, clip, vae = tiny_models()
    positive, negative = KoalaPrompt.execute(clip, PROMPT, NEGATIVE, "no style", "reference").result
    start = _start_image(case)
    sigmas = KoalaScheduler.execute(model, case.steps, "auto", case.denoise).result[0]
    latent = {"samples": vae.encode(start.permute(0, 2, 3, 1))}
    made = SamplerCustom.execute(
        model, True, case.seed, case.cfg, positive, negative, sampler_object("euler"), sigmas, latent
    ).result[0]["samples"]
    return Row(
        "koala-tiny, KOALA Scheduler + SamplerCustom, image to image: final latent",
        _largest(made * LATENT_SCALE, reference_latents(case, start)),
        LATENT_BOUND,
        "latent units",
    )


def scheduler_sigmas() -> Row:
    """KOALA Scheduler's sigmas against diffusers', every step count 1..100, every spacing."""
    from diffusers import EulerDiscreteScheduler

    model = tiny_models()[0]
    worst = 0.0
    for spacing in SPACINGS:
        theirs = EulerDiscreteScheduler.from_config({**random_weights.SCHEDULER_CONFIG, "timestep_spacing": spacing})
        for steps in range(1, 101):
            theirs.set_timesteps(steps)
            worst = max(worst, _largest(KoalaScheduler.execute(model, steps, spacing, 1.0).result[0], theirs.sigmas))
    return Row("sigmas, 1..100 steps, leading, trailing, linspace", worst, 0.0, "sigma")


@torch.inference_mode()
def full_size(name: str) -> Row:
    """``of_random_weights`` for a U-Net of a published size."""
    return of_random_weights(name, random_weights.folder(name) / "unet" / "diffusion_pytorch_model.fp16.safetensors")


def of_random_weights(name: str, file: Path) -> Row:
    """Two steps at 256 px with a file of random weights, from the same random text conditioning."""
    import comfy.model_management

    generator = torch.Generator().manual_seed(3)
    context, pooled = torch.randn(2, 77, 2048, generator=generator), torch.randn(2, 1280, generator=generator)
    steps, cfg, seed = 2, 7.5, 11
    wanted = _denoise_in_diffusers(file, context, pooled, steps, cfg, _noise((1, 4, 32, 32), seed))
    gc.collect()  # diffusers' U-Net is part of a cycle; two of full size need not be in memory
    model = koala_loader.load_unet(inspect_model(file), name)
    conditioning = [[[context[i : i + 1], {"pooled_output": pooled[i : i + 1]}]] for i in (0, 1)]
    preset = {"preset": "custom", "steps": steps, "cfg": cfg, "spacing": "leading"}
    made = KoalaSampler.execute(
        model, conditioning[1], conditioning[0], {"samples": torch.zeros(1, 4, 32, 32)}, seed, preset, "euler", 1.0
    ).result[0]["samples"]
    comfy.model_management.unload_all_models()
    relative = _largest(made * LATENT_SCALE, wanted) / float(wanted.abs().max())
    return Row(f"{name}, random weights, 2 steps at 256 px: final latent", relative, FULL_SIZE_BOUND, "relative")


def _denoise_in_diffusers(
    file: Path, context: torch.Tensor, pooled: torch.Tensor, steps: int, cfg: float, noise: torch.Tensor
) -> torch.Tensor:
    """The SDXL pipeline's denoising loop; row 0 of the conditioning is the negative, row 1 the positive."""
    from diffusers import EulerDiscreteScheduler

    unet = reference.unet(_in_fp32(file))
    scheduler = EulerDiscreteScheduler.from_config(dict(random_weights.SCHEDULER_CONFIG))
    scheduler.set_timesteps(steps)
    side = 8.0 * noise.shape[-1]
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[side, side, 0, 0, side, side]] * 2)}
    x = noise * scheduler.init_noise_sigma
    for step in scheduler.timesteps:
        both = scheduler.scale_model_input(torch.cat([x, x]), step)
        without, towards = unet(both, step, context, added_cond_kwargs=added).sample.chunk(2)
        x = scheduler.step(without + cfg * (towards - without), step, x).prev_sample
    return x


def _in_fp32(file: Path, at_once: int = 100) -> dict[str, torch.Tensor]:
    """A file's tensors; it is opened anew for some at a time, as all that was read of an open file stays in memory."""
    with safe_open(file, framework="pt") as stored:
        names = list(stored.keys())
    state: dict[str, torch.Tensor] = {}
    for start in range(0, len(names), at_once):
        with safe_open(file, framework="pt") as stored:
            state |= {name: stored.get_tensor(name).float() for name in names[start : start + at_once]}
    return state


def reference_latents(case: Case, start: torch.Tensor | None = None) -> torch.Tensor:
    """diffusers' latents of a case, [batch, 4, height / 8, width / 8]. ``start``: the image that it begins with."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline

    pipe = tiny_pipeline()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing=case.spacing)
    arguments: dict[str, Any] = {
        "negative_prompt": case.negative,
        "num_inference_steps": case.steps,
        "guidance_scale": case.cfg,
        "num_images_per_prompt": case.batch,
        "output_type": "latent",
    }
    generator = torch.Generator().manual_seed(case.seed)
    if start is None:
        arguments |= {"height": case.height, "width": case.width}
        return pipe(PROMPT, generator=generator, **arguments).images
    img2img = StableDiffusionXLImg2ImgPipeline(**pipe.components, add_watermarker=False)
    img2img.set_progress_bar_config(disable=True)
    # a latent is taken as it is; its encoding is compared by giving both sides the image's mode
    latent = pipe.vae.encode(start * 2 - 1).latent_dist.mode() * LATENT_SCALE
    return img2img(PROMPT, image=latent, strength=case.denoise, generator=generator, **arguments).images


def _start_image(case: Case) -> torch.Tensor:
    """A smooth image, (batch, 3, height, width) in 0..1."""
    y = torch.linspace(0, 1, case.height).view(1, 1, -1, 1)
    x = torch.linspace(0, 1, case.width).view(1, 1, 1, -1)
    image = torch.cat([x.expand(1, 1, case.height, -1), y.expand(1, 1, -1, case.width), (x * y)], 1)
    return image.repeat(case.batch, 1, 1, 1)


def _noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _largest(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max())


def main(_: list[str]) -> None:
    """Measure everything and write docs/parity.md."""
    import diffusers
    from comfyui_version import __version__ as comfyui

    lines = [
        "# Parity with diffusers",
        "",
        "Our nodes inside ComfyUI against diffusers' pipelines: same weights, same initial noise, fp32 on the CPU.",
        "Largest absolute difference anywhere in the result, except where the unit is relative.",
        "Written by `python3 dev.py parity`.",
        "",
        f"ComfyUI {comfyui}, diffusers {diffusers.__version__}, torch {torch.__version__.split('+')[0]}, "
        f"Python {platform.python_version()}, {platform.machine()}.",
        "",
        "| case | difference | bound | unit | |",
        "|---|---|---|---|---|",
    ]
    for row in rows():
        lines.append(
            f"| {row.case} | {row.difference:.2g} | {row.bound:g} | {row.unit} | {'ok' if row.holds else 'NOT MET'} |"
        )
        testhost.say(lines[-1])
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    testhost.say(str(PAGE))


if __name__ == "__main__":
    main(sys.argv[1:])
