"""Where memory does not suffice: one line that says so, and a smaller batch that goes on to the same LoRA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from koala_sdxl.distill.carry import refit as training
from koala_sdxl.distill.carry import run, source
from koala_sdxl.distill.carry.job import Job
from koala_sdxl.distill.carry.memory import enough_memory
from koala_sdxl.distill.carry.samples import Samples
from koala_sdxl.distill.carry.settings import PER_STEP, digest, origin
from koala_sdxl.distill.carry.student import Student
from koala_sdxl.distill.errors import UserError
from tests.dev import carry_runs
from tests.dev.carry_runs import Line, carried, settings, texts

place = pytest.fixture(scope="module")(carry_runs.place)
ROUNDING = 1e-4
"""Largest relative difference of sums of a few thousand products in another order, fp32."""


def test_too_large_an_image_is_one_line(place: Path) -> None:
    """The CPU's allocator itself refuses: no computer has as much."""
    with pytest.raises(UserError) as problem:
        carried(place, "huge", size=8 * 10**7)
    (line,) = str(problem.value).splitlines()
    assert line.startswith("out of memory while the KOALA samples the prompts, with the LoRA by lineage, at --batch 16")
    assert "--size 80000000 (" in line
    assert "tried to allocate" in line
    assert (
        "Give a smaller --batch, with which the run goes on, and ends with the same LoRA; or a smaller --size" in line
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_every_allocators_error_is_told(place: Path, error: Exception) -> None:
    with pytest.raises(UserError) as problem, enough_memory("SDXL draws", settings(place, "x", batch=1)):
        raise error
    (line,) = str(problem.value).splitlines()
    said = str(error).partition("\n")[0] or "MemoryError"
    assert line.startswith(f"out of memory while SDXL draws, at --batch 1 and --size 64 ({said}); expected")
    assert line.endswith("one batch. Give a smaller --size, and another --out.")


def test_other_errors_stay_as_they_are(place: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), enough_memory("SDXL draws", settings(place, "x")):
        raise RuntimeError("shapes")


def test_a_batch_changes_outputs_and_slopes_by_rounding_alone(place: Path) -> None:
    given = settings(place, "x")
    opened = source.open_source(given)
    unet, given = source.student_unet(opened), replace(given, rank=4)
    learner = opened.change.learner(unet, opened.student, given)
    start, student = learner.start, Student(unet, learner, texts(1), opened.teacher.noise, given)
    generator = torch.Generator().manual_seed(0)
    noisy, time = torch.randn(7, 4, 8, 8, generator=generator), torch.arange(7) * 100
    samples = Samples(noisy, time, torch.zeros(7).long(), torch.zeros(7).bool(), torch.zeros(7).long())
    found = []
    for batch in (7, 3):
        student.given = replace(given, batch=batch)
        slopes = student.slopes(start, samples, lambda found, part: found - noisy[part])
        found.append((student.outputs(start, samples), torch.cat([slope.flatten() for slope in slopes.values()])))
    for whole, parts in zip(*found, strict=True):
        assert (whole - parts).norm() < ROUNDING * whole.norm()


def test_a_step_of_refit_has_as_many_samples_whatever_the_batch(place: Path, tmp_path: Path) -> None:
    noisy = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    samples, start = Samples(noisy, *[torch.zeros(40)] * 4), {"layer": torch.ones(5, 6)}
    found, counts = [], set()
    for batch in (2, 16):
        student, given = Line(), settings(place, "x", steps=3, batch=batch)
        path = tmp_path / f"{batch}.pt"
        trained = training.refit(student, start, samples, noisy[:, :5], 1.0, given, path)  # type: ignore[arg-type]
        found.append(trained["layer"])
        counts |= set(student.counts)
    assert torch.equal(*found)
    assert counts == {PER_STEP}


def test_a_run_is_the_same_at_any_batch(place: Path) -> None:
    files = {key: [place / "prompts.txt"] for key in ("lora", "teacher", "student")}
    one, other = (origin(settings(place, "x", batch=batch), files, digest) for batch in (2, 16))
    assert one == other != origin(settings(place, "x", steps=31), files, digest)


@pytest.mark.nightly
def test_an_unfinished_run_goes_on_with_a_smaller_batch(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ROUNDS", 1)
    short = {"samples": 8, "steps": 5}
    carried(place, "unbroken", **short)
    with monkeypatch.context() as patch:
        patch.setattr(Job, "refit", lambda *_: torch.empty(10**15))
        with pytest.raises(UserError, match="out of memory while further training, at --batch 16"):
            carried(place, "broken", **short)
    carried(place, "broken", **short, batch=3)
    whole, parts = (load_file(place / f"{name}.safetensors") for name in ("unbroken", "broken"))
    assert whole.keys() == parts.keys()
    first, other = (torch.cat([tensor.float().flatten() for tensor in one.values()]) for one in (whole, parts))
    assert (first - other).norm() < 1e-3 * first.norm()
