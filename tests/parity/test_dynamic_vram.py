"""What ComfyUI does with dynamic VRAM, its default on NVIDIA GPUs, as far as a CPU can show it.

Linear layers and embeddings have no weights before they are loaded, files are mapped into memory, and small layers are
patched as they are loaded, all others whenever they are used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.memory_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from safetensors import safe_open

from koala_sdxl import koala_loader
from koala_sdxl.host import saver
from koala_sdxl.host.reader import streamed
from koala_sdxl.koala.files.header import CheckpointError, read_header
from koala_sdxl.koala.files.inspect import inspect_checkpoint
from tests.parity.learning import require_fitted_as_sampled
from tests.shared_models import tensors
from tests.speed.execution_cases import SHORT, Streamed
from tests.speed.sampling import run
from tools.measure import parity

TINY = koala_loader.BUILT_IN


@pytest.fixture(autouse=True)
def dynamic_vram(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI's switch; a file is mapped by safetensors, not by ComfyUI's own reader, which needs a GPU."""

    parity.tiny_models()  # as it is elsewhere, for what is compared with it

    def mapped(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in read_header(Path(path)).shapes}, file.metadata()

    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    monkeypatch.setattr(comfy.utils, "load_safetensors", mapped)
    assert streamed()
    assert comfy.ops.disable_weight_init.Linear(2, 3).weight is None


def loaded() -> Any:
    """Not what another test has loaded."""
    found = inspect_checkpoint(TINY)
    unet = koala_loader._unet_patcher(found.model.unet, None)
    return unet, koala_loader._clip(found.text_encoder, found.text_encoder_2), koala_loader._vae(found.vae)


@pytest.mark.parametrize("patcher", [Streamed, ModelPatcher])
def test_every_weight_is_loaded(patcher: type[ModelPatcher], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", patcher)
    wanted, found = tensors(*parity.tiny_models()), tensors(*loaded())
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=0, atol=0)


def test_the_copy_without_dynamic_vram_draws_the_same() -> None:
    model = loaded()[0]
    assert torch.equal(run(model, preset=SHORT), run(parity.tiny_models()[0], preset=SHORT))


def test_a_host_that_builds_another_network_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although its layers have no weights yet whose shapes could be compared."""
    config = koala_loader.unet_config
    monkeypatch.setattr(koala_loader, "unet_config", lambda layout: config(layout) | {"context_dim": 32})
    with pytest.raises(CheckpointError, match=r"^koala-tiny\.safetensors does not fill the network .* misshapen"):
        loaded()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_copy_without_dynamic_vram_has_one_type(dtype: torch.dtype) -> None:
    unet = koala_loader._unet_patcher(inspect_checkpoint(TINY).model.unet, dtype, disable_dynamic=True)
    assert {parameter.dtype for parameter in unet.model.diffusion_model.parameters()} == {dtype}


def test_the_network_that_koala_lora_from_sdxl_fits() -> None:
    require_fitted_as_sampled(*parity.tiny_models()[:2])


def test_a_patched_layer_is_not_patched_again_when_it_is_saved() -> None:
    """Neither one that was patched as it was loaded, nor one that is patched when it is used."""
    model = loaded()[0]
    unet, prefix = model.model.diffusion_model, "diffusion_model."
    names = ("out.0.weight", "out.0.bias")
    before = {name: unet.state_dict()[name].float() for name in names}
    model.add_patches({prefix + name: ("diff", (torch.full_like(before[name], 0.25),)) for name in names})
    model.patch_weight_to_device(prefix + names[0])
    try:
        state = saver._patched(model, unet, prefix)
        for name in names:
            torch.testing.assert_close(state[name].to("cpu").float(), before[name] + 0.25, atol=2e-3, rtol=0)
    finally:
        model.unpatch_model()
