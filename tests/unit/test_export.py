"""What a saved model says of itself is understood by diffusers, and read back here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from koala_sdxl.koala import releases as settings
from koala_sdxl.koala.architecture import layout
from koala_sdxl.koala.architecture.component_detection import read_autoencoder
from koala_sdxl.koala.architecture.component_keys import vae_name
from koala_sdxl.koala.architecture.keys import tensors
from koala_sdxl.koala.files import export
from koala_sdxl.koala.files.conventions import SCHEDULER_KEY, SETTINGS_KEY, VAE_PREFIX
from koala_sdxl.koala.files.header import CheckpointError, read_header
from koala_sdxl.koala.files.inspect import inspect_model
from koala_sdxl.koala.model_info import ModelFacts, assumed_facts
from tests.unit import files
from tools.tiny import SHIPPED as TINY

OWN_SCHEDULER = {**settings.SCHEDULER_CONFIG, "steps_offset": 0}


@pytest.mark.parametrize("shape", layout.KOALA_NAMES, ids=list(layout.KOALA_NAMES.values()))
def test_diffusers_builds_every_koala_from_our_configuration(shape: layout.Layout) -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        made = UNet2DConditionModel.from_config(export.unet_config(shape))
    found = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    assert found == {tensor.diffusers: tensor.shape for tensor in tensors(shape)}


@pytest.mark.parametrize(
    "shape",
    [
        replace(layout.KOALA_1B, down=((0,), (2,), (5,))),
        replace(layout.KOALA_1B, middle=5),
        replace(layout.SDXL, down=((0, 0), (2, 2), (10, 9))),
        replace(layout.SDXL, down=((0, 0), (2,), (10, 10)), up=((10, 10, 10), (2, 2), (0, 0, 0))),
    ],
)
def test_a_layout_that_diffusers_cannot_describe_is_refused(shape: layout.Layout) -> None:
    with pytest.raises(ValueError, match=r"diffusers' configuration cannot describe the custom .* as a checkpoint"):
        export.unet_config(shape)


def test_vae_names_are_those_of_diffusers_converter() -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    shapes = read_header(TINY).under(VAE_PREFIX)
    size = read_autoencoder(shapes)
    # every tensor is filled with its own number, to be told apart after the conversion
    state = {name: torch.full(shape, float(number)) for number, (name, shape) in enumerate(shapes.items())}
    theirs = convert_ldm_vae_checkpoint(dict(state), export.vae_config(size, 128))
    numbers = {name: int(tensor.flatten()[0]) for name, tensor in theirs.items()}
    assert numbers == {vae_name(name, len(size.channels)): number for number, name in enumerate(shapes)}


def _facts(variant: settings.Variant = settings.BASE, certain: bool = True) -> ModelFacts:
    identity = settings.Identity(variant, "", certain)
    return replace(inspect_model(TINY).facts("tiny"), identity=identity, scheduler=OWN_SCHEDULER)


@pytest.mark.parametrize("variant", settings.VARIANTS.values(), ids=list(settings.VARIANTS))
def test_variant_and_schedule_are_read_back(variant: settings.Variant, tmp_path: Path) -> None:
    written = export.metadata(_facts(variant), "title", "sgm")
    read = inspect_model(files.write(tmp_path / "a", files.unet(layout.KOALA_TINY), metadata=written))
    assert (read.identity.variant, read.identity.certain) == (variant, True)
    assert read.scheduler == OWN_SCHEDULER


def test_settings_of_its_own_are_read_back(tmp_path: Path) -> None:
    own = replace(settings.LIGHTNING, settings=settings.Settings(8, 1.0, "trailing"))
    written = export.metadata(_facts(own), "title", "sgm")
    read = inspect_model(files.write(tmp_path / "a", files.unet(layout.KOALA_TINY), metadata=written))
    assert read.identity.variant == own
    assert SETTINGS_KEY not in export.metadata(_facts(settings.LIGHTNING), "title", "sgm")


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ('{"steps": 8, "cfg": 1}', ": spacing is null; expected"),
        ('{"steps": 0, "cfg": 1, "spacing": "trailing"}', ": steps is 0; expected a whole number from 1 to 1000"),
        ('{"steps": true, "cfg": 1, "spacing": "trailing"}', ": steps is true; expected"),
        ('{"steps": 8, "cfg": -1, "spacing": "trailing"}', ": cfg is -1; expected a number from 0 to 100"),
        ('{"steps": 8, "cfg": NaN, "spacing": "trailing"}', ": cfg is NaN; expected a number"),
        ('{"steps": 8, "cfg": 1, "spacing": "karras"}', ': spacing is "karras"; expected "leading" or'),
        ("[]", " holds no JSON object"),
    ],
)
def test_settings_that_make_no_sense_are_refused(stated: str, said: str, tmp_path: Path) -> None:
    path = files.write(tmp_path / "a", files.unet(layout.KOALA_TINY), metadata={SETTINGS_KEY: stated})
    with pytest.raises(CheckpointError, match=f"a: the metadata {SETTINGS_KEY}{said}"):
        inspect_model(path)


def test_what_is_only_assumed_is_not_stated() -> None:
    assert "koala.variant" not in export.metadata(_facts(certain=False), "title", "sgm")
    assert SCHEDULER_KEY not in export.metadata(assumed_facts(layout.KOALA_TINY, "fp16", 1), "title", "sgm")


def test_modelspec_fields() -> None:
    found = export.metadata(_facts(), "my koala", "sgm")
    assert found["modelspec.sai_model_spec"] == "1.0.1"
    assert found["modelspec.title"] == "my koala"
    assert found["modelspec.resolution"] == "128x128"
    assert found["modelspec.predict_key"] == "epsilon"
    assert found["modelspec.date"].endswith("+00:00")


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ('{"prediction_type": "v_prediction"}', ': prediction_type is "v_prediction"; expected "epsilon": ComfyUI'),
        ('{"beta_end": 0.02}', ": beta_end is 0.02; expected 0.012: ComfyUI"),
        ("[]", " holds no JSON object"),
        ("{", " holds no JSON object"),
        ("[" * 100_000, " holds no JSON object"),
        (" " * 1_000_001, r" has more than 1,000,000 bytes"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(stated: str, said: str, tmp_path: Path) -> None:
    path = files.write(tmp_path / "a", files.unet(layout.KOALA_TINY), metadata={SCHEDULER_KEY: stated})
    with pytest.raises(CheckpointError, match=f"a: the metadata {SCHEDULER_KEY}{said}"):
        inspect_model(path)


def test_the_two_tokenizers_differ_in_their_padding() -> None:
    host = {
        "tokenizer_config.json": b'{"pad_token": "x", "model_max_length": 8192, "errors": "replace"}',
        "vocab": b"1",
    }
    made = export.tokenizer_files(host, "!")
    assert made["vocab"] == b"1"
    wanted = {"pad_token": "!", "model_max_length": 77, "errors": "replace"}
    assert json.loads(made["tokenizer_config.json"]) == wanted
