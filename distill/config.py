"""A run's configuration: a TOML file, read into frozen models. The one place with every key, default and unit."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError
from pydantic_core import PydanticCustomError

from ..koala.architecture.layout import KOALA_1_7B, KOALA_1B, KOALA_700M, Layout
from ..koala.releases import VARIANTS, Settings
from .errors import UserError

NAMED_LAYOUTS: dict[str, Layout] = {"koala-700m": KOALA_700M, "koala-1b": KOALA_1B, "koala-1.7b": KOALA_1_7B}

Place = Literal["self-attention", "cross-attention", "residual", "feed-forward", "last", "none"]
PLACES: tuple[Place, ...] = get_args(Place)
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]


def _names(value: Any) -> Any:
    found = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else ()
    if not found or not all(isinstance(name, str) for name in found):
        raise PydanticCustomError("names", "Input should be a name or a list of names")
    return found


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
"""One name or a list of them."""


class Table(BaseModel):
    """A table of the file. Unknown keys and values of another type are errors; paths are relative to its folder."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def key(default: Any, description: str) -> Any:
    """A key with its default and its meaning, unit included."""
    return Field(default, description=description)


class TeacherTable(Table):
    model: Path = key(
        ..., "SDXL: a Hugging Face folder or a single .safetensors file, with or without LoRAs merged into it"
    )
    tokenizer: Literal["teacher"] | Path = key(
        "teacher",
        "folder with CLIP's tokenizer: required where model is a single file; a Hugging Face folder has its own",
    )
    loras: tuple[Path, ...] = key((), "LoRA files to merge into the model at strength 1, U-Net and text encoders")
    variant: Literal["base", "lightning"] = key(
        "base", "lightning for a step-distilled teacher; the student is then sampled as KOALA-Lightning"
    )
    dtype: Literal["fp32", "bf16", "fp16", "fp8"] = key(
        "bf16", "data type in which the teacher computes; fp8: its weights are kept in float8, and it computes in bf16"
    )


class CustomLayout(Table):
    """An unpublished layout at the teacher's widths: the fields of ``koala.architecture.layout.Layout``."""

    down: tuple[tuple[Count, ...], ...] = key(..., "transformer depth of each layer of each stage of the down blocks")
    up: tuple[tuple[Count, ...], ...] = key(..., "the same for the up blocks, deepest stage first")
    middle: Count | None = key(None, "transformer depth of the middle block; without this key there is no middle block")


WORDS = ("teacher", "random", "none")
"""Values that are no paths where a path may be given."""


class StudentTable(Table):
    layout: Literal["koala-700m", "koala-1b", "koala-1.7b"] | CustomLayout = key(
        "koala-700m", "the compact U-Net: a name, or a table with down, up and middle"
    )
    transformers: Literal["first", "even"] | dict[str, tuple[int, ...]] = key(
        "first",
        "which of the teacher's transformer blocks are kept: the first n, n spread evenly from the first to the last, "
        "or a table of attention module (diffusers name) = [indices in the teacher]",
    )
    start: Literal["teacher", "random"] | Path = key(
        "teacher",
        "initial weights: cut out of the teacher, random, or an earlier student (folder or .safetensors file)",
    )


class DataTable(Table):
    kind: Literal["folder", "webdataset", "huggingface"] = key(
        "folder", "images with captions in a folder, WebDataset shards (.tar), or a Hugging Face dataset on disk"
    )
    path: Path = key(..., "the folder; for webdataset also one file, or a pattern such as shards/{000..031}.tar")
    image: str = key("image", "column of the image (huggingface)")
    caption: Names = key(
        ("caption",), "column of the caption (huggingface), or field of a .json or a table; a list of names: of each"
    )
    caption_lines: bool = key(False, "each line of a .txt or .caption file is a caption of its own")
    cache: Path = key(..., "folder for latents and text embeddings, which are computed once")
    texts: Literal["embeddings", "tokens"] = key(
        "embeddings",
        "what is cached of a caption: its embeddings, or its tokens, which the text encoders embed while training",
    )
    resolution: PositiveInt = key(1024, "side of a square image, pixels; other aspect ratios have about the same area")
    bucket_step: PositiveInt = key(64, "sides of aspect buckets are multiples of this, pixels")
    max_aspect: Annotated[float, Field(ge=1)] = key(2.0, "largest ratio of a bucket's sides; 1: squares only")
    upscale: bool = key(
        False, "enlarge images that are smaller than their bucket; otherwise they are skipped and counted"
    )
    min_side: Count = key(0, "images whose shorter side is less are left out, pixels")
    max_image_aspect: NotNegative = key(0.0, "images with a larger ratio of sides are left out; 0: none are")
    crop: Literal["center", "random"] = key("center", "how an image is cropped to its bucket; fixed when it is cached")
    caption_dropout: Share = key(0.1, "share of captions replaced by zeros, which is SDXL's empty prompt")
    workers: Count = key(2, "processes that read the cache while training")


class LossTable(Table):
    task: NotNegative = key(1.0, "weight of the error against the true noise")
    output: NotNegative = key(1.0, "weight of the error against the teacher's output")
    feature: NotNegative = key(1.0, "weight of the error against the teacher's features")
    place: Place = key(
        "self-attention",
        "which features are compared: the output of every such layer, or the last of each stage (BK-SDM)",
    )
    stages: tuple[str, ...] = key(
        ("down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1"),
        "stages whose features are compared (diffusers names); those that the student lacks are ignored",
    )
    stage_weights: dict[str, NotNegative] = key({}, "stage = factor of its features' error; default 1")
    normalise: bool = key(False, "divide each layer's error by the mean square of the teacher's feature (LAPTOP-Diff)")
    weighting: Literal["none", "min-snr", "velocity"] = key(
        "none", "of task and output error by time step: none, min-SNR, or as if velocity were predicted"
    )
    gamma: PositiveFloat = key(5.0, "min-snr: the signal-to-noise ratio above which errors count less")
    most_weight: PositiveFloat = key(15.0, "velocity: the largest weight, before all are scaled to a mean of 1")


class StepsTable(Table):
    """Step distillation, instead of the losses of the table ``loss``."""

    student: Annotated[int, Field(ge=0, le=50)] = key(
        0, "sampling steps in which the student is to draw without guidance; 0: no step distillation"
    )
    teacher: PositiveInt = key(3, "steps that the teacher takes for each of the student's")
    guidance: NotNegative = key(7.5, "guidance scale of the teacher, which the student learns")


class TrainingTable(Table):
    steps: PositiveInt = key(..., "optimiser steps")
    batch: PositiveInt = key(4, "images per process in one forward pass")
    accumulate: PositiveInt = key(1, "forward passes per optimiser step")
    learning_rate: PositiveFloat = key(5e-5, "of AdamW, after warm-up")
    final_rate: Share = key(0.0, "learning rate at the last step as a share of learning_rate; cosine decay")
    warmup: Count = key(500, "optimiser steps over which the learning rate rises from 0")
    optimiser: Literal["adamw", "adamw-8bit"] = key(
        "adamw", "adamw-8bit keeps AdamW's moments in 8 bits; it needs the package bitsandbytes"
    )
    betas: tuple[Share, Share] = key((0.9, 0.999), "of AdamW")
    weight_decay: NotNegative = key(0.01, "of AdamW")
    clip: PositiveFloat = key(1.0, "largest norm of the gradient")
    ema: Annotated[float, Field(ge=0, lt=1)] = key(
        0.9999, "decay of the averaged weights, which become the result; 0: no averaging"
    )
    ema_on_cpu: bool = key(
        False, "keep the averaged weights in the CPU's memory: less on the GPU, and a copy each step"
    )
    precision: Literal["no", "bf16", "fp16"] = key("bf16", "mixed precision of the student; its weights stay in fp32")
    gradient_checkpointing: bool = key(False, "recompute activations in the backward pass: less memory, more time")
    compile: bool = key(False, "compile the transformer blocks of student and teacher with torch.compile")
    channels_last: bool = key(False, "order the channels of images last in memory, for convolutions on tensor cores")
    tf32: bool = key(False, "multiply fp32 matrices in TF32 on CUDA; for precision no, or a teacher in fp32")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = key(0, "of all random numbers")
    checkpoint_every: PositiveInt = key(500, "optimiser steps between checkpoints")
    keep: PositiveInt = key(2, "number of checkpoints kept")


class ValidationTable(Table):
    images: Count = key(0, "images held out to measure the loss on them, at most half of all; 0: no validation")
    every: PositiveInt = key(500, "optimiser steps between validations")
    judge: tuple[str, ...] = key(
        (),
        "a command of your own, program and arguments, that measures sample images: it is given their folder as its "
        "last argument, and prints a number, or a JSON object of numbers, as its last line",
    )
    clip: Literal["none"] | Path = key("none", "folder of a CLIP model, for the CLIP score of the sample images")
    best: Annotated[str, Field(pattern=r"^(lowest|highest) \S+$")] = key(
        "lowest loss",
        "how the best checkpoint is chosen: lowest or highest, and a measure: loss, clip_score, or the judge's",
    )


class LogTable(Table):
    every: PositiveInt = key(10, "optimiser steps between rows of metrics")
    to: tuple[Literal["csv", "tensorboard", "wandb"], ...] = key(
        ("csv",), "where the metrics go: metrics.csv, or logs/ for TensorBoard or W&B (offline with WANDB_MODE=offline)"
    )
    samples_every: Count = key(0, "optimiser steps between sample grids; 0: none")
    prompts: tuple[str, ...] = key((), "prompts of the sample grid")
    sample_steps: PositiveInt = key(25, "sampling steps of a sample")
    sample_cfg: NotNegative = key(7.5, "guidance scale of a sample")


class CardTable(Table):
    license: str = key("other", "licence of the weights, as Hugging Face spells it, such as openrail++ (SDXL's)")
    base_model: str = key("", "the teacher's repository on Hugging Face; empty: the model card names none")


class Config(Table):
    """A complete configuration."""

    output: Path = key(..., "folder of the run: checkpoints, metrics, samples and the result")
    teacher: TeacherTable
    student: StudentTable = StudentTable()
    data: DataTable
    loss: LossTable = LossTable()
    steps: StepsTable = StepsTable()
    training: TrainingTable
    validation: ValidationTable = ValidationTable()
    log: LogTable = LogTable()
    card: CardTable = CardTable()

    @property
    def variant(self) -> str:
        """The student's variant: a key of ``releases.VARIANTS``."""
        return "lightning" if self.steps.student else self.teacher.variant

    @property
    def settings(self) -> Settings:
        """What the student is to be sampled with."""
        published, few = VARIANTS[self.variant].settings, self.steps.student
        return replace(published, steps=few, cfg=1.0) if few else published


WITHOUT_EFFECT = {"loss": tuple(LossTable.model_fields), "log": ("sample_steps", "sample_cfg")}
"""Tables and their keys that say nothing to a step distillation."""
PATHS = (
    ("output",),
    ("teacher", "model"),
    ("teacher", "tokenizer"),
    ("teacher", "loras"),
    ("student", "start"),
    ("data", "path"),
    ("data", "cache"),
    ("validation", "clip"),
)
"""Keys whose values are paths, relative to the file's folder."""


def read(path: Path) -> Config:
    """Read a configuration file; relative paths in it are resolved against its folder.

    Raises UserError with one line for each fault, which begins with the key.
    """
    try:
        found = tomllib.loads(path.read_text("utf-8-sig"))  # Windows' editors may begin a file with a mark
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); expected a TOML file. distill/example.toml is one."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a TOML file: {error}. See distill/example.toml.") from None
    for *tables, name in PATHS:
        table: Any = found
        for outer in tables:
            table = table.get(outer) if isinstance(table, dict) else None
        if isinstance(table, dict) and name in table:
            table[name] = _from(path.parent, table[name])
    if isinstance(found.get("validation"), dict) and isinstance(words := found["validation"].get("judge"), list):
        words[:] = [str((path.parent / word).absolute()) if _is_file(path.parent, word) else word for word in words]
    try:
        config = Config.model_validate_json(json.dumps(found, default=str), strict=True)  # as JSON: lists are tuples
    except ValidationError as error:
        raise UserError("\n".join(f"{path}: {fault}" for fault in _faults(error, found))) from None
    if config.steps.student and (idle := list(_without_effect(found))):
        raise UserError("\n".join(f"{path}: {fault}" for fault in idle))
    for name, folder in (("output", config.output), ("data.cache", config.data.cache)):
        for taken in (place for place in (folder, *folder.parents) if place.is_file()):
            raise UserError(f"{path}: {name} = {str(folder)!r} cannot be a folder: {taken} is a file. Change it.")
    return config


def _without_effect(found: dict[str, Any]) -> Iterator[str]:
    """The given keys that a step distillation does not read, each as a sentence."""
    for table, keys in WITHOUT_EFFECT.items():
        for name in (name for name in keys if name in found.get(table, {})):
            yield (
                f"{table}.{name} = {found[table][name]!r} has no effect where steps.student is set; expected no such "
                f"key. Remove it, or steps.student."
            )


def _from(folder: Path, value: Any) -> Any:
    """A path, or each path of a list, resolved against a folder; any other value unchanged."""
    if isinstance(value, list):
        return [_from(folder, one) for one in value]
    return str(folder / Path(value).expanduser()) if isinstance(value, str) and value not in WORDS else value


def _is_file(folder: Path, word: Any) -> bool:
    """Whether a word of a command is a file beside the configuration, such as a script."""
    return isinstance(word, str) and (folder / word).is_file()


EITHER: dict[tuple[str, ...], type[Table]] = {
    ("teacher", "tokenizer"): TeacherTable,
    ("validation", "clip"): ValidationTable,
    **{("student", name): StudentTable for name in ("layout", "transformers", "start")},
}
"""Keys that take a word or something else, for which pydantic reports both -> their table."""


def _faults(error: ValidationError, found: dict[str, Any]) -> Iterator[str]:
    """Each fault as a sentence that begins with the key."""
    for fault in error.errors():
        where = [str(part) for part in fault["loc"]]
        either = EITHER.get(tuple(where[:2]))
        if either and len(where) > 2:
            if isinstance(found[where[0]][where[1]], dict) == (fault["type"] == "literal_error"):
                continue  # for a table report what is wrong in it, for any other value which words are known
            del where[2]
        known = keys_of(*where[:-1])
        near = get_close_matches(where[-1], known, 1) if where else []
        if fault["type"] == "extra_forbidden":
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}."
            yield f"{'.'.join(where)} is not a known key; {hint}"
        elif fault["type"] == "missing":
            yield f"{'.'.join(where)} is missing; it has no default. Add it."
        else:
            wanted = "Input should be a table" if fault["type"] == "model_type" else fault["msg"]
            meant = f" ({either.model_fields[where[1]].description})" if either and len(where) == 2 else ""
            yield f"{'.'.join(where)} = {fault['input']!r} cannot be used: {wanted}{meant}. Change it."


def keys_of(*tables: str) -> tuple[str, ...]:
    """The keys of a table, which is named by its path; none where there is no such table."""
    model: Any = Config
    for name in tables:
        field = getattr(model, "model_fields", {}).get(name)
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        model = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
    return tuple(getattr(model, "model_fields", {}))
