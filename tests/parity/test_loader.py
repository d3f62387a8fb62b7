"""Every form of a KOALA gives the same models, and these do what core's models do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.utils
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from safetensors.torch import save_file

from koala_sdxl import koala_loader
from koala_sdxl.host.model import WEIGHT_DTYPES, model_facts
from koala_sdxl.koala.architecture import keys, layout
from koala_sdxl.koala.files import inspect as checkpoint
from koala_sdxl.koala.files.header import CheckpointError
from koala_sdxl.nodes.load import load_parts
from tests.parity import forms
from tests.unit import files
from tools.harness import testhost
from tools.measure import parity
from tools.synthetic import random_weights

Loader = Callable[[forms.Forms], koala_loader.Loaded]


def _unet_with_parts(form: forms.Forms) -> koala_loader.Loaded:
    folder = form.old_folder
    encoders = [folder / part / "model.safetensors" for part in ("text_encoder_2", "text_encoder")]  # any order
    unet = checkpoint.inspect_model(form.bare_diffusers)
    vae_file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    clip, vae = load_parts(unet.unet.layout, encoders[0], encoders[1], vae_file)
    return koala_loader.load_unet(unet, form.bare_diffusers.name), clip, vae


def _unet_with_checkpoint(form: forms.Forms) -> koala_loader.Loaded:
    unet = checkpoint.inspect_model(form.bare_comfy)
    return (
        koala_loader.load_unet(unet, form.bare_comfy.name),
        *koala_loader.load_checkpoint_parts(koala_loader.BUILT_IN),
    )


LOADERS: dict[str, Loader] = {
    "folder, as this transformers saves it": lambda form: koala_loader.load_folder(form.folder),
    "folder, text encoders under the other prefix": lambda form: koala_loader.load_folder(form.old_folder),
    "checkpoint of diffusers' script": lambda form: koala_loader.load_checkpoint(form.script),
    "U-Net, text encoders, VAE": _unet_with_parts,
    "U-Net, SDXL checkpoint": _unet_with_checkpoint,
}


@pytest.fixture(scope="module")
def form(tmp_path_factory: pytest.TempPathFactory) -> forms.Forms:
    return forms.write(tmp_path_factory.mktemp("forms"))


def _weights(model: Any, clip: Any, vae: Any) -> dict[str, torch.Tensor]:
    networks = {"unet": model.model.diffusion_model, "clip": clip.cond_stage_model, "vae": vae.first_stage_model}
    return {f"{part}.{name}": tensor for part, net in networks.items() for name, tensor in _state(net).items()}


def _state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor but the projection of CLIP-L, which SDXL has no use for, no file brings and core leaves unset."""
    unset = "clip_l.transformer.text_projection.weight"
    return {name: tensor for name, tensor in network.state_dict().items() if name != unset}


@pytest.mark.parametrize("loader", LOADERS.values(), ids=list(LOADERS))
def test_every_form_loads_to_the_same_weights(
    loader: Loader, form: forms.Forms, caplog: pytest.LogCaptureFixture
) -> None:
    loaded, built_in = _weights(*loader(form)), _weights(*parity.tiny_models())
    assert loaded.keys() == built_in.keys()
    different = [name for name, tensor in loaded.items() if not torch.equal(tensor, built_in[name])]
    assert not different
    assert not [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


@pytest.mark.parametrize("name", ["KOALA_700M", "KOALA_1B", "KOALA_1_7B"])
def test_cores_own_detection_agrees_with_our_model_settings(name: str) -> None:
    import comfy.model_detection

    shape = getattr(layout, name)
    with torch.device("meta"):
        state = {tensor.comfy: torch.empty(tensor.shape) for tensor in keys.tensors(shape)}
    theirs = comfy.model_detection.detect_unet_config(state, "")
    ours = koala_loader.unet_config(shape)
    assert {key: ours[key] for key in theirs if key in ours} == {key: theirs[key] for key in theirs if key in ours}


@pytest.mark.parametrize(
    "shape",
    [
        layout.Layout(  # KOALA-1.7B's cut, narrow: core's loaders do not know it
            (32, 64, 128), ((0,), (2,), (10,)), 10, ((10, 10), (2, 2), (0, 0)), context=96, added=1600
        ),
        layout.Layout(  # a student with uneven layers and depths
            (32, 64, 128), ((0, 0), (1,), (3, 2)), 2, ((3, 1, 2), (2, 1), (0, 0, 0)), context=96, added=1600
        ),
    ],
    ids=["one layer, depth 10, middle", "uneven"],
)
def test_layouts_that_core_does_not_know_are_built(shape: layout.Layout, tmp_path: Path) -> None:
    weights = random_weights.unet_state(shape)
    save_file(weights, tmp_path / "student.safetensors")
    model = koala_loader.load_unet(checkpoint.inspect_model(tmp_path / "student.safetensors"), "student")
    network = model.model.diffusion_model.state_dict()
    names = keys.renaming(shape, "diffusers", "comfy")
    wanted = {names[name]: tensor for name, tensor in weights.items()}
    assert wanted.keys() == network.keys()
    assert all(torch.equal(tensor.to(wanted[name].dtype), wanted[name]) for name, tensor in network.items())
    assert model_facts(model).layout == shape


def _core_builds(shape: layout.Layout) -> bool:
    """Whether core's network of a layout has that layout's tensors."""
    config = comfy.supported_models.SDXL(koala_loader.unet_config(shape)).unet_config
    try:
        network = UNetModel(**config, device=torch.device("meta"), operations=comfy.ops.disable_weight_init)
    except (ValueError, ZeroDivisionError, RuntimeError):
        return False
    return keys.shapes_of(network.state_dict()) == {tensor.comfy: tensor.shape for tensor in keys.tensors(shape)}


@pytest.mark.parametrize("cut", [layout.KOALA_700M, layout.KOALA_1B], ids=layout.name)
@pytest.mark.parametrize(
    "channels",
    [
        *((320, 640, 1280), (32, 64, 128), (64, 64, 64), (96, 192, 384), (32, 64, 192), (320, 640, 640)),
        *((33, 66, 132), (48, 96, 192), (32, 96, 128), (32, 64, 96), (64, 96, 192), (64, 128, 160), (16, 64, 128)),
    ],
    ids=str,
)
def test_widths_are_refused_exactly_where_core_does_not_build_them(
    channels: tuple[int, ...], cut: layout.Layout, tmp_path: Path
) -> None:
    shape = replace(cut, channels=channels)
    path = files.write(tmp_path / "mine.safetensors", files.unet(shape))
    if _core_builds(shape):
        assert checkpoint.inspect_unet(path).layout == shape
    else:
        with pytest.raises(CheckpointError, match=r"^mine\.safetensors is an SDXL sub-network with a stage of "):
            checkpoint.inspect_unet(path)


@pytest.mark.parametrize("choice", list(WEIGHT_DTYPES))
def test_weight_types_are_kept_and_still_make_a_picture(choice: str) -> None:
    model = koala_loader.load_unet(checkpoint.inspect_model(koala_loader.BUILT_IN), "tiny", choice)
    wanted = WEIGHT_DTYPES[choice]
    kept = model.model.diffusion_model.input_blocks[0][0].weight.dtype
    assert wanted in (None, kept)
    latent = _sample(model, parity.tiny_models()[1], steps=2)
    assert torch.isfinite(latent).all()


def test_facts_survive_clone_lora_and_merge() -> None:
    model, clip, _ = parity.tiny_models()
    facts = model_facts(model)
    patched, _ = comfy.sd.load_lora_for_models(model, clip, _lora(), 1.0, 1.0)
    merged = model.clone()
    merged.add_patches(patched.get_key_patches("diffusion_model."), 0.5, 0.5)
    assert model_facts(model.clone()) is facts
    assert model_facts(patched) is facts
    assert model_facts(merged) is facts


def test_a_lora_for_koala_changes_the_picture_and_leaves_the_model_as_it_was() -> None:
    model, clip, _ = parity.tiny_models()
    before = _sample(model, clip)
    patched, _ = comfy.sd.load_lora_for_models(model, clip, _lora(), 1.0, 1.0)
    assert not torch.equal(_sample(patched, clip), before)
    assert torch.equal(_sample(model, clip), before)


def test_host_can_build_every_part_again_from_its_file() -> None:
    model, clip, vae = parity.tiny_models()
    for patcher in (model, clip.patcher, vae.patcher):
        factory, arguments = patcher.cached_patcher_init
        again = factory(*arguments, disable_dynamic=True)
        first, second = _state(patcher.model), _state(again.model)
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_stock_node_merges_our_models() -> None:
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    model, clip, _ = parity.tiny_models()
    (merged,) = ModelMergeSimple().merge(model, model.clone(), 0.5)
    assert torch.allclose(_sample(merged, clip), _sample(model, clip), atol=1e-4)


@pytest.mark.nightly
def test_a_stock_node_compiles_our_models() -> None:
    """By day an accelerated one: tests/speed/test_accelerate.py."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model, clip, _ = parity.tiny_models()
    compiled = model.clone()
    set_torch_compile_wrapper(model=compiled, backend="eager")
    assert torch.allclose(_sample(compiled, clip), _sample(model, clip), atol=1e-4)


def test_importing_the_nodes_imports_no_heavy_library() -> None:
    """diffusers alone takes longer than the whole pack may; it comes with the first schedule."""
    code = (
        "from tools.harness import inprocess; inprocess.activate(); import sys; import comfy.sd, comfy_extras, server\n"
        "before = set(sys.modules); import koala_sdxl.nodes; print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=testhost.ROOT, capture_output=True, text=True, check=True)
    imported = done.stdout.splitlines()[-1]
    assert "koala_sdxl.nodes.sample" in imported
    assert "diffusers" not in imported
    assert "transformers" not in imported


def test_weights_as_read_are_never_written_to() -> None:
    model, clip, vae = koala_loader.load_checkpoint(koala_loader.BUILT_IN)
    before = {name: tensor.clone() for name, tensor in _weights(model, clip, vae).items()}
    patched, _ = comfy.sd.load_lora_for_models(model, clip, _lora(), 1.0, 1.0)
    wanted = _sample(model, clip, steps=1)
    assert not torch.equal(_sample(patched, clip, steps=1), wanted)
    assert torch.equal(_sample(model, clip, steps=1), wanted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in _weights(model, clip, vae).items())


@pytest.mark.usefixtures("full_size")
def test_a_koala_from_a_stock_loader_is_known_by_its_layout() -> None:
    model = comfy.sd.load_diffusion_model(
        str(random_weights.folder("koala-700m") / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    )
    facts = model_facts(model)
    assert (facts.layout, facts.identity.certain) == (layout.KOALA_700M, False)


def _sample(model: Any, clip: Any, steps: int = 2) -> torch.Tensor:
    positive, negative = parity.KoalaPrompt.execute(clip, "a red circle", "", "no style", "reference").result
    preset = {"preset": "custom", "steps": steps, "cfg": 7.5, "spacing": "leading"}
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    return parity.KoalaSampler.execute(model, positive, negative, latent, 1, preset, "euler", 1.0).result[0]["samples"]


def _lora() -> dict[str, torch.Tensor]:
    """A LoRA trained on koala-tiny itself, kohya names: one attention matrix of the deepest stage."""
    name = "lora_unet_down_blocks_2_attentions_0_transformer_blocks_3_attn1_to_q"
    generator = torch.Generator().manual_seed(0)
    return {
        f"{name}.lora_down.weight": torch.randn(4, 128, generator=generator),
        f"{name}.lora_up.weight": torch.randn(128, 4, generator=generator),
    }
