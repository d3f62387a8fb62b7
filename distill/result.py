"""What a run leaves: a diffusers folder and a single file that say what they were made of, by the pack's own saver."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from tools.harness import inprocess

from ..koala.architecture.layout import name
from ..koala.architecture.lineage import Lineage
from ..koala.files import atomic_write as disk
from ..koala.files.conventions import DISTILLATION_KEY, KEPT_KEY, VARIANT_KEY
from ..koala.files.export import unet_config
from .config import Config
from .errors import UserError
from .teacher import Teacher

ANEW = "Begin anew in another output folder, with a lower training.learning_rate."


def metadata(config: Config, teacher: Teacher, line: Lineage) -> dict[str, str]:
    """What the result says of itself: variant, layout, teacher, steps, losses, and the transformer blocks it kept."""
    told = {
        "layout": name(line.student),
        "teacher": teacher.name,
        "loras": [path.name for path in config.teacher.loras],
        "start": Path(config.student.start).name,
        "steps": config.training.steps,
        "images_a_step": config.training.batch * config.training.accumulate,
        "loss": config.loss.model_dump(mode="json"),
    }
    return {
        VARIANT_KEY: config.teacher.variant,
        KEPT_KEY: json.dumps(dict(line.transformers)),
        DISTILLATION_KEY: json.dumps(told),
    }


def unet(line: Lineage, weights: dict[str, torch.Tensor]) -> UNet2DConditionModel:
    """A U-Net of the student's layout with these weights."""
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(unet_config(line.student))
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def write(config: Config, teacher: Teacher, line: Lineage, weights: dict[str, torch.Tensor], target: Path) -> None:
    """Write ``target`` / ``NAME`` (a diffusers folder) and ``NAME.safetensors``, fp16; NAME is the output folder's.

    Raises UserError where it cannot be written, or where weights are no numbers of fp16; the checkpoint is still there.
    """
    if odd := next((name for name, weight in weights.items() if not weight.isfinite().all()), None):
        raise UserError(f"the result was not written: {odd} of the student holds what is no finite number. {ANEW}")
    title = config.output.resolve().name
    said = metadata(config, teacher, line)
    inprocess.activate()
    from .. import koala_loader
    from ..host import saver as koala_saver

    try:
        with tempfile.TemporaryDirectory(dir=config.output) as folder, disk.written_whole(target, 0) as aside:
            raw = Path(folder) / title
            teacher.pipeline(unet(line, weights)).save_pretrained(raw, safe_serialization=True)
            aside.mkdir()
            loaded = koala_loader.load_folder(raw)
            koala_saver.save_folder(aside / title, *loaded, "fp16", said)
            koala_saver.save_checkpoint(aside / f"{title}.safetensors", *loaded, "fp16", said)
    except OSError as error:
        raise UserError(f"the result could not be written: {error} The last checkpoint holds it; run again.") from None
    except ValueError as error:  # beyond the range of fp16
        raise UserError(f"the result was not written: {error} {ANEW}") from None
