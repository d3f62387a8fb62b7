"""An adapter's effect on SDXL and on a KOALA, carried over in each way: drawn and counted, each part once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from torchvision.transforms.functional import to_pil_image

from tools.measure.bench import meter
from tools.tiny import autoencoder, denoiser, pipeline

from ....koala.files.atomic_write import replace_file
from ....koala.files.conventions import CARRY_KEY
from ...carry import run
from ...carry.settings import Settings
from .. import plots
from ..addon_pictures import outlines
from . import t2i, training
from .applied import Family, by_place, by_projection, from_file, on_teacher
from .student import STUDENTS, distance
from .table import EFFECTS, PLAIN, Effect, Field, asked, plain

PROMPTS, KEEP = 48, 24  # at most, that an adapter is carried over with, and without its word
JUDGED, JUDGED_PLAIN = 24, 12  # images a row and seed
SHOWN = 6  # columns of a picture
SIZE = 128
CARRY: dict[str, Any] = {"samples": 768, "steps": 300, "batch": 16, "size": SIZE, "dtype": "fp32"}
SDXL = "SDXL"
WITHOUT = "KOALA without"
BY_PLACE = (SDXL, WITHOUT, "lineage")
LEARNED = ("fit", "refit")
PROJECTION = "projection"
WAYS = (*BY_PLACE, PROJECTION, *LEARNED)
say = partial(print, flush=True)
Pipeline = AbstractContextManager[StableDiffusionXLPipeline]


@dataclass(frozen=True)
class Row:
    """Percentages: of n images of prompts that ask for the effect those that show it, with all else that they ask for;
    of n_plain images of prompts that do not ask for it those that show what they ask for (none for a style)."""

    student: str
    """Its name; none for SDXL."""
    effect: str
    way: str
    seed: int
    n: int
    shown: float
    n_plain: int
    plain: float | None
    near: float | None = None
    """How near the n images are to SDXL's with the adapter, of the same prompts and noise: PSNR in dB."""


@dataclass(frozen=True)
class Study:
    """The models and the work folder; adapters and SDXL's images are common to all students."""

    family: Family
    work: Path

    def file(self, folder: str, name: str, common: bool = False) -> Path:
        """A file's path in a folder of the work folder, which is there."""
        path = (self.work if common else self.work / self.family.name) / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def adapter(self, effect: Effect) -> Path:
        """The trained adapter, trained if it is not there."""
        path = self.file(
            "adapters", effect.name if effect.kind == "fine-tune" else f"{effect.name}.safetensors", common=True
        )
        if not path.exists():
            training.train(self.family.whole(), effect, path, say)
        return path

    def settings(self, effect: Effect, seed: int) -> Settings:
        """With which it is carried over: none of the prompts is judged."""
        out = self.file("carried", f"{effect.name}-refit-{seed}.safetensors")
        words = {"prompts": some(effect, False, PROMPTS, seed)}
        if effect.word:
            words["keep"] = some(PLAIN, False, KEEP, seed)
        files: dict[str, Any] = {name: out.with_name(f"{effect.name}-{name}-{seed}.txt") for name in words}
        for name, fields in words.items():
            said = [(effect if name == "prompts" else PLAIN).said(plain(field)) for field in fields]
            replace_file(files[name], "\n".join(said) + "\n")
        if (hints := control_images(effect, words["prompts"])) is not None:
            files["hints"] = out.with_name(f"{effect.name}-hints-{seed}")
            files["hints"].mkdir(exist_ok=True)
            for number, hint in enumerate(hints):
                to_pil_image(hint).save(files["hints"] / f"{number:02}.png")
        return Settings(
            lora=self.adapter(effect),
            teacher=self.family.teacher,
            student=self.family.student,
            out=out,
            seed=seed,
            draw_steps=effect.use.steps,
            cfg=effect.use.cfg,
            spacing=effect.use.spacing,
            **files,
            **CARRY,
        )

    def carried(self, effect: Effect, way: str, seed: int) -> Path:
        """The LoRA that the tool makes in a way, made if it is not there; how long each part took is kept beside it."""
        given = self.settings(effect, seed)
        paths = {"fit": self.file("carried", f"{effect.name}-fit-{seed}.safetensors"), "refit": given.out}
        if not given.out.exists():
            seconds = run.run(given, say, {"fit": paths["fit"]})
            replace_file(given.out.with_suffix(".json"), json.dumps(seconds))
        return paths[way]

    def model(self, effect: Effect, way: str, seed: int) -> Pipeline:
        """The pipeline that draws a row."""
        if way == WITHOUT:
            return nullcontext(self.family.part())
        hints = control_images(effect, some(effect, True, JUDGED, seed))
        if effect.kind == "T2I-Adapter":
            assert hints is not None
            return t2i.on(self.family.whole() if way == SDXL else self.family.part(), self.adapter(effect), hints)
        given = self.settings(effect, seed)
        if way == SDXL:
            return on_teacher(self.family, given, hints)
        if way == "lineage":
            return by_place(self.family, given, hints)
        if way == PROJECTION:
            return by_projection(self.family, given)
        path = self.carried(effect, way, seed)
        if hints is not None:  # the new ControlNet is used like the old one
            return by_place(self.family, replace(given, lora=path), hints)
        return from_file(self.family, path)

    def rows(self, effect: Effect, seed: int) -> Iterator[Row]:
        """Every way, drawn and judged; what was judged before is not again."""
        made: dict[str, torch.Tensor] = {}
        ways = ways_of(effect)
        for way in ways:
            path = self.file("rows", f"{effect.name}-{way}-{seed}.json", common=way == SDXL)
            if not path.exists():
                with self.model(effect, way, seed) as model:
                    row, images = judged(model, "" if way == SDXL else self.family.name, effect, way, seed)
                torch.save(images, path.with_suffix(".pt"))
                replace_file(path, json.dumps(asdict(row)))
            made[way] = torch.load(path.with_suffix(".pt"), weights_only=True)
            row = Row(**json.loads(path.read_text("utf-8")))
            error = float((made[way] - made[SDXL]).square().mean())
            yield row if way == SDXL else replace(row, near=autoencoder.decibels(error))
        shown = some(effect, True, JUDGED, seed)[:SHOWN]
        prompts = [effect.said(plain(field)) for field in shown]
        named = {f"{effect.name}: {way}": made[way][:SHOWN] for way in ways}
        if (hints := control_images(effect, shown)) is not None:
            named = {f"{effect.name}: what it sees": hints / 127.5 - 1, **named}
        plots.labelled(named, prompts, self.file("sheets", f"{effect.name}-{seed}.png"))


def ways_of(effect: Effect) -> tuple[str, ...]:
    """Those in which it is carried over."""
    if effect.kind == "T2I-Adapter":
        return BY_PLACE
    return (*BY_PLACE, *LEARNED) if effect.sees_outlines else WAYS


def control_images(effect: Effect, fields: list[Field]) -> torch.Tensor | None:
    """What an effect sees with prompts: RGB, uint8 [n, 3, SIZE, SIZE]; none for what sees nothing."""
    if not effect.sees_outlines:
        return None
    return outlines(asked(fields), SIZE).mul(255).round().byte()


def figures(rows: Sequence[Row], family: Sequence[Family], work: Path) -> dict[str, Any]:
    """What there is to store: rows, how their adapters were carried over, and all settings."""
    carried, names = [], {f"{row.effect}-refit-{row.seed}" for row in rows}
    for one in family:
        every = sorted((work / one.name / "carried").glob("*.safetensors"))
        for path in (path for path in every if path.stem in names):
            with safe_open(path, framework="pt") as file:
                origin = json.loads(file.metadata()[CARRY_KEY])
            seconds = json.loads(path.with_suffix(".json").read_text("utf-8"))
            told = {"student": one.name, "name": path.stem, "seconds": seconds}
            carried.append({**told, "shares": origin["shares"], "way": origin["way"]})
    return {
        "rows": [asdict(row) for row in dict.fromkeys(rows)],
        "carried": carried,
        "distance": {one.name: distance(one.teacher, one.student) for one in family},
        "recipes": {effect.name: asdict(effect.recipe) for effect in EFFECTS},
        "teacher": asdict(denoiser.GROWN),
        "students": STUDENTS,
        "prompts": PROMPTS,
        "carry": CARRY,
        "computer": meter.computer(),
    }


def some(effect: Effect, held_out: bool, n: int, seed: int) -> list[Field]:
    """n different contents of prompts."""
    every = effect.fields(held_out)
    return [every[at] for at in torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:n].tolist()]


def judged(
    model: StableDiffusionXLPipeline, student: str, effect: Effect, way: str, seed: int
) -> tuple[Row, torch.Tensor]:
    """A row, and the images of prompts that ask for the effect."""

    def drawn(of: Effect, count: int, kind: int) -> tuple[torch.Tensor, torch.Tensor]:
        fields = some(of, True, count, seed)
        said = [of.said(plain(field)) for field in fields]
        model.scheduler = model.scheduler.from_config(model.scheduler.config, timestep_spacing=of.use.spacing)
        start = 10**5 * (2 * seed + kind)
        made = pipeline.pictures(model, said, seed=start, size=SIZE, steps=of.use.steps, cfg=of.use.cfg)
        return made, of.seen(made, asked(fields)).float()

    images, shown = drawn(effect, JUDGED, 1)
    row = Row(student, effect.name, way, seed, JUDGED, 100 * float(shown.mean()), 0, None)
    if effect.word:
        kept = drawn(PLAIN, JUDGED_PLAIN, 2)[1]
        row = replace(row, n_plain=JUDGED_PLAIN, plain=100 * float(kept.mean()))
    return row, images
