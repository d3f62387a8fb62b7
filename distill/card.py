"""The model card of a result: the README.md that Hugging Face's hub shows, with what the run knows of itself."""

from __future__ import annotations

import csv

from huggingface_hub import ModelCardData

from ..koala.architecture.keys import parameters
from ..koala.architecture.layout import name
from ..koala.architecture.lineage import Lineage
from .config import Config
from .evaluation import VALIDATED
from .teacher import Teacher

TAGS = ["koala", "sdxl", "distillation", "diffusers", "comfyui"]
LORAS = " with the LoRAs {}"


def text(config: Config, lineage: Lineage, teacher: Teacher, images_a_step: int) -> str:
    """The card as Markdown, with YAML front matter."""
    front = ModelCardData(
        license=config.card.license,
        base_model=config.card.base_model or None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=TAGS,
    )
    title, used = config.output.resolve().name, config.settings
    layout = name(lineage.student)
    table = "\n".join(f"| {fact} | {value} |" for fact, value in _facts(config, teacher, images_a_step).items())
    return f"""---
{front.to_yaml()}
---

# {title}

A {layout} ({parameters(lineage.student) / 1e6:,.0f} M weights): SDXL's U-Net with layers removed, distilled from
{teacher.name}. Text encoders and VAE are the teacher's.

## Use

In ComfyUI, with the node *KOALA Checkpoint Loader*. With diffusers, where the layout is a published one:

```python
import torch
from diffusers import StableDiffusionXLPipeline

pipeline = StableDiffusionXLPipeline.from_pretrained("{title}", torch_dtype=torch.float16).to("cuda")
pipeline("a photograph of a fox", num_inference_steps={used.steps}, guidance_scale={used.cfg:g})
```

## Training

| | |
|---|---|
{table}
"""


def _loss(config: Config) -> str:
    loss, steps = config.loss, config.steps
    if steps.student:
        return f"{steps.student} steps, {steps.teacher} of the teacher's for each, guidance scale {steps.guidance:g}"
    place = "" if loss.place == "none" else f", features of {loss.place} x {loss.feature:g}"
    return f"task x {loss.task:g}, output x {loss.output:g}{place}"


def _facts(config: Config, teacher: Teacher, images_a_step: int) -> dict[str, str]:
    table = config.training
    loras = ", ".join(path.name for path in config.teacher.loras)
    return {
        "teacher": f"{teacher.name}{LORAS.format(loras) if loras else ''}, {config.teacher.dtype}",
        "steps": f"{table.steps:,} of {images_a_step} images, {config.data.resolution} px",
        "distilled" if config.steps.student else "loss": _loss(config),
        "optimiser": f"{table.optimiser}, learning rate {table.learning_rate:g}, precision {table.precision}",
        "averaged weights": f"decay {table.ema:g}" if table.ema else "none",
        **_measures(config),
    }


def _measures(config: Config) -> dict[str, str]:
    """What validation measured last, by name."""
    path = config.output / VALIDATED
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    last = rows[-1] if rows else {}
    return {f"{measure}, in validation": value for measure, value in last.items() if measure != "step" and value}
