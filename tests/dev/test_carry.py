"""`dev.py carry`: an SDXL LoRA becomes a KOALA's, by least squares and further training; and what ends a run early."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from koala_sdxl.distill.carry import refit as training
from koala_sdxl.distill.carry import run, source
from koala_sdxl.distill.carry.fine_tune import FineTune
from koala_sdxl.distill.carry.samples import Samples, chosen, drawn, wanted
from koala_sdxl.distill.carry.settings import CHECKPOINT_EVERY, digest
from koala_sdxl.distill.errors import UserError
from koala_sdxl.koala.architecture.layout import KOALA_TINY, SDXL
from koala_sdxl.koala.files.conventions import CARRY_KEY
from koala_sdxl.koala.files.header import CheckpointError
from koala_sdxl.koala.lora.factors import DOWN, UP, factors
from koala_sdxl.koala.lora.plan import inspect_lora
from tests.dev import carry_runs
from tests.dev.carry_runs import FEW, Line, carried, settings
from tests.dev.distill_runs import ENVIRONMENT
from tools.harness.testhost import ROOT
from tools.synthetic import adapters
from tools.tiny.grow import SDXL_TINY

place = pytest.fixture(scope="module")(carry_runs.place)
Told = list[str]


@pytest.fixture(scope="module")
def told(place: Path) -> Told:
    """What a whole run says, with fewer rounds of least squares; its file is ``whole.safetensors``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "ROUNDS", 2)
        return carried(place, "whole")


def shares(line: str) -> dict[str, float]:
    return {way: float(share) for way, share in re.findall(r"(lineage|fit|refit) (-?[\d.]+) %", line)}


def test_each_way_reaches_more_of_the_wanted_change_than_the_one_before(told: Told) -> None:
    (line,) = [line for line in told if line.startswith("share of the wanted change")]
    found = shares(line)
    assert list(found) == ["lineage", "fit", "refit"]
    assert found["lineage"] < found["fit"] < found["refit"] < 100


def test_the_report_tells_places_seconds_and_memory(told: Told) -> None:
    said = "\n".join(told)
    assert "U-Net on koala-tiny: 222 applied, 500 removed with KOALA's missing layers" in said
    assert "text encoders: 24 of 24 applied" in said
    assert re.search(r"seconds: texts \d+, student \d+, teacher \d+, fit \d+, refit \d+", said)
    assert re.search(r"memory: at most \d+\.\d GB", said)
    assert re.search(r"^SDXL's output changes by [\d.]+ % \(root mean square\)$", said, re.MULTILINE)


def test_the_file_is_koalas_and_says_what_it_came_from(place: Path, told: Told) -> None:
    path = place / "whole.safetensors"
    plan = inspect_lora(path, KOALA_TINY)
    assert plan.origin
    assert plan.origin.layout == KOALA_TINY
    assert (plan.count("applied"), len(plan.modules)) == (222, 222)
    assert sum(module.outcome == "applied" for module in plan.text) == 24
    tensors = load_file(path)
    assert {tensor.dtype for name, tensor in tensors.items() if name.startswith("lora_unet_")} == {torch.float16}
    assert {len(tensor) for name, tensor in tensors.items() if name.startswith("lora_unet_") and "down" in name} == {8}
    own = load_file(place / "lora.safetensors")
    same = "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"
    torch.testing.assert_close(tensors[same], own[same], rtol=0, atol=0)
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()[CARRY_KEY])
    for key, file in (("lora", "lora.safetensors"), ("prompts", "prompts.txt"), ("student", "koala-tiny.safetensors")):
        assert said[key] == {"name": file, "sha256": digest(place / file)}
    assert said["teacher"]["name"] == "sdxl-tiny"
    assert said["settings"]["steps"] == FEW["steps"]
    assert said["shares"]["fit"] < said["shares"]["refit"]
    assert not (place / "whole.carry").exists()


def test_a_file_that_is_there_stays(place: Path, told: Told) -> None:
    before = digest(place / "whole.safetensors")
    with pytest.raises(UserError, match=r"--out: .*whole.safetensors is there already, and was left as it is"):
        carried(place, "whole")
    assert digest(place / "whole.safetensors") == before


def test_a_check_tells_the_plan_and_leaves_nothing(place: Path) -> None:
    before = sorted(place.iterdir())
    said = "\n".join(carried(place, "checked", check=True))
    assert sorted(place.iterdir()) == before
    assert re.search(r"new LoRA: rank 8, 0\.\d million numbers", said)
    assert re.search(r"SDXL, in fp32, on (cpu|cuda): \d+ forward passes of one image at 64 px; 0.\d\d GB", said)
    assert re.search(r"koala-tiny, in fp32: at most \d+ such passes", said)


def test_an_interrupted_refit_ends_with_the_same_numbers(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = torch.Generator().manual_seed(0)
    noisy, right = torch.randn(40, 6, generator=random), torch.randn(5, 6, generator=random)
    given = settings(place, "unused", steps=2 * CHECKPOINT_EVERY)
    start, samples = {"layer": right + 0.3}, Samples(noisy, *[torch.zeros(40)] * 4)
    wanted = noisy @ right.T

    def trained(name: str) -> torch.Tensor:
        found = training.refit(Line(), start, samples, wanted, 1.0, given, tmp_path / name)  # type: ignore[arg-type]
        return found["layer"]

    unbroken = trained("unbroken.pt")
    assert (unbroken - right).norm() < 0.5 * (start["layer"] - right).norm()
    saved = training._save

    def save_and_die(path: Path, step: int, *state: object) -> None:
        saved(path, step, *state)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "_save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            trained("broken.pt")
    assert torch.load(tmp_path / "broken.pt")["step"] == CHECKPOINT_EVERY
    assert torch.equal(trained("broken.pt"), unbroken)


@pytest.fixture(scope="module")
def tuned(place: Path) -> Path:
    """A fine-tune of the teacher."""
    return carry_runs.fine_tuned(place, place / "tuned")


def test_a_fine_tune_begins_with_its_differences_from_sdxl(place: Path, tuned: Path) -> None:
    given = settings(place, "x", lora=tuned)
    opened = source.open_source(given)
    assert isinstance(opened.change, FineTune)
    added = {name: change for name, change in opened.change.of_student(opened.student.tensor) if change.any()}
    line = {part.diffusers: whole.diffusers for part, whole in opened.lineage.tensors}
    files = [next((folder / "unet").glob("*.safetensors")) for folder in (tuned, place / "sdxl-tiny")]
    after, before = (load_file(file) for file in files)
    wanted_ = {part: after[whole].float() - before[whole].float() for part, whole in line.items()}
    assert added.keys() == {name for name, change in wanted_.items() if change.any()}
    assert all(torch.equal(change, wanted_[name]) for name, change in added.items())
    assert "584 tensors" in opened.change.report()
    pipeline = opened.teacher.pipeline()
    text, _ = opened.change.texts(pipeline)
    new = opened.change.tuned.pipeline()
    for name, weight in pipeline.text_encoder.state_dict().items():
        assert torch.equal(weight, new.text_encoder.state_dict()[name])
    modules = {name.partition(".")[0] for name in text}
    assert modules == {f"lora_te{te}_text_model_encoder_layers_{layer}_mlp_fc1" for te in (1, 2) for layer in range(3)}


@pytest.mark.nightly
def test_a_fine_tune_is_carried_over(place: Path, tuned: Path) -> None:
    told = carried(place, "style", lora=tuned, method="fit", rank=32)
    found = shares("\n".join(told))
    assert found["lineage"] < found["fit"]
    plan = inspect_lora(place / "style.safetensors", KOALA_TINY)
    assert plan.origin
    assert plan.origin.layout == KOALA_TINY
    assert {module.outcome for module in (*plan.modules, *plan.text)} == {"applied"}


def test_a_fine_tune_is_another_file_than_sdxl(place: Path) -> None:
    with pytest.raises(UserError, match=r"sdxl-tiny is --teacher itself; expected a fine-tune"):
        source.open_source(settings(place, "x", lora=place / "sdxl-tiny"))


@pytest.mark.nightly
def test_a_killed_run_ends_with_the_same_file(place: Path) -> None:
    """Killed with one checkpoint behind it; the second process goes on there."""
    given = {"teacher": "sdxl-tiny", "student": "koala-tiny.safetensors", "prompts": "prompts.txt"}

    def command(name: str) -> list[str]:
        files = {key: place / file for key, file in {**given, "out": name}.items()}
        words = [f"--{key}={value}" for key, value in {**files, **FEW}.items()]
        return [sys.executable, "-m", "tools.run", "koala_sdxl.distill.carry", str(place / "lora.safetensors"), *words]

    work = place / "killed.carry"
    with subprocess.Popen(command("killed.safetensors"), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL) as first:
        while first.poll() is None and not (work / "checkpoint.pt").exists():
            time.sleep(0.05)
        first.kill()
    assert not (place / "killed.safetensors").exists()
    for name in ("killed.safetensors", "unbroken.safetensors"):
        subprocess.run(command(name), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=True)
    assert not work.exists()
    resumed, unbroken = (load_file(place / f"{name}.safetensors") for name in ("killed", "unbroken"))
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def test_another_runs_work_is_not_taken(place: Path) -> None:
    work = settings(place, "other").work
    work.mkdir()
    (work / "run.json").write_text(json.dumps({"lora": "another"}))
    with pytest.raises(UserError, match=r"other.carry holds an unfinished run with other prompts, lora, teacher"):
        carried(place, "other")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora": "nowhere.safetensors"}, r"nowhere.safetensors does not exist; expected an SDXL LoRA"),
        ({"lora": "koala-tiny.safetensors"}, r"koala-tiny.safetensors is a koala-tiny; expected all of SDXL's layers"),
        ({"lora": "koalas.safetensors"}, r"koalas.safetensors was trained on koala-tiny itself .* Use it as it is"),
        ({"lora": "texts.safetensors"}, r"texts.safetensors changes text encoders alone"),
        ({"teacher": "nowhere"}, r"--teacher: .*nowhere does not exist"),
        ({"teacher": "koala-tiny.safetensors"}, r"--teacher: .*is a koala-tiny; expected all of SDXL's layers"),
        ({"student": "nowhere"}, r"--student: .*nowhere does not exist; expected a KOALA"),
        ({"student": "sdxl-tiny"}, r"--student: .* expected a KOALA, which has fewer layers"),
        ({"student": "wide.safetensors"}, r"--student: .*wide.safetensors is .*, of other widths than the teacher"),
        ({"prompts": "nowhere.txt"}, r"--prompts: .*nowhere.txt cannot be read \(No such file"),
        ({"keep": "few.txt"}, r"--keep: .*few.txt has 1 prompts; expected at least 4"),
    ],
    ids=lambda value: " ".join(value.values()) if isinstance(value, dict) else "",
)
def test_what_cannot_be_used_is_named_in_one_line(place: Path, changes: dict[str, str], says: str) -> None:
    save_file(adapters.lora(KOALA_TINY, only=adapters.in_attention), place / "koalas.safetensors")
    save_file(adapters.text_lora(2, 32, 128, "lora_te1"), place / "texts.safetensors")
    save_file(adapters.unet(replace(KOALA_TINY, context=64)), place / "wide.safetensors")
    (place / "few.txt").write_text("one\n")
    with pytest.raises((UserError, CheckpointError), match=says) as problem:
        carried(place, "none", **{key: place / name for key, name in changes.items()})
    assert len(str(problem.value).splitlines()) == 1
    assert not (place / "none.safetensors").exists()
    assert not (place / "none.carry").exists()


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_sdxl_is_as_its_file_says_once_the_lora_is_gone(place: Path, dtype: str) -> None:
    """In the file's own type, its weights are the file itself, mapped into memory."""
    opened = source.open_source(settings(place, "x", dtype=dtype))
    unet = opened.teacher.unet()
    name = "mid_block.attentions.0.proj_in.weight"
    before = unet.get_parameter(name).clone()
    with opened.change.on_teacher(unet, opened.teacher.file):
        assert (unet.get_parameter(name) - before).abs().max() > 1e-3
    assert torch.equal(unet.get_parameter(name), before)
    assert all(
        torch.equal(parameter, opened.teacher.file.tensor(key).to(parameter.dtype))
        for key, parameter in unet.named_parameters()
    )


def test_held_out_prompts_are_learned_from_by_neither_network(place: Path) -> None:
    learned, measured = drawn(settings(place, "x", samples=1024), prompts=9, keep=5)
    assert not set(learned) & set(measured)
    assert set(learned) | set(measured) == set(range(14))
    assert set(measured) == {3, 7, 12}
    assert 2 / 5 < sum(row >= 9 for row in learned) / len(learned) < 3 / 5


@pytest.mark.parametrize(("prompts", "keep"), [(20, 8), (4, 4), (12, 0), (28, 4)])
def test_every_prompt_is_used_where_there_are_turns_for_all(place: Path, prompts: int, keep: int) -> None:
    learned, measured = drawn(settings(place, "x", samples=1120), prompts, keep)
    left_out = set(range(prompts + keep)) - set(learned) - set(measured)
    assert len(left_out) == max(0, prompts // 4 - (6 if keep else 12))


def test_of_too_many_prompts_some_are_used_from_all_over_the_file(place: Path) -> None:
    learned, measured = drawn(settings(place, "x", samples=1024), prompts=100, keep=0)
    assert (len(set(learned)), len(set(measured))) == (43, 11)
    assert (min(learned), max(learned) > 90, max(measured) > 80) == (0, True, True)


def test_the_empty_prompt_changes_as_sdxls_wherever_a_prompt_leads() -> None:
    numbers = torch.arange(200)
    seen = Samples(torch.zeros(200, 4, 2, 2), numbers, numbers % 2, numbers % 2 == 1, 0 * numbers)
    some = chosen(seen, 200, 2, torch.Generator().manual_seed(0))
    without = some.text == 2
    assert 20 < without.sum() < 60
    assert (some.time[without] % 2 == 1).any()
    assert (some.kept == ((some.time % 2 == 1) & ~without)).all()


def test_prompts_to_keep_ask_for_no_change() -> None:
    own, change = torch.randn(5, 4, 2, 2), torch.randn(5, 4, 2, 2)
    asked = wanted(own, change, torch.tensor([False, False, True, True, False])) - own
    for sample, is_kept in enumerate([False, False, True, True, False]):
        torch.testing.assert_close(asked[sample], torch.zeros(4, 2, 2) if is_kept else change[sample])


def test_factors_give_a_change_and_have_room_for_more() -> None:
    change = torch.randn(6, 2) @ torch.randn(2, 4 * 9)
    found = factors([("conv.weight", change.reshape(6, 4, 3, 3)), ("norm.weight", torch.ones(6))], 4)
    up, down = found["conv.weight" + UP], found["conv.weight" + DOWN]
    assert (up.shape, down.shape) == ((6, 4), (4, 36))
    torch.testing.assert_close(up @ down, change)
    assert (up[:, 2:] == 0).all()
    assert (down.norm(dim=1) > 0.1).all()
    assert found["norm.weight"].equal(torch.ones(6))
    assert SDXL_TINY.channels == KOALA_TINY.channels != SDXL.channels
