"""What KOALA Checkpoint Save writes loads again, here and in diffusers, to the same model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from safetensors.torch import load_file, save_file

from koala_sdxl import koala_loader
from koala_sdxl.host import saver as koala_saver
from koala_sdxl.host.model import ATTACHMENT, WEIGHT_DTYPES, model_facts
from koala_sdxl.koala import releases as settings
from koala_sdxl.koala.architecture import layout
from koala_sdxl.koala.architecture.component_detection import read_autoencoder
from koala_sdxl.koala.architecture.components import LATENT_SCALE
from koala_sdxl.koala.architecture.keys import renaming
from koala_sdxl.koala.files import atomic_write as disk
from koala_sdxl.koala.files import inspect as checkpoint
from koala_sdxl.koala.files.conventions import CLIP_PREFIXES, UNET_PREFIX, VAE_PREFIX
from koala_sdxl.koala.files.convert import clip_g_for_checkpoint, clip_l_for_checkpoint
from koala_sdxl.koala.files.header import read_header
from koala_sdxl.koala.files.inspect import VAEFile
from koala_sdxl.koala.files.write import stored_dtypes
from tests.parity.answers import encode, predict
from tools.measure import parity
from tools.synthetic import random_weights

State = dict[str, torch.Tensor]
LORA_LAYERS = {
    "lora_unet_down_blocks_2_attentions_0_transformer_blocks_3_attn1_to_q": 128,
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": 32,
    "lora_te2_text_model_encoder_layers_1_self_attn_q_proj": 64,
}
"""kohya's name of a layer of koala-tiny -> its input width; CLIP-G's query is joined with key and value when saved."""


def _patched() -> koala_loader.Loaded:
    """koala-tiny with a LoRA on U-Net and both text encoders."""
    model, clip, vae = parity.tiny_models()
    generator = torch.Generator().manual_seed(0)
    lora: State = {}
    for name, width in LORA_LAYERS.items():
        out = 4 * width if name.endswith("fc1") else width
        lora[f"{name}.lora_down.weight"] = 0.3 * torch.randn(4, width, generator=generator)
        lora[f"{name}.lora_up.weight"] = 0.3 * torch.randn(out, 4, generator=generator)
    return (*comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 1.0), vae)


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory) -> State:
    """The patched koala-tiny's weights as core saves them."""
    path = tmp_path_factory.mktemp("core") / "core.safetensors"
    comfy.sd.save_checkpoint(str(path), *_patched())
    return load_file(path)


def _same(first: koala_loader.Loaded, second: koala_loader.Loaded) -> None:
    """The same answers but for rounding: where equal weights lie otherwise in memory, some processors' routines add up
    in another order. (That the weights are equal bit for bit is asserted of the file.)"""
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    for answer in (
        lambda loaded: predict(loaded[0]),
        lambda loaded: encode(loaded[1]),
        lambda loaded: loaded[2].decode(latent),
    ):
        torch.testing.assert_close(answer(first), answer(second), rtol=1e-4, atol=1e-4)


def test_the_lora_is_felt_in_each_part() -> None:
    """Otherwise the tests below would show nothing."""
    plain, patched = parity.tiny_models(), _patched()
    assert not torch.equal(predict(plain[0]), predict(patched[0]))
    assert not any(map(torch.equal, encode(plain[1]), encode(patched[1])))


def test_a_checkpoint_is_cores_and_loads_to_the_patched_model(baked: State, tmp_path: Path) -> None:
    koala_saver.save_checkpoint(tmp_path / "a.safetensors", *_patched())
    saved = load_file(tmp_path / "a.safetensors")
    assert saved.keys() == baked.keys()
    assert [name for name, tensor in saved.items() if not torch.equal(tensor, baked[name])] == []
    assert {name: tensor.dtype for name, tensor in saved.items()} == {k: tensor.dtype for k, tensor in baked.items()}
    _same(koala_loader.load_checkpoint(tmp_path / "a.safetensors"), _patched())
    assert [item.name for item in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_folder_loads_to_the_patched_model(tmp_path: Path) -> None:
    koala_saver.save_folder(tmp_path / "a", *_patched())
    _same(koala_loader.load_folder(tmp_path / "a"), _patched())
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_a_unet_alone_loads_in_the_stock_loader(tmp_path: Path) -> None:
    """A narrow one that core takes for SDXL's; in KOALA-700M's widths: test_saver_full_size.py."""
    source, path = random_weights.narrow_unet("koala-700m"), tmp_path / "unet.safetensors"
    model = koala_loader.load_unet(checkpoint.inspect_model(source), source.name, "fp16")
    koala_saver.save_checkpoint(path, model, None, None)
    stock = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float16})
    wanted, found = (one.model.diffusion_model.state_dict() for one in (model, stock))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("choice", ["fp16", "bf16", "fp8_e4m3fn"])
def test_weights_are_cast_after_the_patches(choice: str, baked: State, tmp_path: Path) -> None:
    koala_saver.save_checkpoint(tmp_path / "a.safetensors", *_patched(), choice)
    koala_saver.save_folder(tmp_path / "a", *_patched(), choice)
    saved = load_file(tmp_path / "a.safetensors")
    wide = WEIGHT_DTYPES[choice]
    narrow = torch.float16 if choice == "fp8_e4m3fn" else wide
    for name, tensor in baked.items():
        wanted = narrow if tensor.is_floating_point() else tensor.dtype
        if name.startswith(VAE_PREFIX):
            wanted = tensor.dtype
        elif name.startswith(UNET_PREFIX) and tensor.ndim > 1:
            wanted = wide
        assert saved[name].dtype == wanted
        assert torch.equal(saved[name].float(), tensor.to(wanted).float())
    again = koala_loader.load_checkpoint(tmp_path / "a.safetensors")
    _same(again, koala_loader.load_folder(tmp_path / "a"))
    assert torch.isfinite(predict(again[0])).all()
    assert checkpoint.inspect_model(tmp_path / "a.safetensors").unet.dtype == choice


@pytest.mark.parametrize("choice", ["default", "bf16"])
def test_weights_that_are_not_on_the_device_are_baked_alike(choice: str, baked: State) -> None:
    """Where memory is short core leaves patches for the moment of use; its stand-ins for such weights are baked as they
    are taken to the CPU. Here nothing is loaded at all."""
    model, clip, _ = _patched()
    comfy.model_management.unload_all_models()
    stand_ins = model.model_state_dict_for_saving(model.model.diffusion_model, "diffusion_model.")
    assert any(type(tensor).__name__ == "LazyCastingParam" for tensor in stand_ins.values())
    facts, types = model_facts(model), stored_dtypes(choice)
    names = renaming(facts.layout, "diffusers", "comfy")
    for name, tensor in koala_saver._unet(facts, model, types).items():
        core = baked[UNET_PREFIX + names[name]]
        expected = core.to((types.matrices if core.ndim > 1 else types.others) or core.dtype)
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)
    clip_l, clip_g = koala_saver._text(facts, clip, types.text)
    text = {CLIP_PREFIXES[0] + name: tensor for name, tensor in clip_l_for_checkpoint(clip_l).items()}
    text |= {CLIP_PREFIXES[1] + name: tensor for name, tensor in clip_g_for_checkpoint(clip_g).items()}
    wanted = {name: baked[name].to(types.others) if baked[name].is_floating_point() else baked[name] for name in text}
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in text.items())
    assert {name: tensor.dtype for name, tensor in text.items()} == {k: tensor.dtype for k, tensor in wanted.items()}


def test_whole_numbers_are_not_cast() -> None:
    """A quantised text encoder says in bytes how it is quantised."""
    told = torch.tensor([[123, 34]], dtype=torch.uint8)
    assert koala_saver._baked({"comfy_quant": told}, stored_dtypes("fp16"))["comfy_quant"].dtype == torch.uint8


@pytest.mark.parametrize("choice", ["default", "fp32", "fp16", "fp8_e4m3fn"])
@pytest.mark.parametrize(("value", "what"), [(float("nan"), "NaN"), (float("-inf"), "infinity")])
@pytest.mark.parametrize("part", ["U-Net", "text encoder", "VAE"])
def test_weights_that_are_no_numbers_are_refused(
    part: str, value: float, what: str, choice: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever type is written, and in the VAE, which keeps its own, too."""
    own = shutil.copyfile(koala_loader.BUILT_IN, tmp_path_factory.mktemp("own") / "koala.safetensors")
    model, clip, vae = koala_loader.load_checkpoint(own)
    patcher, key = {
        "U-Net": (model, "diffusion_model.out.2.weight"),
        "text encoder": (clip.patcher, "clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.bias"),
        "VAE": (vae.patcher, "decoder.conv_out.weight"),
    }[part]
    weights = torch.zeros(patcher.model.state_dict()[key].shape)
    weights[0] = value
    if part == "VAE":  # core saves a VAE as it is loaded, without patches
        patcher.model.decoder.conv_out.weight = torch.nn.Parameter(weights, requires_grad=False)
    else:
        assert list(patcher.add_patches({key: ("set", (weights,))})) == [key]
    with pytest.raises(ValueError, match=rf"{key.rsplit('.', 2)[-2]}\S* holds {what}; expected finite numbers"):
        koala_saver.save_checkpoint(tmp_path / "a", model, clip, vae, choice)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("loaded", [False, True])
def test_infinity_is_refused_where_core_would_keep_it_as_448(
    loaded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose weights are fp8 in memory is patched in fp8, by core."""
    own = shutil.copyfile(koala_loader.BUILT_IN, tmp_path / "koala.safetensors")
    model = koala_loader.load_checkpoint(own, "fp8_e4m3fn")[0]
    key = "diffusion_model.out.2.weight"
    weights = torch.zeros(model.model.state_dict()[key].shape)
    weights[0] = float("inf")
    model.add_patches({key: ("diff", (weights,))})
    if loaded:
        comfy.model_management.load_models_gpu([model])
        assert model.model.state_dict()[key].float().abs().max() == 448
    else:
        monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *_: None)
    with pytest.raises(ValueError, match=r"out\.2\.weight holds infinity"):
        koala_saver.save_checkpoint(tmp_path / "a", model, None, None)
    model.patches.clear()
    model.add_patches({key: ("diff", (torch.ones_like(weights),))})
    koala_saver.save_checkpoint(tmp_path / "a", model, None, None)


@pytest.mark.parametrize("save", [koala_saver.save_checkpoint, koala_saver.save_folder])
def test_a_value_beyond_the_types_range_is_refused(save: Any, tmp_path: Path) -> None:
    model, clip, vae = parity.tiny_models()
    model, key = model.clone(), "diffusion_model.out.2.weight"
    too_large = torch.full(model.model.state_dict()[key].shape, 1e5)
    assert list(model.add_patches({key: ("set", (too_large,))})) == [key]
    with pytest.raises(ValueError, match=r"out\.2\.weight holds the value 100000; fp16 ends at 65504\. Choose another"):
        save(tmp_path / "a", model, clip, vae, "fp16")
    assert not list(tmp_path.iterdir())


def test_patches_of_another_clone_are_not_saved(tmp_path: Path) -> None:
    """Clones share their weights, which carry the patches of the one that ran last."""
    patched = _patched()
    predict(patched[0]), encode(patched[1])
    koala_saver.save_checkpoint(tmp_path / "a.safetensors", *parity.tiny_models())
    _same(koala_loader.load_checkpoint(tmp_path / "a.safetensors"), parity.tiny_models())


def test_diffusers_draws_the_same_picture_from_the_folder(baked: State, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    model, clip, vae = _patched()
    koala_saver.save_folder(tmp_path / "a", model, clip, vae)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "a", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    names = renaming(layout.KOALA_TINY, "comfy", "diffusers")
    unet = pipeline.unet.state_dict()
    assert all(torch.equal(unet[new], baked[UNET_PREFIX + old]) for old, new in names.items())
    settings_ = {"num_inference_steps": 8, "guidance_scale": 7.5, "height": 128, "width": 128, "output_type": "latent"}
    generator = torch.Generator().manual_seed(3)
    wanted = pipeline(parity.PROMPT, negative_prompt=parity.NEGATIVE, generator=generator, **settings_).images
    conditioning = parity.KoalaPrompt.execute(clip, parity.PROMPT, parity.NEGATIVE, "no style", "reference").result
    preset = {"preset": "custom", "steps": 8, "cfg": 7.5, "spacing": "leading"}
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    positive, negative = conditioning
    made = parity.KoalaSampler.execute(model, positive, negative, latent, 3, preset, "euler", 1.0).result[0]["samples"]
    assert (made * LATENT_SCALE - wanted).abs().max() <= parity.LATENT_BOUND
    pixels = vae.decode(made).permute(0, 3, 1, 2)
    decoded = (pipeline.vae.decode(wanted / LATENT_SCALE).sample / 2 + 0.5).clamp(0, 1)
    assert (pixels - decoded).abs().max() <= 1 / 255


def _lightning(scheduler: dict[str, object]) -> Any:
    """koala-tiny's MODEL, said to be Lightning with a schedule of its own."""
    model = parity.tiny_models()[0].clone()
    identity = settings.Identity(settings.LIGHTNING, "the test says so")
    facts = replace(model_facts(model), identity=identity, scheduler=scheduler)
    model.set_attachments(ATTACHMENT, facts)
    return model


def test_variant_and_schedule_survive(tmp_path: Path) -> None:
    scheduler = {**settings.SCHEDULER_CONFIG, "steps_offset": 0}
    model, (_, clip, vae) = _lightning(scheduler), parity.tiny_models()
    koala_saver.save_checkpoint(tmp_path / "a.safetensors", model, clip, vae)
    koala_saver.save_checkpoint(tmp_path / "bare.safetensors", model, None, None)
    koala_saver.save_folder(tmp_path / "a", model, clip, vae)
    bare = koala_loader.load_unet(checkpoint.inspect_model(tmp_path / "bare.safetensors"), "bare")
    for again in (
        koala_loader.load_checkpoint(tmp_path / "a.safetensors")[0],
        koala_loader.load_folder(tmp_path / "a")[0],
        bare,
    ):
        facts = model_facts(again)
        assert (facts.identity.variant, facts.identity.certain) == (settings.LIGHTNING, True)
        assert facts.scheduler["steps_offset"] == 0


@pytest.fixture
def wide_vae(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A VAE with 16 latent channels, as Flux and Stable Diffusion 3 have."""
    from diffusers import AutoencoderKL

    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_file(
        AutoencoderKL(**{**random_weights.VAE, "block_out_channels": [32] * 4, "latent_channels": 16}).state_dict(),
        path,
    )
    return koala_loader.load_vae(VAEFile(header := read_header(path), sizes=read_autoencoder(header.shapes)))


def test_what_is_missing_or_foreign_is_named(wide_vae: Any, tmp_path: Path) -> None:
    model, clip, vae = parity.tiny_models()
    with pytest.raises(ValueError, match=r"no VAE is connected; .*Connect VAE, too, or neither of them"):
        koala_saver.save_checkpoint(tmp_path / "a", model, clip, None)
    with pytest.raises(ValueError, match="no CLIP and no VAE is connected; a diffusers folder holds"):
        koala_saver.save_folder(tmp_path / "a", model, None, None)
    with pytest.raises(ValueError, match="this MODEL is not a KOALA model"):
        koala_saver.save_checkpoint(tmp_path / "a", clip.patcher, clip, vae)
    with pytest.raises(ValueError, match=r"this VAE has 16 latent channels; expected SDXL's, with 4\. Connect the VAE"):
        koala_saver.save_checkpoint(tmp_path / "a", model, clip, wide_vae)
    assert not list(tmp_path.iterdir())


def test_text_encoders_of_another_width_are_refused(tmp_path: Path) -> None:
    _, clip, vae = parity.tiny_models()
    other = layout.Layout((32, 64, 128), ((0,), (2,), (5,)), None, ((5, 5), (2, 2), (0, 0)), context=128, added=1600)
    save_file(random_weights.unet_state(other), tmp_path / "student.safetensors")
    student = koala_loader.load_unet(checkpoint.inspect_model(tmp_path / "student.safetensors"), "student")
    with pytest.raises(ValueError, match=r"this CLIP gives text of width 96 and pooled 64; custom .* of width 128"):
        koala_saver.save_checkpoint(tmp_path / "a", student, clip, vae)
    assert [item.name for item in tmp_path.iterdir()] == ["student.safetensors"]


@pytest.fixture
def progress() -> Iterator[list[int]]:
    """Cancels the run, as the server would, when the progress bar has moved; what it showed until then."""
    shown: list[int] = []

    def cancel(value: int, *_: Any, **__: Any) -> None:
        shown.append(value)
        comfy.model_management.interrupt_current_processing()

    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(cancel)
    yield shown
    comfy.utils.set_progress_bar_global_hook(before)
    comfy.model_management.interrupt_current_processing(False)


@pytest.mark.parametrize("save", [koala_saver.save_checkpoint, koala_saver.save_folder])
def test_a_cancelled_save_leaves_nothing_behind(save: Any, progress: list[int], tmp_path: Path) -> None:
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        save(tmp_path / "a", *parity.tiny_models())
    assert progress == [1]
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for save in (koala_saver.save_checkpoint, koala_saver.save_folder):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        try:
            with pytest.raises(disk.SaveError, match=r"no space left for a: 0\.0[1-9] GB needed in"):
                save(tmp_path / "a", *parity.tiny_models())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not list(tmp_path.iterdir())


def test_an_existing_file_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"precious")
    for save in (koala_saver.save_checkpoint, koala_saver.save_folder):
        with pytest.raises(disk.SaveError, match=r"a is in .* already and was left as it is"):
            save(tmp_path / "a", *parity.tiny_models())
    assert [(item.name, item.read_bytes()) for item in tmp_path.iterdir()] == [("a", b"precious")]
