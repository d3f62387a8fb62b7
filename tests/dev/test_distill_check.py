"""What ``--check`` shows of a distillation, and that it writes nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from koala_sdxl.distill import __main__ as command
from koala_sdxl.distill import check, config, train
from koala_sdxl.distill.errors import UserError
from koala_sdxl.koala.architecture.keys import parameters
from koala_sdxl.koala.architecture.layout import KOALA_TINY
from tests.dev import distill_runs
from tests.dev.distill_runs import SETTINGS, described, run
from tools.tiny.grow import SDXL_TINY

place = pytest.fixture(scope="module")(distill_runs.place)
no_accelerator_left = pytest.fixture(autouse=True)(distill_runs.no_accelerator_left)

WEIGHTS = parameters(KOALA_TINY)
MEMORY = re.compile(r"^  (\S.*?) {2,}(\d+\.\d+)(?:   of (\d+\.\d))?$")


def checked(place: Path, name: str, **tables: dict[str, Any]) -> list[str]:
    """What is said, of which nothing is left."""
    path = described(place, name, tables)
    before, said = sorted(place.rglob("*")), list[str]()
    check.report(config.read(path), said.append)
    assert sorted(place.rglob("*")) == before
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return said


def memory(said: list[str]) -> dict[str, float]:
    """The parts, in GB."""
    return {match[1]: float(match[2]) for line in said if (match := MEMORY.match(line))}


def test_plan_memory_and_time_are_shown_and_nothing_is_written(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = {"training": {**SETTINGS["training"], "steps": 30, "accumulate": 3}, "validation": {"images": 4}}
    path = described(place, "checked", tables)
    before = sorted(place.rglob("*"))
    assert command.main([str(path), "--check"]) == 0
    assert sorted(place.rglob("*")) == before
    said = capsys.readouterr().out.splitlines()
    assert said[:7] == [
        "plan",
        f"  teacher      sdxl-tiny, {parameters(SDXL_TINY) / 1e6:.1f} M weights, fp32",
        f"  student      koala-tiny, {WEIGHTS / 1e6:.1f} M weights",
        f"  data         12 images, not all cached yet in {place / 'cache'}; 4 of them held out",
        "  batch        2 images x 3 forward passes x 1 processes = 6 images a step",
        "  steps        30: 180 images, 22.5 epochs",
        f"  output       {place / 'checked'}, a new run",
    ]
    found = memory(said)
    for part, each in (("weights", 4), ("gradients", 4), ("optimiser, adamw", 8), ("average (EMA)", 4)):
        assert found[part] == pytest.approx(each * WEIGHTS / 1e9, abs=6e-4)
    assert found["teacher"] == pytest.approx(4 * parameters(SDXL_TINY) / 1e9, abs=6e-4)
    assert found["activations, batch 2"] > 0
    assert found["sum"] == pytest.approx(sum(found.values()) - found["sum"], abs=4e-3)
    (time,) = (line for line in said if line.startswith("one step: "))
    seconds, rate, days = map(float, re.findall(r"([\d.]\S*) (?:s,|images/s|days)", time))
    assert rate == pytest.approx(6 / seconds, rel=0.02)
    assert days == pytest.approx(30 * seconds / 86400, rel=0.02)


@pytest.mark.nightly
def test_the_memory_follows_the_settings(place: Path) -> None:
    plain = memory(checked(place, "settings"))
    saving = {"gradient_checkpointing": True, "ema_on_cpu": True, "batch": 4}
    said = checked(
        place, "saving", training={**SETTINGS["training"], **saving}, teacher={**SETTINGS["teacher"], "dtype": "fp8"}
    )
    found = memory(said)
    assert found["teacher"] == pytest.approx(plain["teacher"] / 4, abs=1e-3)
    assert found["average (EMA)"] == 0
    assert found["average (EMA), on the CPU"] == plain["average (EMA)"]
    assert found["activations, batch 4"] < plain["activations, batch 2"]
    double = memory(checked(place, "double", training={**SETTINGS["training"], "batch": 4}))
    assert double["activations, batch 4"] == pytest.approx(2 * plain["activations, batch 2"], rel=0.1)


def test_a_run_that_is_resumed_and_a_cache_are_known(place: Path) -> None:
    run(place, "begun")
    said = checked(place, "begun")
    assert f"  data         12 images, all cached in {place / 'cache'}; 0 of them held out" in said
    assert f"  output       {place / 'begun'}, resumed from step-0000002" in said
    with pytest.raises(UserError, match=r"holds a run with student\.layout = "):
        checked(place, "begun", student={"layout": "koala-1b"})


def test_what_would_be_refused_is_refused(place: Path) -> None:
    with pytest.raises(UserError, match=r"^teacher\.model: "):
        checked(place, "no-teacher", teacher={"model": "nowhere"})


def test_the_trial_step_is_that_of_the_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a made-up batch: the student moves, as it does in training."""
    moved: list[float] = []
    build = train.build

    def built(*given: Any) -> Any:
        network, objective = build(*given)
        first = network.conv_in.weight.detach().clone()
        network.register_forward_pre_hook(
            lambda *_: moved.append(float((network.conv_in.weight.detach() - first).abs().max()))
        )
        return network, objective

    monkeypatch.setattr(train, "build", built)
    checked(place, "moves")
    assert moved[0] == 0
    assert moved[-1] == pytest.approx(SETTINGS["training"]["learning_rate"], rel=0.05)  # AdamW's first step
    assert torch.is_grad_enabled()
