"""What KOALA Checkpoint Save writes of KOALA-700M loads in stock nodes to the same model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import comfy.diffusers_load
import comfy.sd
import pytest
import torch
from safetensors import safe_open

from koala_sdxl import koala_loader
from koala_sdxl.host import saver as koala_saver
from koala_sdxl.koala.architecture import layout
from koala_sdxl.koala.architecture.keys import renaming
from tests import large
from tests.parity.answers import encode, predict
from tools.synthetic import random_weights


class Answers(NamedTuple):
    """What a model predicts, and how it encodes a text."""

    predicted: torch.Tensor
    encoded: list[torch.Tensor]


def _full_size() -> koala_loader.Loaded:
    """KOALA-700M with random weights and a patch."""
    model, clip, vae = koala_loader.load_folder(random_weights.folder("koala-700m"), "fp16")
    model = model.clone()
    key = "diffusion_model.input_blocks.5.1.transformer_blocks.4.attn2.to_q.weight"
    change = 0.02 * torch.randn(1280, 1280, generator=torch.Generator().manual_seed(0))
    assert model.add_patches({key: ("diff", (change,))}) == [key]
    return model, clip, vae


@pytest.fixture(scope="module")
def wanted() -> Answers:
    """Its answers."""
    with large.alone():
        model, clip, _ = _full_size()
        return Answers(predict(model), encode(clip))


def _save_full_size(save: Callable[..., None], path: Path, parts: int = 3) -> None:
    """Save it, or only its first parts, and let it go: nothing else that is large has room beside it."""
    models = _full_size()
    save(path, *(part if place < parts else None for place, part in enumerate(models)))
    del models
    large.let_go()


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.usefixtures("full_size")
def test_koala_700m_in_the_stock_checkpoint_loader(wanted: Answers, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    _save_full_size(koala_saver.save_checkpoint, path)
    # one part at a time: core holds the file beside what it loads of it
    load = partial(comfy.sd.load_checkpoint_guess_config, str(path), output_vae=False)
    model = load(output_clip=False, model_options={"dtype": torch.float16})[0]
    assert torch.equal(predict(model), wanted.predicted)
    del model
    large.let_go()
    assert all(map(torch.equal, encode(load(output_model=False)[1]), wanted.encoded))
    large.let_go()
    assert torch.equal(predict(koala_loader.load_checkpoint(path, "fp16")[0]), wanted.predicted)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.usefixtures("full_size")
def test_koala_700ms_unet_in_the_stock_unet_loader(wanted: Answers, tmp_path: Path) -> None:
    path = tmp_path / "unet.safetensors"
    _save_full_size(koala_saver.save_checkpoint, path, parts=1)
    model = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float16})
    assert torch.equal(predict(model), wanted.predicted)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.usefixtures("full_size")
def test_koala_700m_in_the_stock_diffusers_loader(wanted: Answers, tmp_path: Path) -> None:
    """Core's loader of folders has no choice of type: on the CPU it keeps the U-Net in fp32."""
    folder = tmp_path / "a"
    _save_full_size(koala_saver.save_folder, folder)
    # the text encoders apart, as that loader loads them: core holds their files beside 3 GB of U-Net
    texts = [str(folder / part / "model.safetensors") for part in ("text_encoder", "text_encoder_2")]
    assert all(map(torch.equal, encode(comfy.sd.load_clip(texts)), wanted.encoded))
    large.let_go()
    model = comfy.diffusers_load.load_diffusers(str(folder), output_vae=False, output_clip=False)[0]
    assert (predict(model) - wanted.predicted).abs().max() <= 2e-2 * wanted.predicted.abs().max()
    network = model.model.diffusion_model.state_dict()
    names = renaming(layout.KOALA_700M, "comfy", "diffusers")
    with safe_open(folder / "unet" / "diffusion_pytorch_model.safetensors", framework="pt") as saved:
        for old, new in names.items():
            assert torch.equal(network[old], saved.get_tensor(new).to(network[old].dtype))
