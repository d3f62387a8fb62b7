"""distill/study/effects: its drawings, its judges, and adapters that the pack's inspectors read."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from koala_sdxl.distill.study import store
from koala_sdxl.distill.study.effects import measure, page, projection, t2i, training
from koala_sdxl.distill.study.effects.applied import Family
from koala_sdxl.distill.study.effects.measure import JUDGED, KEEP, PROMPTS, Row, some
from koala_sdxl.distill.study.effects.student import STUDENTS
from koala_sdxl.distill.study.effects.table import (
    CONTROLLED,
    EFFECTS,
    FAST,
    FRAMED,
    PLAIN,
    SKETCHED,
    STRIPED,
    TINY,
    TUNED,
    Effect,
    asked,
    plain,
)
from koala_sdxl.koala.architecture.layout import KOALA_TINY
from koala_sdxl.koala.files.control_weights import control_file
from koala_sdxl.koala.lora import report
from koala_sdxl.koala.lora.plan import inspect_lora
from tests.daily import daily
from tools.harness.testhost import ROOT
from tools.measure import reference
from tools.tiny import SHIPPED, denoiser, pipeline
from tools.tiny.grow import SDXL_TINY
from tools.tiny.pictures import COLOUR_NAMES, SHAPE_NAMES, draw, random_drawings

DRAWINGS = random_drawings(90, torch.Generator().manual_seed(5))
FEW: dict[str, Any] = {"steps": 2, "batch": 2, "size": 64, "drawings": 4, "warm": 1}


@pytest.mark.parametrize("effect", daily(EFFECTS, [STRIPED, TUNED]), ids=lambda effect: effect.name)
def test_an_effect_is_seen_where_it_is_and_nowhere_else(effect: Effect) -> None:
    shapes, backs = ([every.index(name) for name in names] for every, names in _seen_with(effect))
    some = DRAWINGS.pick(
        torch.isin(DRAWINGS.shape, torch.tensor(shapes)) & torch.isin(DRAWINGS.background, torch.tensor(backs))
    )
    assert effect.seen(effect.drawn(some, 128), some).float().mean() > 0.9
    if effect.drawn is draw:
        return
    assert not effect.seen(draw(some, 128), some).any()
    others = [other for other in EFFECTS if other.drawn not in (effect.drawn, draw)]
    for other in others:
        assert effect.seen(other.drawn(some, 128), some).float().mean() < 0.05, other.name


def _seen_with(effect: Effect) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    return (SHAPE_NAMES, effect.shapes), (COLOUR_NAMES, effect.backgrounds)


@pytest.mark.parametrize("effect", daily(EFFECTS, [TINY, FRAMED]), ids=lambda effect: effect.name)
def test_another_thing_than_what_was_asked_for_is_not_right(effect: Effect) -> None:
    made = effect.drawn(DRAWINGS, 128)
    for name, number in (("shape", len(SHAPE_NAMES)), ("background", len(COLOUR_NAMES))):
        other = replace(DRAWINGS, **{name: (getattr(DRAWINGS, name) + 1) % number})
        assert effect.seen(made, other).float().mean() < 0.1


def test_no_prompt_that_is_learned_from_is_judged() -> None:
    for effect in (*EFFECTS, PLAIN):
        for seed in range(3):
            learned = {*some(effect, False, PROMPTS, seed), *some(PLAIN, False, KEEP, seed)}
            judged = some(effect, True, JUDGED, seed)
            assert len(set(judged)) == JUDGED
            assert not learned & set(judged)
    field = (4, 5, 0)
    assert STRIPED.said(plain(field)) == "a striped orange star on a red background"
    assert TUNED.said(plain(field)) == plain(field).text == "an orange star on a red background"
    assert asked([field]).shape.tolist() == [4]


@pytest.mark.parametrize("effect", daily([TINY, FRAMED, FAST], [TINY]), ids=lambda effect: effect.name)
def test_an_adapter_is_trained_and_read(effect: Effect, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    training.train(_teacher(), replace(effect, recipe=replace(effect.recipe, **FEW)), path, print)
    plan = inspect_lora(path, KOALA_TINY)
    assert plan.origin
    assert plan.origin.model == "SDXL"
    assert plan.count("applied")
    assert plan.count("unknown") == 0
    assert bool(plan.text) == effect.texts
    assert bool([module for module in plan.modules if "in_layers" in module.target]) == ("conv1" in effect.modules)


def test_a_fine_tune_is_a_folder_with_other_weights(tmp_path: Path) -> None:
    teacher = _teacher()
    before = {name: weight.clone() for name, weight in teacher.unet.state_dict().items()}
    training.train(teacher, replace(TUNED, recipe=replace(TUNED.recipe, **FEW)), tmp_path / "tuned", print)
    after = pipeline.load(tmp_path / "tuned").unet.state_dict()
    assert after.keys() == before.keys()
    assert sum(not torch.equal(after[name], before[name].half().float()) for name in after) > len(after) / 2


def _teacher() -> Any:
    """sdxl-tiny with a random U-Net."""
    torch.manual_seed(0)
    made = reference.pipeline(SHIPPED)
    made.unet = denoiser.new_unet(SDXL_TINY)
    return made


def test_a_controlnet_is_trained_and_seen_by_what_it_follows(tmp_path: Path) -> None:
    path = tmp_path / "control.safetensors"
    training.train(_teacher(), replace(CONTROLLED, recipe=replace(CONTROLLED.recipe, **FEW)), path, print)
    assert control_file(path) == path
    fields = some(CONTROLLED, True, JUDGED, 0)
    said = {CONTROLLED.said(plain(field)) for field in fields}
    assert said <= {f"{article} {name} background" for name in COLOUR_NAMES for article in ("a", "an")}
    drawings = asked(fields)
    assert CONTROLLED.seen(draw(drawings, 128), drawings).float().mean() > 0.9
    elsewhere = replace(drawings, x=drawings.x + 0.5)
    assert not CONTROLLED.seen(draw(elsewhere, 128), drawings).any()


def test_a_t2i_adapter_is_trained_and_changes_either_network(tmp_path: Path) -> None:
    path, teacher = tmp_path / "t2i.safetensors", _teacher()
    training.train(teacher, replace(SKETCHED, recipe=replace(SKETCHED.recipe, **FEW)), path, print)
    assert control_file(path) == path
    hints = measure.control_images(SKETCHED, some(SKETCHED, True, 2, 0))
    assert hints is not None
    given = torch.zeros(4, 4, 16, 16), torch.tensor(5), torch.zeros(4, 77, 96)
    added = {"added_cond_kwargs": {"text_embeds": torch.zeros(4, 64), "time_ids": torch.zeros(4, 6)}}
    for model in (teacher, reference.pipeline(SHIPPED)):
        with torch.no_grad():
            before = model.unet(*given, **added).sample
            with t2i.on(model, path, hints):
                found = model.unet(*given, **added).sample
            assert torch.equal(model.unet(*given, **added).sample, before)
        assert not torch.allclose(found[0], found[1])
        torch.testing.assert_close(found[:2], found[2:])  # with guidance each image is there twice


def test_a_change_is_projected_onto_what_the_kept_matrix_spans() -> None:
    sdxl = torch.diag(torch.tensor([5.0, 4.0, 0.01, 0.01]))  # large in its first two directions
    change = torch.arange(1.0, 17).view(4, 4)
    apart = change.clone()
    apart[:2, 2:] = apart[2:, :2] = 0  # what mixes large and small directions is dropped
    torch.testing.assert_close(projection.project(change, sdxl, sdxl), apart)

    quarter = sdxl.flip(0, 1)  # the KOALA's are the last two: nothing lies inside or outside both
    torch.testing.assert_close(projection.project(change, sdxl, quarter), torch.zeros(4, 4))

    bias = torch.ones(4)
    changes = {"conv.weight": change.view(4, 1, 2, 2), "bias": bias}
    weights = {"conv.weight": sdxl.view(4, 1, 2, 2)}
    found = dict(projection.projected(changes.items(), weights.__getitem__, weights.__getitem__))
    torch.testing.assert_close(found, {"conv.weight": apart.view(4, 1, 2, 2), "bias": bias})


@pytest.mark.nightly
def test_the_whole_study_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = _teacher()
    pipeline.save(teacher, tmp_path / "sdxl-tiny")
    for name, number in {"PROMPTS": 4, "KEEP": 4, "JUDGED": 6, "JUDGED_PLAIN": 1}.items():
        monkeypatch.setattr(measure, name, number)
    monkeypatch.setattr(measure, "CARRY", {"samples": 8, "steps": 1, "batch": 4, "size": 64, "dtype": "fp32"})
    study = measure.Study(Family(tmp_path / "sdxl-tiny", SHIPPED, "distilled"), tmp_path / "work")
    every = []
    for effect in (TINY, TUNED, CONTROLLED, SKETCHED):
        few = replace(effect, recipe=replace(effect.recipe, **FEW))
        rows = list(study.rows(few, 0))
        assert [row.way for row in rows] == list(measure.ways_of(effect))
        assert {row.plain is None for row in rows} == {effect.word is None}
        with monkeypatch.context() as patch:
            patch.setattr(measure, "judged", None)  # nothing is judged twice
            assert list(study.rows(few, 0)) == rows
        every += rows
        assert [row.near is None for row in rows] == [row.way == measure.SDXL for row in rows]
    found = measure.figures(every, [study.family], study.work)
    assert [one["name"] for one in found["carried"]] == ["controlnet-refit-0", "fine-tune-refit-0", "tiny-refit-0"]
    assert page.effects({"effects": found}).count("| tiny |") == 3


def test_the_section_gives_means_over_seeds_and_over_loras() -> None:
    shown = {("tiny", 0): 50.0, ("tiny", 1): 60.0, ("cyan", 0): 90.0, ("fine-tune", 0): 10.0}
    kept = {"fine-tune": None}
    rows = [
        asdict(Row("" if way == measure.SDXL else "distilled", name, way, seed, 30, value, 18, kept.get(name, 100.0)))
        for (name, seed), value in shown.items()
        for way in measure.WAYS
    ]
    shares = {"lineage": 0.5, "fit": 0.7, "refit": 0.8}
    carried = [
        {"student": "distilled", "seconds": {"fit": 120.0, "refit": took}, "shares": shares} for took in (60.0, 120.0)
    ]
    figures = {
        "rows": rows,
        "carried": carried,
        "carry": measure.CARRY,
        "teacher": asdict(denoiser.GROWN),
        "prompts": 24,
        "distance": {"distilled": 0.15},
        "students": STUDENTS,
    }
    lines = page.effects({"effects": figures}).splitlines()
    assert "| shown | tiny |" + " 55 ± 7 |" * len(measure.WAYS) in lines
    assert "| shown | fine-tune |" + " 10 |" * len(measure.WAYS) in lines
    assert "| kept | cyan |" + " 100 |" * len(measure.WAYS) in lines
    said = " ".join(lines)
    assert "refit 72 %. For 100 images that show one on SDXL: lineage 100," in said  # of 55 and 90
    assert "took 2 to 2 minutes by *fit* and 3 to 4 minutes by *refit*" in said
    assert "they reach 50 % by lineage, 70 % by fit, 80 % by refit (mean)." in said


IN_PICTURES = {
    "a word for a colour (attention)": "cyan",
    "a word for a size (attention, text encoders)": "tiny",
    "a style, only outlines (all linear layers)": "outlined",
    "a word for stripes (all linear layers)": "striped",
    "a word for a black frame (LoCon: convolutions, too)": "framed",
    "mean of these five LoRAs": page.MEAN,
    "prompts without the word of the four that have one, as asked for (100 without a LoRA)": page.KEPT,
    "8 steps without guidance (76 without the LoRA)": "fast",
    "a fine-tune, only outlines": "fine-tune",
    "a ControlNet that follows outlines (4 without)": "controlnet",
    "a T2I-Adapter that does": "t2i-adapter",
}
"""Rows of the table of docs/sdxl-add-ons.md, and what is in them."""


def test_the_loader_the_readme_and_the_page_on_add_ons_tell_what_was_measured() -> None:
    data = store.newest()
    assert page.by_lineage(data) == report.IN_PICTURES
    found = page.for_hundred(data)

    def told(effect: str, *ways: str) -> str:
        return "; ".join(str(found[effect][way]) for way in ways)

    rows = [line.rpartition(" | ")[2] for line in (ROOT / "README.md").read_text("utf-8").splitlines() if "|" in line]
    for way in ("lineage", "fit", "refit"):
        mean, colour, stripes = (told(effect, way) for effect in (page.MEAN, "cyan", "striped"))
        assert f"{mean}, mean of five: {colour} for a colour, {stripes} for stripes |" in "\n".join(rows)
    assert f"{told('fine-tune', 'lineage', 'fit', 'refit')} |" in rows
    assert f"{told('controlnet', 'lineage')} |" in rows
    assert f"{told('t2i-adapter', 'lineage')} |" in rows

    shares, text = page.of_hundred(data), (ROOT / "docs" / "sdxl-add-ons.md").read_text("utf-8").replace("**", "")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    for label, effect in IN_PICTURES.items():
        ways = (measure.SDXL, "lineage", "fit", "refit")
        assert [label, *(str(shares[effect].get(way, "")) for way in ways)] in table
