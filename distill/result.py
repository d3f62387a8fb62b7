"""What a run leaves: a diffusers folder and a single file, both with metadata that says how they were made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from ..koala.architecture.keys import parameters
from ..koala.architecture.layout import name
from ..koala.architecture.lineage import Lineage
from ..koala.files.atomic_write import written_whole
from ..koala.files.conventions import DISTILLATION_KEY
from ..koala.files.export import unet_config
from ..koala.files.write import TextAndVAE, cast_state, stored_dtypes, write_checkpoint, write_folder
from ..koala.model_info import ModelFacts
from ..koala.releases import SCHEDULER_CONFIG, VARIANTS, Identity
from . import card, tokenizer
from .config import Config
from .errors import UserError
from .teacher import Teacher

DTYPE = "fp16"
"""Of the U-Net and the text encoders; the VAE stays in fp32, as SDXL's own overflows in fp16."""
ADVICE = "Start again in another output folder, with a lower training.learning_rate."


def distillation(config: Config, teacher: Teacher, lineage: Lineage, images_a_step: int) -> str:
    """The metadata ``DISTILLATION_KEY``: how the student was trained, as JSON."""
    learned = {"few_steps": config.steps} if config.steps.student else {"loss": config.loss}
    return json.dumps(
        {
            "layout": name(lineage.student),
            "teacher": teacher.name,
            "loras": [path.name for path in config.teacher.loras],
            "start": Path(config.student.start).name,
            "steps": config.training.steps,
            "images_a_step": images_a_step,
            **{name: table.model_dump(mode="json") for name, table in learned.items()},
        }
    )


def unet(lineage: Lineage, weights: dict[str, torch.Tensor]) -> UNet2DConditionModel:
    """A U-Net of the student's layout with these weights."""
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(unet_config(lineage.student))
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def write(
    config: Config,
    teacher: Teacher,
    lineage: Lineage,
    weights: dict[str, torch.Tensor],
    target: Path,
    images_a_step: int,
) -> None:
    """Write the folder ``target`` with NAME (a diffusers folder with a model card) and NAME.safetensors (ComfyUI's
    names).

    NAME is that of the output folder. ``weights`` are the student's, by diffusers' names; ``images_a_step`` counts
    those of all processes.

    Raises UserError where it cannot be written, or a weight is not finite or beyond fp16's range; the last checkpoint
    is not changed.
    """
    if bad := next((key for key, weight in weights.items() if not weight.isfinite().all()), None):
        raise UserError(f"the result was not written: {bad} of the student is not finite. {ADVICE}")
    title = config.output.resolve().name
    made = teacher.pipeline()
    key = "steps.student" if config.steps.student else "teacher.variant"
    spacing = {"timestep_spacing": "trailing"} if config.steps.student else {}
    facts = ModelFacts(
        source=title,
        layout=lineage.student,
        dtype=DTYPE,
        bytes=2 * parameters(lineage.student),
        identity=Identity(replace(VARIANTS[config.variant], settings=config.settings), f"as {key} says"),
        scheduler={**SCHEDULER_CONFIG, **json.loads(made.scheduler.to_json_string()), **spacing},
        kept_transformers=lineage.kept_transformers,
    )
    extra = {DISTILLATION_KEY: distillation(config, teacher, lineage, images_a_step)}
    dtypes = stored_dtypes(DTYPE)
    try:
        student = cast_state(weights, dtypes)
        others = TextAndVAE(
            text_encoder=cast_state(made.text_encoder.state_dict(), dtypes.text),
            text_encoder_2=cast_state(made.text_encoder_2.state_dict(), dtypes.text),
            vae=made.vae.state_dict(),
        )
        with written_whole(target, 0) as unfinished:
            unfinished.mkdir()
            vocabulary = tokenizer.read_files(teacher.tokenizer)
            write_folder(unfinished / title, facts, student, others, vocabulary, extra)
            (unfinished / title / "README.md").write_text(card.text(config, lineage, teacher, images_a_step), "utf-8")
            write_checkpoint(unfinished / f"{title}.safetensors", facts, student, others, extra)
    except OSError as error:
        raise UserError(f"the result could not be written: {error} The last checkpoint holds it; run again.") from None
    except ValueError as error:  # beyond the range of fp16
        raise UserError(f"the result was not written: {error} {ADVICE}") from None
