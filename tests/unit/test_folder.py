"""Hugging Face folders: accepted as published, and every way in which one can be incomplete or mixed up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from koala_sdxl.koala.architecture.layout import KOALA_1B, KOALA_700M, KOALA_TINY, Layout
from koala_sdxl.koala.files.header import CheckpointError
from koala_sdxl.koala.files.inspect import inspect_folder, inspect_model
from koala_sdxl.koala.releases import BASE, LIGHTNING, SCHEDULER_CONFIG
from tests.unit import files, reference


def published(
    folder: Path,
    layout: Layout = KOALA_700M,
    unet: str = "diffusion_pytorch_model.fp16.safetensors",
    text: str = "model.fp16.safetensors",
    vae: str = "diffusion_pytorch_model.safetensors",
    drop: str = "",
) -> Path:
    """A KOALA folder with the files that its repository has, as far as we read them.

    ``drop`` is taken off the text encoders' names: transformers 5 saves them without ``text_model.``.
    """
    wide = layout.channels[0] == 320
    clip_l = reference.clip_l() if wide else reference.clip_l(32, 3)
    clip_g = reference.clip_g() if wide else reference.clip_g(64, 3)
    files.write(folder / "unet" / unet, files.unet(layout), "F16" if "fp16" in unet else "F32")
    for part, found in (("text_encoder", clip_l), ("text_encoder_2", clip_g)):
        files.write(folder / part / text, {key.removeprefix(drop): s for key, s in found.items()})
    files.write(folder / "vae" / vae, reference.vae(), "F32")
    configs = {
        "unet/config.json": {"_class_name": "UNet2DConditionModel", "_name_or_path": "./results/koala/checkpoint-1"},
        "scheduler/scheduler_config.json": {**SCHEDULER_CONFIG, "_class_name": "EulerDiscreteScheduler"},
        "model_index.json": {"_class_name": "StableDiffusionXLPipeline"},
    }
    for name, config in configs.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ({}, "fp16"),
        ({"layout": KOALA_1B}, "fp16"),
        ({"layout": KOALA_TINY}, "fp16"),
        ({"unet": "diffusion_pytorch_model.safetensors", "text": "model.safetensors"}, "fp32"),
        ({"vae": "diffusion_pytorch_model.fp16.safetensors"}, "fp16"),
        ({"drop": "text_model."}, "fp16"),
    ],
    ids=str,
)
def test_whole_folder(tmp_path: Path, form: dict[str, str], dtype: str) -> None:
    folder = published(tmp_path / "koala", **form)  # type: ignore[arg-type]
    found = inspect_folder(folder)
    assert (found.model.unet.layout, found.model.unet.dtype) == (form.get("layout", KOALA_700M), dtype)
    for part in ("text_encoder", "text_encoder_2", "vae"):
        path = getattr(found, part).path
        assert path.is_file()
        assert path.parent == folder / part
    assert found.model.scheduler["timestep_spacing"] == "leading"


def test_fp16_is_taken_where_both_are_there(tmp_path: Path) -> None:
    folder = published(tmp_path / "koala")
    published(folder, unet="diffusion_pytorch_model.safetensors", text="model.safetensors")
    found = inspect_folder(folder)
    assert found.model.unet.dtype == "fp16"
    assert found.text_encoder.path.name == found.text_encoder_2.path.name == "model.fp16.safetensors"


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("unet", "diffusion_pytorch_model.fp16.safetensors"),
        ("text_encoder", "model.fp16.safetensors"),
        ("text_encoder_2", "model.fp16.safetensors"),
        ("vae", "diffusion_pytorch_model.safetensors"),
    ],
)
@pytest.mark.parametrize("release", ["koala-700m", "koala-lightning-1b"])
def test_a_missing_part_is_named_with_its_address(tmp_path: Path, release: str, part: str, file: str) -> None:
    folder = published(tmp_path / release)
    shutil.rmtree(folder / part)
    with pytest.raises(CheckpointError) as caught:
        inspect_folder(folder)
    assert str(caught.value).startswith(f"{release}/{part}/")
    assert f"https://huggingface.co/etri-vilab/{release}/resolve/main/{part}/{file}" in str(caught.value)


def test_a_pickle_in_place_of_a_part_is_mentioned(tmp_path: Path) -> None:
    folder = published(tmp_path / "koala-700m")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"Only diffusion_pytorch_model\.bin is there, a pickle"):
        inspect_folder(folder)


def _swap(folder: Path) -> None:
    for source, target in (("text_encoder", "x"), ("text_encoder_2", "text_encoder"), ("x", "text_encoder_2")):
        (folder / source).rename(folder / target)


def _same(folder: Path) -> None:
    shutil.copytree(folder / "text_encoder", folder / "text_encoder_2", dirs_exist_ok=True)


def _vae_as_unet(folder: Path) -> None:
    files.write(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors", reference.vae())


def _narrow(folder: Path) -> None:
    files.write(folder / "text_encoder" / "model.fp16.safetensors", reference.clip_l(32, 3))


def _text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (_swap, "koala-700m/text_encoder and text_encoder_2 hold CLIP-G and CLIP-L; expected CLIP-L and CLIP-G."),
        (_same, "koala-700m/text_encoder and text_encoder_2 hold CLIP-L and CLIP-L; expected CLIP-L and CLIP-G."),
        (_vae_as_unet, "koala-700m/unet/diffusion_pytorch_model.fp16.safetensors is a VAE; expected a KOALA U-Net"),
        (_narrow, "width 1312 and pooled 1280; KOALA-700M expects 2048 and 1280"),
        (_text("unet/config.json", "{"), "koala-700m/unet/config.json holds no JSON object; expected"),
        (_text("unet/config.json", "[]"), "koala-700m/unet/config.json holds no JSON object; expected"),
        (
            _text("scheduler/scheduler_config.json", "<html>"),
            "koala-700m/scheduler/scheduler_config.json holds no JSON object; expected",
        ),
        (
            _text("scheduler/scheduler_config.json", '{"prediction_type": "v_prediction"}'),
            'koala-700m/scheduler/scheduler_config.json: prediction_type is "v_prediction"; expected "epsilon": ',
        ),
        (
            _text("text_encoder_2/model.fp16.safetensors", ""),
            "koala-700m/text_encoder_2/model.fp16.safetensors is empty; expected",
        ),
    ],
)
def test_a_faulty_folder_is_described(tmp_path: Path, harm: Callable[[Path], object], says: str) -> None:
    folder = published(tmp_path / "koala-700m")
    harm(folder)
    with pytest.raises(CheckpointError) as caught:
        inspect_folder(folder)
    assert says in str(caught.value).splitlines()[0]


def _trailing(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**SCHEDULER_CONFIG, "timestep_spacing": "trailing"}))


def _origin(folder: Path) -> None:
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({"_name_or_path": "./results/pt_sdxl_lightning/pt_koala_1b_sdxl_lightning_4step/c-1"}))


def _metadata(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    files.write(path, files.unet(KOALA_700M), metadata={"koala.variant": "lightning"})


@pytest.mark.parametrize(
    ("name", "mark", "variant", "certain", "evidence"),
    [
        ("koala-700m", None, BASE, True, 'The name "koala-700m" says so.'),
        ("koala-lightning-700m", None, LIGHTNING, True, 'The name "koala-lightning-700m" says so.'),
        ("mine", None, BASE, False, "Nothing in the file tells"),
        ("mine", _trailing, LIGHTNING, True, "trailing timesteps"),
        ("mine", _origin, LIGHTNING, True, "unet/config.json"),
        ("mine", _metadata, LIGHTNING, True, "metadata"),
        ("koala-700m", _origin, LIGHTNING, True, "unet/config.json"),
        ("koala-700m", _metadata, LIGHTNING, True, "metadata"),
    ],
)
def test_variant(
    tmp_path: Path, name: str, mark: Callable[[Path], None] | None, variant: object, certain: bool, evidence: str
) -> None:
    folder = published(tmp_path / name)
    if mark:
        mark(folder)
    identity = inspect_folder(folder).model.identity
    assert (identity.variant, identity.certain) == (variant, certain)
    assert evidence in identity.evidence


SNAPSHOTS = "models--org--{}/snapshots/0123abcd"
"""Where Hugging Face's cache keeps a repository: the folder itself has only a hash for its name."""


@pytest.mark.parametrize(
    ("place", "variant", "certain", "says"),
    [
        (SNAPSHOTS.format("koala-lightning-700m"), LIGHTNING, True, "koala-lightning-700m"),
        (SNAPSHOTS.format("koala-700m"), BASE, True, "koala-700m"),
        (SNAPSHOTS.format("My-KOALA_Lightning"), LIGHTNING, True, "My-KOALA_Lightning"),
        (SNAPSHOTS.format("something"), BASE, False, "Nothing in the file tells"),
        ("koala-lightning-700m/koala-700m", BASE, True, "koala-700m"),  # the nearest name counts
        ("models--lightning-ai--koala-700m/snapshots/0123abcd", BASE, True, "koala-700m"),
        ("koala-lightning-700m/checkpoints/mine", LIGHTNING, True, "koala-lightning-700m"),
        (
            "pytorch-lightning/models/mine",
            BASE,
            False,
            "Nothing in the file tells",
        ),  # a folder above says nothing of a KOALA
    ],
)
def test_the_whole_path_tells_the_variant(
    tmp_path: Path, place: str, variant: object, certain: bool, says: str
) -> None:
    folder = published(tmp_path / place, KOALA_TINY)
    for identity in (inspect_folder(folder).model.identity, inspect_model(_unet_of(folder)).identity):
        assert (identity.variant, identity.certain) == (variant, certain)
        assert says in identity.evidence


def test_a_link_into_the_cache_tells_the_variant(tmp_path: Path) -> None:
    folder = published(tmp_path / SNAPSHOTS.format("koala-lightning-700m"), KOALA_TINY)
    (tmp_path / "mine").symlink_to(folder, target_is_directory=True)
    assert inspect_folder(tmp_path / "mine").model.identity.variant == LIGHTNING
    (tmp_path / "mine.safetensors").symlink_to(_unet_of(folder))
    assert inspect_model(tmp_path / "mine.safetensors").identity.variant == LIGHTNING


def test_a_snapshot_without_a_part_names_its_repository(tmp_path: Path) -> None:
    folder = published(tmp_path / SNAPSHOTS.format("koala-lightning-1b"))
    shutil.rmtree(folder / "vae")
    with pytest.raises(CheckpointError, match=r"^org/koala-lightning-1b/vae/.*etri-vilab/koala-lightning-1b/resolve"):
        inspect_folder(folder)


def _unet_of(folder: Path) -> Path:
    return folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"


def test_configuration_files_may_be_absent(tmp_path: Path) -> None:
    """Weights alone are enough: SDXL's scheduler settings stand in for those that are not there."""
    folder = published(tmp_path / "koala-700m")
    shutil.rmtree(folder / "scheduler")
    (folder / "unet" / "config.json").unlink()
    assert inspect_folder(folder).model.scheduler == SCHEDULER_CONFIG


def test_the_folders_own_scheduler_settings_travel_with_the_model(tmp_path: Path) -> None:
    folder = published(tmp_path / "koala-700m")
    (folder / "scheduler" / "scheduler_config.json").write_text('{"steps_offset": 0}')
    scheduler = inspect_folder(folder).model.scheduler
    assert scheduler == {**SCHEDULER_CONFIG, "steps_offset": 0}
