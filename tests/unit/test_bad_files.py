"""Every bad file is refused with one clear line: which file, what it is, what was expected, what to do."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from koala_sdxl.koala.architecture.keys import NUMBERINGS
from koala_sdxl.koala.architecture.layout import KOALA_1B, KOALA_700M, KOALA_TINY, SDXL, Layout, compact
from koala_sdxl.koala.architecture.layout import name as layout_name
from koala_sdxl.koala.files.header import CheckpointError
from koala_sdxl.koala.files.inspect import (
    inspect_checkpoint,
    inspect_model,
    inspect_text_and_vae,
    inspect_text_encoder,
    inspect_vae,
    require_text_width,
)
from tests.unit import bad_files, files, others, reference


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed`:FutureWarning")
@pytest.mark.parametrize("kind", bad_files.BAD)
def test_first_line_says_it_all(tmp_path: Path, kind: str) -> None:
    bad = bad_files.BAD[kind]
    path = tmp_path / f"{kind}-file.safetensors"
    bad.make(path)
    with pytest.raises(CheckpointError) as caught:
        inspect_model(path)
    first = str(caught.value).splitlines()[0]
    assert first.startswith(path.name)
    assert bad.says in first
    assert bad.do.lower() in first.lower()
    assert any(word in first for word in ("expected", "promises", "does not match"))


@pytest.mark.parametrize("numbering", NUMBERINGS)
def test_sdxl_is_refused_in_every_numbering(tmp_path: Path, numbering: str) -> None:
    path = files.write(tmp_path / "sd_xl_base_1.0.safetensors", files.unet(SDXL, numbering))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="is an SDXL base model"):
        inspect_model(path)


def test_unets_of_other_families_are_those_of_diffusers() -> None:
    def like(layout: Layout, **changes: object) -> reference.Shapes:
        return reference.shapes_of(lambda: reference.unet_model(layout, **changes))

    before = {"addition_embed_type": None}
    assert others.unet(others.REFINER) == like(others.REFINER)
    assert others.unet(others.SD2) == like(others.SD2, **before)
    assert others.unet(others.SD1) == like(others.SD1, **before, use_linear_projection=False)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="no count of bytes read on this system")
def test_a_wrong_file_of_ten_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = files.write(tmp_path / "huge.safetensors", others.checkpoint(SDXL) | {"padding": (5_000_000_000,)})
    with pytest.raises(CheckpointError):  # the first time also imports what is imported late
        inspect_model(path)
    before = _bytes_read()
    with pytest.raises(CheckpointError, match="is an SDXL base model"):
        inspect_model(path)
    assert path.stat().st_size > 15e9
    assert _bytes_read() - before < 1_000_000


def _bytes_read() -> int:
    line = Path("/proc/self/io").read_text().splitlines()[0]
    assert line.startswith("rchar: ")
    return int(line.split()[1])


def test_a_missing_file_is_no_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        inspect_model(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("numbering", NUMBERINGS)
def test_random_damage_is_always_described(tmp_path: Path, numbering: str) -> None:
    """Whatever is dropped, renamed or reshaped: a CheckpointError and nothing else. The one way out is a U-Net that
    lost a whole transformer: a smaller model, but a whole one."""
    whole = files.unet(KOALA_700M, numbering)  # type: ignore[arg-type]
    for seed in range(12):
        draw = random.Random(seed)
        found = dict(whole)
        victims = draw.sample(sorted(found), draw.choice([1, 3, 30, 300]))
        if seed % 2:  # whole modules rather than tensors
            stems = tuple(".".join(name.split(".")[: draw.randint(1, 4)]) + "." for name in victims[:3])
            victims = [name for name in found if name.startswith(stems)]
        harm = draw.choice(["drop", "rename", "flatten", "transpose", "scalar"])
        for name in victims:
            shape = found.pop(name)
            if harm == "rename":
                found[name.replace("1", "7").replace("0", "31") + "x"] = shape
            elif harm == "flatten":
                found[name] = (1, *shape)
            elif harm == "transpose":
                found[name] = (*shape[::-1], 2)
            elif harm == "scalar":
                found[name] = ()
        path = files.write(tmp_path / f"{seed}.safetensors", found)
        try:
            layout = inspect_model(path).unet.layout
        except CheckpointError as error:
            said = str(error)
        else:
            said = path.name
            assert layout != KOALA_700M
            assert files.unet(layout, numbering) == found, (seed, harm)  # type: ignore[arg-type]
        assert said.startswith(path.name), (seed, harm)


@pytest.mark.parametrize(
    ("sign", "metadata", "says"),
    [
        ("v_pred", {}, "the tensor v_pred"),
        ("edm_vpred.sigma_max", {}, r"the tensor edm_vpred\.sigma_max"),
        ("other", {"modelspec.prediction_type": "v"}, "the metadata modelspec.prediction_type = v"),
    ],
)
def test_a_checkpoint_that_does_not_predict_epsilon(
    sign: str, metadata: dict[str, str], says: str, tmp_path: Path
) -> None:
    found = files.unet(KOALA_TINY, "comfy", "model.diffusion_model.")
    path = files.write(tmp_path / "it.safetensors", {**found, sign: (0,)}, metadata=metadata)
    with pytest.raises(
        CheckpointError, match=rf"^it\.safetensors does not predict epsilon, as {says} tells; every KOALA"
    ):
        inspect_model(path)
    fine = {"modelspec.prediction_type": "epsilon"}
    inspect_model(files.write(path, {**found, "other": (0,)}, metadata=fine))


@pytest.mark.parametrize(
    ("lacks", "named"),
    [
        ("conditioner.embedders.0.", "no CLIP-L;"),
        ("conditioner.embedders.1.", "no CLIP-G;"),
        ("first_stage_model.", "no VAE;"),
        (("conditioner.", "first_stage_model."), "no CLIP-L and no CLIP-G and no VAE;"),
    ],
)
def test_a_checkpoint_without_a_part_names_it(tmp_path: Path, lacks: str | tuple[str, ...], named: str) -> None:
    found = {name: shape for name, shape in others.checkpoint(KOALA_1B).items() if not name.startswith(lacks)}
    path = files.write(tmp_path / "part.safetensors", found)
    with pytest.raises(CheckpointError, match=f"^part.safetensors holds the U-Net of KOALA-1B but {named} expected "):
        inspect_checkpoint(path)


def test_a_checkpoint_whose_vae_is_damaged_names_the_tensor(tmp_path: Path) -> None:
    found = others.checkpoint(KOALA_700M)
    del found["first_stage_model.decoder.conv_in.weight"]
    path = files.write(tmp_path / "damaged.safetensors", found)
    with pytest.raises(CheckpointError, match=r"^damaged\.safetensors.* first_stage_model\.decoder\.conv_in\.weight"):
        inspect_checkpoint(path)


@pytest.mark.parametrize("kind", ["sd1-checkpoint", "refiner-checkpoint", "flux-checkpoint", "vae-original", "clip-l"])
def test_parts_are_not_taken_from_another_familys_checkpoint(tmp_path: Path, kind: str) -> None:
    bad = bad_files.BAD[kind]
    path = tmp_path / f"{kind}.safetensors"
    bad.make(path)
    with pytest.raises(CheckpointError) as caught:
        inspect_text_and_vae(path)
    assert bad.says in str(caught.value)
    assert "expected an SDXL checkpoint with both text encoders and a VAE" in str(caught.value)


@pytest.mark.parametrize("kind", ["vae-diffusers", "t5", "clip-vision", "sdxl-diffusers", "lora-kohya", "cut", "empty"])
def test_no_text_encoder(tmp_path: Path, kind: str) -> None:
    bad = bad_files.BAD[kind]
    path = tmp_path / f"{kind}.safetensors"
    bad.make(path)
    with pytest.raises(CheckpointError) as caught:
        inspect_text_encoder(path)
    assert str(caught.value).startswith(path.name)
    assert bad.says in str(caught.value)


@pytest.mark.parametrize("kind", ["clip-l", "t5", "sdxl-checkpoint", "controlnet-sd3", "junk", "web-page"])
def test_no_vae(tmp_path: Path, kind: str) -> None:
    bad = bad_files.BAD[kind]
    path = tmp_path / f"{kind}.safetensors"
    bad.make(path)
    with pytest.raises(CheckpointError) as caught:
        inspect_vae(path)
    assert str(caught.value).startswith(path.name)
    assert bad.says in str(caught.value)


def test_a_vae_of_another_family_is_told_by_its_latent_channels(tmp_path: Path) -> None:
    path = files.write(tmp_path / "sixteen.safetensors", reference.vae(latent=16))
    with pytest.raises(CheckpointError, match="16 latent channels; expected SDXL's with 4"):
        inspect_vae(path)


def test_text_encoders_of_another_width_are_refused(tmp_path: Path) -> None:
    """Stable Diffusion 2's encoder has no projection and 1024 channels: by its form a CLIP-L."""
    other = inspect_text_encoder(files.write(tmp_path / "sd2.safetensors", reference.clip_l(1024, 23)))
    clip_g = inspect_text_encoder(files.write(tmp_path / "g.safetensors", reference.clip_g()))
    with pytest.raises(CheckpointError, match="width 2304 and pooled 1280; KOALA-700M expects 2048 and 1280"):
        require_text_width(KOALA_700M, other, clip_g)


def test_nothing_is_left_behind_or_changed(tmp_path: Path) -> None:
    path = files.write(tmp_path / "koala.safetensors", files.unet(KOALA_700M))
    before = (path.stat().st_mtime_ns, path.stat().st_size)
    os.chmod(path, 0o444)
    inspect_model(path)
    assert (path.stat().st_mtime_ns, path.stat().st_size) == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("layout", [KOALA_700M, KOALA_TINY, compact(4, middle=False)], ids=layout_name)
def test_only_what_was_released_is_to_be_fetched_from_its_publisher(tmp_path: Path, layout: Layout) -> None:
    shapes = files.unet(layout)
    del shapes["conv_out.bias"]
    with pytest.raises(CheckpointError, match="1 missing") as caught:
        inspect_model(files.write(tmp_path / "mine.safetensors", shapes))
    remedy = "koala-700m/resolve/main/" if layout == KOALA_700M else "Fetch the file again from where it came from."
    assert remedy in str(caught.value)
