"""What may teach in a distillation: a folder or a file, with LoRAs merged into it; and what may not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from koala_sdxl.distill import config
from koala_sdxl.distill.teacher import open_teacher
from koala_sdxl.koala.architecture.keys import renaming, tensors
from koala_sdxl.koala.files.conventions import UNET_PREFIX
from tests.daily import daily
from tests.dev import distill_runs
from tests.dev.distill_runs import SETTINGS, refused, rows, run, saved
from tools.harness import testhost
from tools.synthetic import adapters
from tools.synthetic.adapters import RANK
from tools.tiny import SHIPPED
from tools.tiny.grow import SDXL_TINY

place = pytest.fixture(scope="module")(distill_runs.place)
no_accelerator_left = pytest.fixture(autouse=True)(distill_runs.no_accelerator_left)


def test_a_single_file_teaches_what_its_folder_teaches(place: Path) -> None:
    unet = load_file(place / "sdxl-tiny" / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    names = renaming(SDXL_TINY, "diffusers", "comfy")
    beside = {name: tensor for name, tensor in load_file(SHIPPED).items() if not name.startswith(UNET_PREFIX)}
    save_file(beside | {UNET_PREFIX + names[name]: tensor for name, tensor in unet.items()}, place / "sdxl.safetensors")
    one = {**SETTINGS["training"], "steps": 1}
    run(place, "of-folder", training=one)
    data = {**SETTINGS["data"], "cache": "cache-of-file"}
    tokenizer = str(testhost.test_host().tokenizer)
    run(place, "of-file", teacher={"model": "sdxl.safetensors", "tokenizer": tokenizer}, data=data, training=one)
    pairs = zip(rows(place / "of-folder"), rows(place / "of-file"), strict=True)
    for one_row, other in pairs:
        assert {key: float(value) for key, value in one_row.items()} == pytest.approx(
            {key: float(value) for key, value in other.items()}, rel=1e-3
        )
    first, second = load_file(saved(place / "of-folder")), load_file(saved(place / "of-file"))
    torch.testing.assert_close(first, second, rtol=0, atol=5e-3)


def refused_teacher(place: Path, model: Path | str) -> str:
    return refused(
        place, "untaught", teacher={"model": str(model)}, data={**SETTINGS["data"], "cache": "cache-of-none"}
    )


TEXT_LAYER = "text_model.encoder.layers.1.mlp.fc1"


@pytest.mark.parametrize(
    "naming", daily(["kohya, diffusers blocks", "kohya, LDM blocks", "diffusers, PEFT"], ["kohya, LDM blocks"])
)
def test_loras_are_merged_into_the_teacher(place: Path, tmp_path: Path, naming: str) -> None:
    """Two LoRAs, one after the other, as up x down x alpha / rank on top of each weight."""
    only = ("down_blocks.2.attentions.1.transformer_blocks.9.", "up_blocks.0.attentions.2.proj_in.")
    style, paths, alone = adapters.NAMINGS[naming], [], config.TeacherTable(model=place / "sdxl-tiny", dtype="fp32")
    wanted = open_teacher(alone).unet().state_dict()
    for seed in (1, 2):
        changed = adapters.lora(
            SDXL_TINY,
            "LoRA",
            naming,
            seed,
            lambda tensor: adapters.in_attention(tensor) and tensor.diffusers.startswith(only),
        )
        if "kohya" not in naming:  # it has no alpha: the factor is 1
            changed = {name: value for name, value in changed.items() if not name.endswith(".alpha")}
        for tensor in tensors(SDXL_TINY):
            up, down = (
                style.module(tensor) + style.suffixes.get(end, end) for end in (".lora_up.weight", ".lora_down.weight")
            )
            if tensor.diffusers.endswith(".weight") and up in changed:
                factor = float(changed.get(f"{style.module(tensor)}.alpha", RANK)) / RANK
                wanted[tensor.diffusers] = wanted[tensor.diffusers] + factor * changed[up] @ changed[down]
        paths.append(tmp_path / f"{seed}.safetensors")
        save_file({name: value.contiguous() for name, value in changed.items()}, paths[-1])
    found = open_teacher(alone.model_copy(update={"loras": tuple(paths)})).unet().state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in found)


def test_a_loras_text_part_is_merged_too(place: Path, tmp_path: Path) -> None:
    down, up = torch.full((2, 32), 0.1), torch.full((128, 2), 0.5)
    name = f"lora_te1_{TEXT_LAYER.replace('.', '_')}"
    parts = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    whole = adapters.lora(SDXL_TINY, "LoRA", "kohya, diffusers blocks", only=adapters.in_attention)
    save_file({**whole, **parts}, tmp_path / "text.safetensors")
    table = config.TeacherTable(model=place / "sdxl-tiny", dtype="fp32")
    plain, changed = (
        open_teacher(table.model_copy(update={"loras": loras})) for loras in ((), (tmp_path / "text.safetensors",))
    )
    before, after = (teacher.pipeline().text_encoder.state_dict() for teacher in (plain, changed))
    assert before.keys() == after.keys()
    odd = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(odd) == 1
    assert odd[0].endswith("encoder.layers.1.mlp.fc1.weight")
    assert torch.allclose(after[odd[0]] - before[odd[0]], up @ down, atol=1e-6)
    assert changed.identity != plain.identity  # so that other texts are not taken from the cache


@pytest.mark.parametrize("part", daily(["text_encoder", "text_encoder_2", "vae"], ["text_encoder", "vae"]))
def test_a_fine_tune_of_the_same_size_is_another_teacher(place: Path, tmp_path: Path, part: str) -> None:
    """Same names, size and time; one weight differs. A copy is the same teacher."""
    shutil.copytree(place / "sdxl-tiny", tmp_path / "sdxl-tiny")
    path = next((tmp_path / "sdxl-tiny" / part).glob("*.safetensors"))
    before = open_teacher(config.TeacherTable(model=place / "sdxl-tiny")).identity
    assert open_teacher(config.TeacherTable(model=tmp_path / "sdxl-tiny")).identity == before
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = open_teacher(config.TeacherTable(model=tmp_path / "sdxl-tiny")).identity
    assert [name for name in before if before[name] != after[name]] == ["VAE" if part == "vae" else "text encoders"]


def test_what_is_no_lora_is_named(place: Path, tmp_path: Path) -> None:
    save_file(adapters.lora(SDXL_TINY, "LoHa", only=adapters.in_attention), tmp_path / "loha.safetensors")
    for path, why in (
        (tmp_path / "nowhere.safetensors", "does not exist; expected a .safetensors file"),
        (tmp_path / "loha.safetensors", "cannot be merged"),
        (place / "sdxl-tiny" / "unet" / "diffusion_pytorch_model.fp16.safetensors", "cannot be merged"),
    ):
        teacher = {"model": "sdxl-tiny", "dtype": "fp32", "loras": [str(path)]}
        said = refused(place, "with-lora", teacher=teacher)
        assert said.startswith(f"teacher.loras: {path} {why}")


def test_a_student_is_no_teacher(place: Path) -> None:
    assert refused_teacher(place, SHIPPED).startswith(
        f"teacher.model: {SHIPPED} is a koala-tiny; expected all of SDXL's layers"
    )


def test_what_is_no_teacher_is_named(place: Path, tmp_path: Path) -> None:
    said = refused_teacher(place, tmp_path / "nowhere")
    assert said.startswith(f"teacher.model: {tmp_path / 'nowhere'} does not exist; expected SDXL")
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html>")
    assert "page.safetensors is a web page" in refused_teacher(place, tmp_path / "page.safetensors")
    (tmp_path / "words.safetensors").write_text("these are the weights")
    assert "words.safetensors" in refused_teacher(place, tmp_path / "words.safetensors")
    (tmp_path / "empty").mkdir()
    assert "empty holds no unet/" in refused_teacher(place, tmp_path / "empty")
    assert not (place / "untaught").exists()


@pytest.mark.parametrize(
    "missing", daily(["text_encoder", "vae", "tokenizer_2", "scheduler", "model_index.json"], ["vae", "tokenizer_2"])
)
def test_a_teacher_without_its_other_parts_is_named(place: Path, tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for path in (place / "sdxl-tiny").iterdir():
        if path.name != missing:
            (folder / path.name).symlink_to(path)
    said = refused_teacher(place, folder)
    assert said.startswith(f"teacher.model: {folder} is not a complete SDXL folder: ")
    assert not (place / "cache-of-none").exists()


def test_a_teacher_that_predicts_velocity_is_named(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "sdxl-tiny", tmp_path / "velocity")
    path = tmp_path / "velocity" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    assert f"{tmp_path / 'velocity'} says that it predicts v_prediction" in refused_teacher(
        place, tmp_path / "velocity"
    )


@pytest.mark.parametrize("text", [None, "{", '{"beta_schedule": "unknown"}'], ids=["missing", "damaged", "unknown"])
def test_a_teacher_without_a_noise_schedule_is_named(place: Path, tmp_path: Path, text: str | None) -> None:
    shutil.copytree(place / "sdxl-tiny", tmp_path / "teacher")
    path = tmp_path / "teacher" / "scheduler" / "scheduler_config.json"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    said = refused_teacher(place, tmp_path / "teacher")
    assert said.startswith(f"teacher.model: {path.parent} holds no noise schedule (")
    assert said.endswith("expected SDXL's scheduler_config.json. Fetch it again.")


@pytest.mark.parametrize(("mark", "metadata"), [("v_pred", {}), ("", {"modelspec.predict_key": "v"})])
def test_a_single_file_that_predicts_velocity_is_named(
    place: Path, tmp_path: Path, mark: str, metadata: dict[str, str]
) -> None:
    state = load_file(place / "sdxl-tiny" / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    save_file(state | ({mark: torch.zeros(0)} if mark else {}), path := tmp_path / "velocity.safetensors", metadata)
    assert f"{path} says that it predicts v_prediction" in refused_teacher(place, path)
