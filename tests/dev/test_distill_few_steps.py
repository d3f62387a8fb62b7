"""A step distillation: the steps, what the student is held against, and runs in which a KOALA teaches itself."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from koala_sdxl.distill import config, validation
from koala_sdxl.distill.config import LossTable, StepsTable
from koala_sdxl.distill.errors import UserError
from koala_sdxl.distill.few_steps import StepObjective, grid
from koala_sdxl.distill.teacher import open_teacher
from koala_sdxl.koala.architecture.keys import renaming
from koala_sdxl.koala.architecture.layout import KOALA_TINY
from koala_sdxl.koala.files.conventions import DISTILLATION_KEY, KEPT_TRANSFORMERS_KEY, UNET_PREFIX
from koala_sdxl.koala.files.inspect import inspect_folder, inspect_model
from tests.dev import distill_runs
from tests.dev.distill_runs import SETTINGS, described, process, refused, rows, run, same, saved
from tests.dev.test_distill_processes import LAUNCH, ON_GLOO, SHARDED
from tools.harness import testhost
from tools.measure import reference
from tools.tiny import SHIPPED, pipeline

place = pytest.fixture(scope="module")(distill_runs.place)
no_accelerator_left = pytest.fixture(autouse=True)(distill_runs.no_accelerator_left)

NOISE = DDPMScheduler.from_config(dict(reference.SCHEDULER_CONFIG))
SIGMAS = ((1 - NOISE.alphas_cumprod) / NOISE.alphas_cumprod).sqrt()


# --- the steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 16, 31, 50])
@pytest.mark.parametrize("each", [1, 3])
def test_the_steps_are_those_of_the_trailing_sampler(steps: int, each: int) -> None:
    scheduler = EulerDiscreteScheduler.from_config(dict(reference.SCHEDULER_CONFIG), timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    found = grid(NOISE, steps, each)
    assert torch.equal(found.times[::each], scheduler.timesteps.long())
    torch.testing.assert_close(found.sigmas[::each], scheduler.sigmas)
    assert len(found.sigmas) == len(found.times) + 1 == steps * each + 1
    assert bool((found.times.diff() < 0).all())
    assert float(found.sigmas[-1]) == 0


# --- what the student is held against ----------------------------------------------------------------------------

SPREAD, SCALE = 0.5, 3.0
STEPS = StepsTable(student=8, teacher=125, guidance=SCALE)
"""The teacher takes each of the 1000 time steps: next to nothing is left of its own error."""


class Denoiser(nn.Module):
    """Predicts the noise in pixels that are normally distributed around the mean of the context. Along a sampler's
    curve their distance from that mean is then proportional to sqrt(SPREAD^2 + sigma^2)."""

    dtype = torch.float32

    def __init__(self, steps: int = 0, guidance: float = 1.0) -> None:
        """``steps``: predict the mean noise over one of so many steps, guided, rather than the noise there is."""
        super().__init__()
        self.steps, self.guidance = steps, guidance
        self.seen: list[torch.Tensor] = []

    def forward(
        self,
        scaled: torch.Tensor,
        time: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        added_cond_kwargs: dict[str, torch.Tensor],
    ) -> Any:
        self.seen.append(time)
        assert len(scaled) == len(time) == len(added_cond_kwargs["time_ids"]) == len(added_cond_kwargs["text_embeds"])
        sigma = SIGMAS[time].view(-1, 1, 1, 1)
        away = scaled * (sigma.square() + 1).sqrt() - self.guidance * encoder_hidden_states.mean((1, 2)).view(
            -1, 1, 1, 1
        )
        if not self.steps:
            return SimpleNamespace(sample=sigma * away / (SPREAD**2 + sigma.square()))
        times, sigmas = grid(NOISE, self.steps)
        at = torch.tensor([times.tolist().index(one) for one in time.tolist()])
        end = sigmas[at + 1].view(-1, 1, 1, 1)
        left = ((SPREAD**2 + end.square()) / (SPREAD**2 + sigma.square())).sqrt()
        return SimpleNamespace(sample=(away * left - away) / (end - sigma))


def objective(dropout: float = 0.0) -> StepObjective:
    return StepObjective(LossTable(), dropout, STEPS, NOISE, Denoiser())


def batch(count: int) -> dict[str, torch.Tensor]:
    context = torch.linspace(-1, 1, count).view(count, 1, 1).expand(count, 77, 4)
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * count)
    return {"latents": torch.zeros(count, 4, 8, 8), "context": context, "pooled": torch.zeros(count, 4), "ids": sizes}


def error(network: nn.Module, made: StepObjective, count: int = 16) -> float:
    with torch.no_grad():
        found = made.errors(network, batch(count), torch.Generator().manual_seed(0))
    assert list(found) == ["output"]
    return float(found["output"])


def test_the_exact_steps_of_a_guided_teacher_have_no_error() -> None:
    """Solved by hand; what the teacher itself or another guidance scale would do is far away."""
    exact = error(Denoiser(8, SCALE), objective())
    assert exact < 1e-5
    for other in (Denoiser(), Denoiser(8), Denoiser(8, SCALE + 1)):
        assert error(other, objective()) > 100 * exact


def test_without_a_caption_there_is_nothing_to_guide_to() -> None:
    assert error(Denoiser(8, 1.0), objective(dropout=1.0)) < 1e-5


def test_each_step_begins_where_the_students_own_steps_lead() -> None:
    """Sixteen images, two for each step: after each pass two fewer go on, and the last one is that of the loss."""
    network = Denoiser(8, SCALE)
    error(network, objective())
    assert [len(times) for times in network.seen] == [14, 12, 10, 8, 6, 4, 2, 16]
    starts = grid(NOISE, 8).times
    assert [times.unique().tolist() for times in network.seen[:-1]] == [[one] for one in starts[:-1].tolist()]
    assert network.seen[-1].tolist() == starts.repeat_interleave(2).tolist()
    alone = Denoiser(8, SCALE)
    error(alone, objective(), count=1)
    assert [len(times) for times in alone.seen] == [1] * 8  # as many passes, whatever was drawn


def test_only_the_last_pass_is_learned_from() -> None:
    class Scaled(Denoiser):
        def __init__(self) -> None:
            super().__init__(8, SCALE)
            self.factor = nn.Parameter(torch.tensor(1.01))

        def forward(self, *given: Any, **more: Any) -> Any:
            return SimpleNamespace(sample=super().forward(*given, **more).sample * self.factor)

    network, made = Scaled(), objective()
    found = made.errors(network, batch(16), torch.Generator().manual_seed(0))["output"]
    found.backward()
    assert network.factor.grad is not None
    slope = 2 * float(found.detach()) / 0.01  # found = c (factor - 1)^2
    assert float(network.factor.grad) == pytest.approx(slope, rel=0.02)


def test_held_out_images_are_measured_in_the_step_of_a_noise_level() -> None:
    network, count = Denoiser(8, SCALE), len(validation.LEVELS)
    with torch.no_grad():
        replace(objective(0.5), dropout=0.0).errors(
            network, batch(count), torch.Generator().manual_seed(0), torch.tensor(validation.LEVELS)
        )
    assert network.seen[-1].tolist() == [249, 499, 749, 999]


# --- runs --------------------------------------------------------------------------------------------------------


def tables(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A run in which koala-tiny teaches itself."""
    found = {
        "teacher": {"model": str(SHIPPED), "tokenizer": str(testhost.test_host().tokenizer), "dtype": "fp32"},
        "data": {**SETTINGS["data"], "cache": "cache-of-koala"},
        "steps": {"student": 3, "teacher": 2},
        "training": {**SETTINGS["training"], "steps": 4, "checkpoint_every": 2},
        "validation": {"images": 3, "every": 2},
    }
    return {table: {**found.get(table, {}), **changes.get(table, {})} for table in (*found, *changes)}


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The output folder of an unbroken run."""
    run(place, "few", log={"every": 1, "samples_every": 4, "prompts": ["a red star"]}, **tables())
    return place / "few"


def test_a_koala_teaches_itself(whole: Path) -> None:
    found = rows(whole)
    assert list(found[0]) == ["step", "loss", "output", "learning_rate"]
    assert all(0 < float(row["loss"]) == float(row["output"]) for row in found)
    held_out = [line.split(",") for line in (whole / "validation.csv").read_text().splitlines()[1:]]
    assert [row[0] for row in held_out] == ["2", "4"]
    assert (whole / "samples" / "step-0000004.png").exists()
    unet = load_file(whole / "result" / "few" / "unet" / "diffusion_pytorch_model.safetensors")
    teacher = load_file(SHIPPED)
    names = renaming(KOALA_TINY, "diffusers", "comfy")
    moved = [float((unet[name] - teacher[UNET_PREFIX + names[name]].half()).abs().max()) for name in unet]
    assert 0 < max(moved) < 0.1


def test_the_result_says_how_it_is_sampled(whole: Path) -> None:
    file = saved(whole)
    for found in (inspect_model(file), inspect_folder(whole / "result" / "few").model):
        assert found.identity.variant.name == "lightning"
        assert str(found.identity.variant.settings) == "3 steps, cfg 1, trailing"
        assert found.scheduler["timestep_spacing"] == "trailing"
    with safe_open(file, framework="pt") as mine, safe_open(SHIPPED, framework="pt") as teachers:
        said, before = mine.metadata(), teachers.metadata()
    assert json.loads(said[KEPT_TRANSFORMERS_KEY]) == json.loads(before[KEPT_TRANSFORMERS_KEY])
    made = json.loads(said[DISTILLATION_KEY])
    assert made["few_steps"] == {"student": 3, "teacher": 2, "guidance": 7.5}
    assert (made["teacher"], made["layout"], "loss" in made) == (SHIPPED.name, "koala-tiny", False)


def test_the_card_says_how_it_was_made_and_is_used(whole: Path) -> None:
    card = (whole / "result" / "few" / "README.md").read_text("utf-8")
    assert "num_inference_steps=3, guidance_scale=1)" in card
    assert "| distilled | 3 steps, 2 of the teacher's for each, guidance scale 7.5 |" in card
    assert "| loss |" not in card


def test_diffusers_samples_it_as_it_was_trained(whole: Path) -> None:
    made = StableDiffusionXLPipeline.from_pretrained(whole / "result" / "few", torch_dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    assert pipeline.pictures(made, ["a red circle"], size=64, steps=3, cfg=1.0).isfinite().all()
    assert made.scheduler.timesteps.tolist() == grid(NOISE, 3).times.tolist()


def test_a_stopped_run_goes_on_as_if_nothing_had_been(place: Path, whole: Path) -> None:
    folder = place / "few-resumed"
    shutil.copytree(whole / "checkpoints" / "step-0000002", folder / "checkpoints" / "step-0000002")
    for file in ("config.json", "metrics.csv"):
        shutil.copy(whole / file, folder / file)
    assert "resuming from step 2" in run(place, "few-resumed", log={"every": 1}, **tables())
    assert rows(folder) == rows(whole)
    assert same(saved(folder), saved(whole))


def test_the_steps_of_a_begun_run_stay(place: Path, whole: Path) -> None:
    folder = place / "few-changed"
    folder.mkdir()
    shutil.copy(whole / "config.json", folder / "config.json")
    said = refused(place, "few-changed", **tables(steps={"student": 4}))
    assert said.startswith(f"{folder} holds a run with steps.student = 3; now it is 4. ")


def test_an_sdxl_teaches_an_earlier_student(place: Path) -> None:
    """The teacher is all of SDXL, the student begins as a KOALA's file."""
    changed = tables(student={"start": str(SHIPPED)}, training={"steps": 1}, validation={"images": 0})
    run(place, "few-of-sdxl", **{**changed, "teacher": SETTINGS["teacher"], "data": SETTINGS["data"]})
    assert inspect_model(saved(place / "few-of-sdxl")).identity.variant.name == "lightning"


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.usefixtures("several_processes")
def test_a_student_that_is_sharded_takes_its_steps(place: Path, whole: Path) -> None:
    """Two processes whose images are in different steps: neither waits for the other for ever."""
    (place / "few_on_gloo.py").write_text(ON_GLOO)
    path = described(place, "few-sharded", tables(training={"batch": 1}))
    environment = SHARDED | {"PYTHONPATH": str(distill_runs.ROOT)}
    running = process(*LAUNCH, "2", str(place / "few_on_gloo.py"), str(path), env=environment)
    _, complained = running.communicate()
    assert running.returncode == 0, complained[-5000:]
    assert [row["step"] for row in rows(place / "few-sharded")] == ["1", "2", "3", "4"]


# --- what is refused ---------------------------------------------------------------------------------------------


def test_another_layout_than_the_koala_teachers_is_refused(place: Path) -> None:
    said = refused(place, "few-odd", **tables(student={"layout": "koala-1b"}))
    assert said.startswith("student.layout: the ")
    assert "cannot be cut out of the teacher: the teacher is a koala-tiny, and only SDXL can be cut" in said


@pytest.mark.parametrize(
    ("table", "lines", "key"),
    [("loss", "task = 0.0", "loss.task = 0.0"), ("log", "sample_cfg = 1.0", "log.sample_cfg = 1.0")],
)
def test_what_would_have_no_effect_is_refused(tmp_path: Path, table: str, lines: str, key: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'output = "out"\n[teacher]\nmodel = "koala"\n[data]\npath = "pictures"\ncache = "cache"\n'
        f"[steps]\nstudent = 8\n[training]\nsteps = 3\n[{table}]\n{lines}\n"
    )
    with pytest.raises(UserError) as problem:
        config.read(path)
    assert str(problem.value) == (
        f"{path}: {key} has no effect where steps.student is set; expected no such key. Remove it, or steps.student."
    )
    path.write_text(path.read_text().replace("student = 8", "student = 0"))
    config.read(path)


def test_sdxls_loras_are_not_merged_into_a_koala(tmp_path: Path) -> None:
    (tmp_path / "lora.safetensors").touch()
    table = config.TeacherTable(model=SHIPPED, loras=(tmp_path / "lora.safetensors",))
    with pytest.raises(UserError, match=r"^teacher\.loras: .* is a koala-tiny, whose layers SDXL's LoRAs do not name"):
        open_teacher(table, compact=True)


def test_a_teachers_blocks_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with safe_open(SHIPPED, framework="pt") as file:
        metadata = file.metadata() | {KEPT_TRANSFORMERS_KEY: json.dumps({"mid_block.attentions.0": [0]})}
    save_file(load_file(SHIPPED), tmp_path / "odd.safetensors", metadata)
    table = config.TeacherTable(model=tmp_path / "odd.safetensors", tokenizer=testhost.test_host().tokenizer)
    with pytest.raises(UserError, match=r"^teacher\.model: odd\.safetensors: the metadata koala\.transformers"):
        _ = open_teacher(table, compact=True).kept_transformers
