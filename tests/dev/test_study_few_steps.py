"""distill/study/few_steps: images drawn in other ways, the picture of them, and the page's section."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from koala_sdxl.distill.study import few_steps, page, plots
from koala_sdxl.distill.study.few_steps import ROWS, STUDENT, TEACHER, UNTRAINED, Row
from koala_sdxl.koala.releases import VARIANTS
from tools.measure import reference
from tools.tiny import SHIPPED, evaluate


def test_a_row_is_drawn_with_its_steps_guidance_and_spacing() -> None:
    model = reference.pipeline(SHIPPED)
    seen: list[tuple[int, int]] = []
    model.unet.register_forward_pre_hook(lambda _, given: seen.append((len(given[0]), int(given[1]))))
    made = few_steps.drawn(model, replace(UNTRAINED, steps=2), model.unet, count=2)
    assert seen == [(2, 999), (2, 499)]  # cfg 1 asks for no unguided half
    seen.clear()
    few_steps.drawn(model, Row("teacher", 2, 7.5, "leading"), model.unet, count=1)
    assert seen == [(2, 501), (2, 1)]
    assert few_steps.judged(made).n == 2


def test_the_teacher_is_judged_as_published_and_the_student_without_guidance() -> None:
    settings = VARIANTS["base"].settings
    assert (TEACHER.steps, TEACHER.cfg, TEACHER.spacing) == (settings.steps, settings.cfg, settings.spacing)
    assert (STUDENT.steps, STUDENT.cfg, STUDENT.spacing) == (8, 1.0, "trailing")
    assert few_steps.config(Path("work")).steps.student == STUDENT.steps
    assert {TEACHER, UNTRAINED, STUDENT} <= set(ROWS)


def test_the_picture_has_a_row_for_each_name(tmp_path: Path) -> None:
    rows = {name: torch.zeros(3, 3, 16, 16) for name in ("one", "two")}
    plots.labelled(rows, ["a red star on a white background", "b", "c"], tmp_path / "seen.png")
    width, height = Image.open(tmp_path / "seen.png").size
    assert (width, height) == (450, 390)
    with pytest.raises(ValueError, match="zip"):
        plots.labelled(rows, ["a"], tmp_path / "none.png")


def test_the_section_shows_what_was_measured() -> None:
    score = evaluate.Score(
        n=108, colour=99.0, background=98.0, shape=97.0, all=96.04, shape_by_name={}, colour_by_name={}
    )
    data = {
        "runs": {},
        "few_steps": {
            "rows": [{**asdict(row), "score": asdict(score)} for row in ROWS],
            "curve": {"100": asdict(score), "20": asdict(score)},
            "config": few_steps.config(Path("work")).model_dump(mode="json", include={"steps", "training"}),
            "computer": {"cpu": "some processor"},
        },
    }
    text = few_steps.few_steps(data)
    assert "| student | 8 | 1 | trailing | 96.0 | 97.0 | 99.0 | 98.0 |" in text.splitlines()
    assert "| training steps | 20 | 100 |" in text.splitlines()
    assert "seed\n0, on one core of some processor" in text
    assert few_steps.few_steps in [section for measured, section in page.SECTIONS if measured(data)]
