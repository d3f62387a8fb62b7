"""A checkpoint that core's CheckpointSave writes of our models loads again, here and in stock nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import torch

from koala_sdxl import koala_loader
from koala_sdxl.host.model import model_facts
from koala_sdxl.koala.architecture import layout
from koala_sdxl.koala.files import inspect as checkpoint
from tests import large
from tools.measure import parity
from tools.synthetic import random_weights
from tools.tiny.pack import UNUSED


def _predict(model: Any) -> torch.Tensor:
    """One prediction of the U-Net, patches applied, as sampling would call it; (1, 4, 8, 8)."""
    generator = torch.Generator().manual_seed(5)
    x, context, pooled = (torch.randn(shape, generator=generator) for shape in _shapes(model))
    conditioning = [[context, {"pooled_output": pooled}]]
    sigmas = torch.tensor([5.0, 0.0])
    sampler = comfy.samplers.sampler_object("euler")
    return comfy.sample.sample_custom(model, x, 1.0, sampler, sigmas, conditioning, conditioning, torch.zeros_like(x))


def _close(first: torch.Tensor, second: torch.Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def _shapes(model: Any) -> list[tuple[int, ...]]:
    shape = model_facts(model).layout
    return [(1, 4, 8, 8), (1, 77, shape.context), (1, shape.pooled)]


def test_koala_tiny_saved_by_core_loads_again(tmp_path: Path) -> None:
    model, clip, vae = parity.tiny_models()
    comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), model, clip, vae)
    again, again_clip, again_vae = koala_loader.load_checkpoint(tmp_path / "saved.safetensors")
    for saved, loaded in (
        (model.model, again.model),
        (clip.cond_stage_model, again_clip.cond_stage_model),
        (vae.first_stage_model, again_vae.first_stage_model),
    ):
        weights = loaded.state_dict()
        other = [name for name, weight in saved.state_dict().items() if not torch.equal(weight, weights[name])]
        assert set(other) <= UNUSED
    # answers but for rounding: where equal weights lie otherwise in memory, some processors add up in another order
    _close(_predict(again), _predict(model))
    first, second = (part.encode_from_tokens_scheduled(part.tokenize("a red star")) for part in (clip, again_clip))
    _close(first[0][0], second[0][0])
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    _close(vae.decode(latent), again_vae.decode(latent))


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.usefixtures("full_size")
def test_koala_700m_saved_by_core_loads_here_and_in_the_stock_loader(tmp_path: Path) -> None:
    model, clip, vae = koala_loader.load_folder(random_weights.folder("koala-700m"), "fp16")
    wanted = _predict(model)
    path = tmp_path / "saved.safetensors"
    comfy.sd.save_checkpoint(str(path), model, clip, vae)
    del model, clip, vae
    large.let_go()
    assert checkpoint.inspect_checkpoint(path).model.unet.layout == layout.KOALA_700M
    ours = koala_loader.load_checkpoint(path, "fp16")[0]
    assert torch.equal(_predict(ours), wanted)
    del ours
    large.let_go()
    # the U-Net alone: core holds the file beside what it loads of it
    parts = {"output_clip": False, "output_vae": False}
    stock = comfy.sd.load_checkpoint_guess_config(str(path), **parts, model_options={"dtype": torch.float16})[0]
    assert torch.equal(_predict(stock), wanted)
