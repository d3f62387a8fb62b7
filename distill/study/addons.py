"""Do a LoRA and a ControlNet of sdxl-tiny have the same effect on a koala-tiny? Trains both, samples, counts.

Usage: python -m tools.run koala_sdxl.distill.study.addons --teacher DIR --student FOLDER_OR_FILE --work DIR
                                   [--size PIXELS] [--prompts N] [--out JSON]

Everything is sampled by ComfyUI in this process, at KOALA's published base settings, with the same prompts and initial
noise in every row. The add-ons are trained once, into the work folder, where the contact sheets go as well.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tools.harness import inprocess

inprocess.activate()

import comfy.controlnet
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import torch

from tools.synthetic.adapters import SMALL_SDXL
from tools.tiny import pipeline
from tools.tiny.evaluate import SEED, grid_prompts
from tools.tiny.judge import judge
from tools.tiny.pictures import Drawings, caption, random_drawings

from ... import koala_loader
from ...host.transfer.lora import apply_lora
from ...koala.architecture.keys import tensors
from ...nodes.adapt import KoalaControlNet
from ...nodes.prompt import encode_reference, zeros
from ...nodes.sample import KoalaScheduler
from .. import sheet
from .addon_pictures import FOLLOWED, judge_cyan, outlines, overlaps, saying_cyan
from .addon_training import CONTROLNET, SHAPELESS, Recipe, at_size, train_controlnet
from .effects import training
from .effects.table import CYAN

PROMPTS = 96
COLUMNS = 12  # of the sheets
STEPS, CFG, BATCH = 25, 7.5, 48
FOLDS, GAINS = (0.5, 1.0), (1.5, 2.0)


@dataclass(frozen=True)
class Parts:
    """A model as its loader returns it."""

    model: Any
    clip: Any
    vae: Any


@dataclass(frozen=True)
class LoraRow:
    """Percentages of images: with a cyan shape, the correct background, the correct shape, and all three. share: mean
    share of cyan in the foreground."""

    row: str
    n: int
    cyan: float
    share: float
    background: float
    shape: float
    all: float


@dataclass(frozen=True)
class ControlRow:
    """overlap: mean intersection over union with the drawing. Percentages of images: with an overlap of at least
    FOLLOWED, the drawing's shape, the prompt's background, and all three."""

    row: str
    n: int
    overlap: float
    followed: float
    shape: float
    background: float
    all: float


def load(path: Path) -> Parts:
    """Load a diffusers folder or a single-file checkpoint with the pack's loader, which accepts SDXL's layout at this
    width."""
    return Parts(*(koala_loader.load_folder(path) if path.is_dir() else koala_loader.load_checkpoint(path)))


@torch.inference_mode()
def sampled(
    parts: Parts, model: Any, prompts: Sequence[str], size: int, control: Any = None, hints: torch.Tensor | None = None
) -> torch.Tensor:
    """One image per prompt, float32 [n, 3, size, size] in [-1, 1]; image i starts from noise of SEED + i.

    Args:
        parts: a loaded model.
        model: its MODEL, or one with a LoRA.
        prompts: n prompts.
        size: in pixels.
        control: a ControlNet, or None.
        hints: its hints, [n, 3, size, size] in [0, 1].
    """
    sigmas = KoalaScheduler.execute(model, STEPS, "leading", 1.0).result[0]
    made = []
    for start in range(0, len(prompts), BATCH):
        positive = _conditioning(parts.clip, prompts[start : start + BATCH])
        if control is not None and hints is not None:  # as Apply ControlNet does
            hinted = control.copy().set_cond_hint(hints[start : start + BATCH], 1.0, (0.0, 1.0))
            positive[0][1] |= {"control": hinted, "control_apply_to_uncond": False}
        negative = zeros(positive)  # with the ControlNet, where there is one
        noise = _noise(start, len(positive[0][0]), size)
        sampler = comfy.samplers.sampler_object("euler")
        empty = torch.zeros_like(noise)
        latents = comfy.sample.sample_custom(
            model, noise, CFG, sampler, sigmas, positive, negative, empty, disable_pbar=True
        )
        made.append(parts.vae.decode(latents).movedim(-1, 1).float() * 2 - 1)
    return torch.cat(made)


def _conditioning(clip: Any, prompts: Sequence[str]) -> list[Any]:
    """One entry with a prompt for each image of a batch."""
    encoded = [encode_reference(clip, prompt)[0][0] for prompt in prompts]
    pooled = torch.cat([further["pooled_output"] for _, further in encoded])
    return [[torch.cat([context for context, _ in encoded]), {"pooled_output": pooled}]]


def _noise(start: int, count: int, size: int) -> torch.Tensor:
    shape, generator = (4, size // 8, size // 8), torch.Generator()
    return torch.stack([torch.randn(shape, generator=generator.manual_seed(SEED + start + at)) for at in range(count)])


# --- LoRA ---------------------------------------------------------------------------------------------------------


def cyan_prompts(n: int) -> list[str]:
    """``grid_prompts`` with cyan as the shape's colour."""
    prompts, asked = grid_prompts(n)
    return [saying_cyan(said, colour) for said, colour in zip(prompts, asked.colour.tolist(), strict=True)]


def lora_pictures(teacher: Parts, student: Parts, path: Path, n: int, size: int) -> dict[str, torch.Tensor]:
    """The images of each row: the LoRA on the teacher; on the student by KOALA LoRA Loader, with each policy for
    changes to layers that it lacks; and by the stock loader, under either of kohya's names for a block."""
    prompts = cyan_prompts(n)
    state = comfy.utils.load_torch_file(str(path))

    def stock(parts: Parts, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        patched = comfy.sd.load_lora_for_models(parts.model, None, dict(weights), 1.0, 0.0)[0]
        return sampled(parts, patched, prompts, size)

    def ours(strength: float = 1.0, fold: float = 0.0) -> torch.Tensor:
        patched = apply_lora(student.model, student.clip, path, strength, 0.0, fold).model
        return sampled(student, patched, prompts, size)

    rows: dict[str, Callable[[], torch.Tensor]] = {
        "teacher": lambda: sampled(teacher, teacher.model, prompts, size),
        "teacher + LoRA": lambda: stock(teacher, state),
        "student": lambda: sampled(student, student.model, prompts, size),
        "student + LoRA, ours": ours,
        "student + LoRA, stock": lambda: stock(student, state),
        "student + LoRA, stock, LDM names": lambda: stock(student, ldm_names(state)),
        **{f"student + LoRA, ours, fold {fold}": lambda fold=fold: ours(fold=fold) for fold in FOLDS},  # type: ignore[misc]
        **{f"student + LoRA, ours, strength {gain}": lambda gain=gain: ours(gain) for gain in GAINS},  # type: ignore[misc]
    }
    return _made(rows)


def ldm_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A LoRA under kohya's names with LDM's blocks instead of diffusers'; the stock loader accepts both."""
    modules = {_kohya(tensor.diffusers): _kohya(tensor.comfy) for tensor in tensors(SMALL_SDXL)}
    parted = {name: name.partition(".") for name in state}
    return {modules[module] + dot + suffix: state[name] for name, (module, dot, suffix) in parted.items()}


def _kohya(tensor: str) -> str:
    return f"lora_unet_{tensor.rpartition('.')[0].replace('.', '_')}"


def lora_row(row: str, pictures: torch.Tensor) -> LoraRow:
    """Judge images of ``cyan_prompts``."""
    asked, seen = grid_prompts(len(pictures))[1], judge_cyan(pictures)
    background, shape = seen.background == asked.background, seen.shape == asked.shape
    shares = (_percent(value) for value in (seen.cyan, seen.share, background, shape, seen.cyan & background & shape))
    return LoraRow(row, len(pictures), *shares)


# --- ControlNet ---------------------------------------------------------------------------------------------------


def asked_drawings(n: int) -> Drawings:
    """The drawings behind the outlines, not used in training."""
    return random_drawings(n, torch.Generator().manual_seed(SEED))


def control_pictures(teacher: Parts, student: Parts, path: Path, n: int, size: int) -> dict[str, torch.Tensor]:
    """The images of each row; the prompts name only a background."""
    drawings = asked_drawings(n)
    prompts = [caption(SHAPELESS, background=background).text for background in drawings.background.tolist()]
    hints = outlines(drawings, size)
    control = comfy.controlnet.load_controlnet(str(path))
    adapted = KoalaControlNet.execute(control).result[0]
    rows: dict[str, Callable[[], torch.Tensor]] = {
        "teacher": lambda: sampled(teacher, teacher.model, prompts, size),
        "teacher + ControlNet": lambda: sampled(teacher, teacher.model, prompts, size, control, hints),
        "student": lambda: sampled(student, student.model, prompts, size),
        "student + ControlNet, ours": lambda: sampled(student, student.model, prompts, size, adapted, hints),
        "student + ControlNet, stock": lambda: sampled(student, student.model, prompts, size, control, hints),
    }
    return _made(rows)


def control_row(row: str, pictures: torch.Tensor) -> ControlRow:
    """Judge images of ``asked_drawings``."""
    asked = asked_drawings(len(pictures))
    verdict, overlap = judge(pictures), overlaps(pictures, asked)
    followed, shape = overlap >= FOLLOWED, verdict.shape == asked.shape
    background = verdict.background == asked.background
    shares = (_percent(value) for value in (followed, shape, background, followed & shape & background))
    return ControlRow(row, len(pictures), float(overlap.mean()), *shares)


# ------------------------------------------------------------------------------------------------------------------


def _made(rows: dict[str, Callable[[], torch.Tensor]]) -> dict[str, torch.Tensor]:
    made = {}
    for row, make in rows.items():
        started = time.monotonic()
        made[row] = make()
        print(f"{row}: {time.monotonic() - started:.0f} s", flush=True)
    return made


def _percent(values: torch.Tensor) -> float:
    return 100 * float(values.float().mean())


def evaluate(teacher: Path, student: Path, work: Path, size: int, n: int = PROMPTS) -> dict[str, Any]:
    """Train what is missing in ``work``, measure every row, write the contact sheets; returns the figures for JSON."""
    lora, control = work / f"lora-{size}.safetensors", work / f"controlnet-{size}.safetensors"
    recipes = {"lora": at_size(CYAN.recipe, size), "controlnet": at_size(CONTROLNET, size)}

    def train_lora(model: Any, path: Path, log: Any, recipe: Recipe) -> None:
        training.train(model, replace(CYAN, recipe=recipe), path, log)

    for path, train, recipe in (
        (lora, train_lora, recipes["lora"]),
        (control, train_controlnet, recipes["controlnet"]),
    ):
        if not path.exists():
            train(pipeline.load(teacher), path, lambda line: print(line, flush=True), recipe)
    whole, part = load(teacher), load(student)
    with_lora = lora_pictures(whole, part, lora, n, size)
    with_control = control_pictures(whole, part, control, n, size)
    hints = outlines(asked_drawings(n), size) * 2 - 1
    for name, top in (("lora", list(with_lora.values())[:5]), ("controlnet", [hints, *with_control.values()])):
        pictures = torch.cat([row[:COLUMNS] for row in top])
        sheet.save(pictures, min(n, COLUMNS), work / f"{name}-{size}-{student.stem}.png")
    return {
        "student": student.name,
        "settings": {"steps": STEPS, "cfg": CFG, "size": size, "seed": SEED},
        "training": {name: asdict(recipe) for name, recipe in recipes.items()},
        "lora": [asdict(lora_row(row, pictures)) for row, pictures in with_lora.items()],
        "controlnet": [asdict(control_row(row, pictures)) for row, pictures in with_control.items()],
    }


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="addons-tiny", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--teacher", type=Path, required=True, help="sdxl-tiny's diffusers folder")
    parser.add_argument("--student", type=Path, required=True, help="a koala-tiny: diffusers folder or checkpoint file")
    parser.add_argument("--work", type=Path, required=True, help="folder of the trained add-ons and the contact sheets")
    parser.add_argument(
        "--size", type=int, choices=(64, 128), default=CONTROLNET.size, help="side of the images in pixels"
    )
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="images per row")
    parser.add_argument("--out", type=Path, help="JSON file for the figures, which are printed as well")
    arguments = parser.parse_args(argv)
    logging.disable(logging.ERROR)  # ComfyUI warns of each module that the stock loader cannot apply
    figures = json.dumps(
        evaluate(arguments.teacher, arguments.student, arguments.work, arguments.size, arguments.prompts), indent=2
    )
    print(figures)
    if arguments.out:
        arguments.out.write_text(figures + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
