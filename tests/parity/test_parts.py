"""Text encoders and VAE from every form of their files are the same networks; what does not fill one is an error."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.long_clipl
import pytest
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy_extras.nodes_model_merging import CLIPSave, VAESave
from safetensors.torch import load_file, save_file

from koala_sdxl import koala_loader
from koala_sdxl.host import saver
from koala_sdxl.koala.architecture.component_keys import old_vae_name
from koala_sdxl.koala.architecture.components import CLIP_G, CLIP_L, SDXL_VAE
from koala_sdxl.koala.architecture.keys import Shape
from koala_sdxl.koala.architecture.layout import KOALA_TINY, SDXL
from koala_sdxl.koala.files import convert
from koala_sdxl.koala.files.conventions import CLIP_PREFIXES, VAE_PREFIX
from koala_sdxl.koala.files.header import CheckpointError
from koala_sdxl.koala.files.inspect import (
    inspect_checkpoint,
    inspect_text_and_vae,
    inspect_text_encoder,
    inspect_text_encoders,
    inspect_vae,
)
from koala_sdxl.nodes.load import load_parts
from tests.unit import files
from tools.measure import parity

State = dict[str, torch.Tensor]
POSITIONS = "text_model.embeddings.position_embedding.weight"


def under(prefix: str) -> State:
    """Tensors of the built-in model, the prefix taken off."""
    state = load_file(koala_loader.BUILT_IN)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def encoders() -> tuple[State, State]:
    """Text encoders of the built-in model under transformers' names, and with projections of both."""
    clip = parity.tiny_models()[1]
    state = {name: tensor.clone() for name, tensor in clip.cond_stage_model.state_dict().items()}
    first, second = (
        {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        for prefix in ("clip_l.transformer.", "clip_g.transformer.")
    )
    return first, second


def original() -> State:
    return under(VAE_PREFIX)


def bare(state: State) -> State:
    return {name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def open_clip(state: State) -> State:
    return {name.removeprefix("model."): tensor for name, tensor in convert.clip_g_for_checkpoint(state).items()}


def transposed(state: State) -> State:
    """As ComfyUI's node CLIPSave wrote them in its first years."""
    rest = {name: tensor for name, tensor in state.items() if name != "text_projection.weight"}
    return {**rest, "text_projection": state["text_projection.weight"].T.contiguous()}


def with_more(state: State) -> State:
    """With all that other tools leave in a text encoder's file."""
    more = {"vision_model.post_layernorm.weight": torch.ones(8), "visual_projection.weight": torch.ones(8, 8)}
    position_ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    return {**state, **more, **position_ids, "logit_scale": torch.tensor(4.6)}


def without_projection(state: State) -> State:
    wide = state["text_model.final_layer_norm.weight"].shape[0] == 64
    return {name: tensor for name, tensor in state.items() if wide or name != "text_projection.weight"}


NAMINGS: dict[str, Callable[[State], State]] = {
    "transformers 4": dict,
    "transformers 5": bare,
    "open_clip": open_clip,
    "old CLIPSave": transposed,
    "with more": with_more,
    "published": without_projection,
}


def diffusers() -> State:
    return convert.diffusers_vae(original(), 4)


VAES: dict[str, Callable[[], State]] = {
    "original": original,
    "diffusers": diffusers,
    "diffusers 0.17": lambda: {old_vae_name(name): tensor for name, tensor in diffusers().items()},
    "original, matrices": lambda: {
        name: tensor[..., 0, 0].contiguous() if ".attn_1." in name and tensor.ndim == 4 else tensor
        for name, tensor in original().items()
    },
    "diffusers, convolutions": lambda: {
        name: tensor[..., None, None] if ".attentions.0." in name and tensor.ndim == 2 else tensor
        for name, tensor in diffusers().items()
    },
    "with its training": lambda: {**original(), "loss.logvar": torch.ones(1), "model_ema.decay": torch.ones(1)},
}


def networks(clip: Any, vae: Any) -> State:
    named = {"clip": clip.cond_stage_model, "vae": vae.first_stage_model}
    return {f"{part}.{name}": tensor for part, net in named.items() for name, tensor in net.state_dict().items()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("naming", "vae"), [*((name, "original") for name in NAMINGS), *(("published", v) for v in VAES)]
)
def test_every_naming_gives_the_same_networks(
    naming: str, vae: str, streams: bool, encoders: tuple[State, State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (tmp_path / f"{part}.safetensors" for part in ("l", "g", "vae"))
    for path, state in ((first, encoders[0]), (second, encoders[1])):
        save_file({name: tensor.contiguous() for name, tensor in NAMINGS[naming](state).items()}, path)
    save_file(VAES[vae](), third)
    wanted = networks(*parity.tiny_models()[1:])
    if streams:
        monkeypatch.setattr(koala_loader, "streamed", lambda: True)
    assert same(networks(*load_parts(KOALA_TINY, second, first, third)), wanted)


def test_what_cores_nodes_save_is_loaded(tmp_path: Path) -> None:
    model, clip, vae = parity.tiny_models()
    for node, thing in ((CLIPSave(), clip), (VAESave(), vae)):
        node.output_dir = str(tmp_path)
        node.save(thing, "saved")
    files = {path.name.removeprefix("saved_")[:6]: path for path in tmp_path.glob("*.safetensors")}
    assert sorted(files) == ["00001_", "clip_g", "clip_l"]
    assert same(
        networks(*load_parts(KOALA_TINY, files["clip_l"], files["clip_g"], files["00001_"])), networks(clip, vae)
    )
    comfy.sd.save_checkpoint(str(tmp_path / "whole.safetensors"), model, clip, vae)
    assert same(networks(*koala_loader.load_checkpoint(tmp_path / "whole.safetensors")[1:]), networks(clip, vae))


def _named(prefix: str, state: Mapping[str, torch.Tensor]) -> dict[str, Shape]:
    return {prefix + name: tuple(tensor.shape) for name, tensor in state.items()}


def test_sdxl_as_core_builds_and_saves_it_is_whole(tmp_path: Path) -> None:
    """At true size, names and shapes alone; with what published checkpoints hold besides."""
    clip = comfy.sdxl_clip.SDXLClipModel(device="meta", dtype=torch.float16).state_dict()
    saved = comfy.supported_models.SDXL(koala_loader.unet_config(SDXL)).process_clip_state_dict_for_saving(dict(clip))
    ddconfig = {
        **{"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128},
        **{"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0},
    }
    with torch.device("meta"):
        vae = AutoencoderKL(ddconfig=ddconfig, embed_dim=4).state_dict()
    shapes: dict[str, Shape] = {**_named("", saved), **_named("first_stage_model.", vae)}
    more: dict[str, Shape] = {
        "denoiser.sigmas": (1000,),
        "conditioner.embedders.0.logit_scale": (),
        "conditioner.embedders.0.text_projection.weight": (768, 768),
        "conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids": (1, 77),
    }
    for found in (shapes, shapes | more):
        first, second, third = inspect_text_and_vae(files.write(tmp_path / "sd_xl_base_1.0.safetensors", found), SDXL)
        assert (first.sizes, second.sizes, third.sizes) == (CLIP_L, CLIP_G, SDXL_VAE)
    alone = {name.removeprefix("clip_g.transformer."): t for name, t in clip.items() if name.startswith("clip_g.tr")}
    assert inspect_text_encoder(files.write(tmp_path / "g.safetensors", _named("", alone))).sizes == CLIP_G
    assert inspect_vae(files.write(tmp_path / "sdxl_vae.safetensors", _named("", vae))).sizes == SDXL_VAE


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16], ids=str)
def test_types_are_converted_as_core_converts_them(
    dtype: torch.dtype, encoders: tuple[State, State], tmp_path: Path
) -> None:
    stored = [{name: tensor.to(dtype).contiguous() for name, tensor in state.items()} for state in encoders]
    paths = [tmp_path / "l.safetensors", tmp_path / "g.safetensors"]
    for state, path in zip(stored, paths, strict=True):
        save_file(state, path)
    found = inspect_text_encoders(paths[0], paths[1], KOALA_TINY)
    ours = koala_loader.load_clip(*found).cond_stage_model.state_dict()
    theirs = _cores_clip(stored, {}, {}).cond_stage_model.state_dict()
    assert {tensor.dtype for name, tensor in ours.items() if "logit" not in name} == {torch.float16}
    assert same(ours, theirs)


def _cores_clip(states: list[State], sizes: dict[str, dict[str, int]], tokenizer: dict[str, int]) -> Any:
    """Core's CLIP, filled by core, of the built-in model's sizes; ``sizes`` and ``tokenizer`` as core's own."""
    state = {f"{part}.transformer.{name}": t for part, s in zip(PARTS, states, strict=True) for name, t in s.items()}
    narrow = {"clip_l_model_config": (32, 128), "clip_g_model_config": (64, 256)}
    config = {
        key: {
            **{"hidden_size": width, "intermediate_size": inner, "num_attention_heads": 1, "num_hidden_layers": 3},
            **sizes.get(key, {}),
        }
        for key, (width, inner) in narrow.items()
    }
    target = comfy.supported_models_base.ClipTarget(comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel)
    return comfy.sd.CLIP(target, tokenizer_data=tokenizer, state_dict=state, model_options=config)


PARTS = ("clip_l", "clip_g")


@pytest.mark.parametrize("prompt", ["a red circle", " ".join(f"(circle {n}:1.{n % 10})" for n in range(60))])
def test_long_clip_is_loaded_as_core_loads_it(prompt: str, encoders: tuple[State, State], tmp_path: Path) -> None:
    """CLIP-L with 248 positions: the sizes and the tokenizer's length are those that core's own function gives."""
    long = {**encoders[0], POSITIONS: torch.randn(248, 32, generator=torch.Generator().manual_seed(0)).half()}
    paths = [tmp_path / "l.safetensors", tmp_path / "g.safetensors"]
    for state, path in zip((long, encoders[1]), paths, strict=True):
        save_file(state, path)
    ours = koala_loader.load_clip(*inspect_text_encoders(paths[0], paths[1], KOALA_TINY))
    tokenizer, sizes = comfy.text_encoders.long_clipl.model_options_long_clip(long, {}, {})
    theirs = _cores_clip([long, encoders[1]], sizes, tokenizer)
    assert len(ours.tokenize(prompt)["l"][0]) == 248
    (text, rest), *_ = ours.encode_from_tokens_scheduled(ours.tokenize(prompt))
    (wanted, pooled), *_ = theirs.encode_from_tokens_scheduled(theirs.tokenize(prompt))
    assert torch.equal(text, wanted)
    assert torch.equal(rest["pooled_output"], pooled["pooled_output"])


@pytest.mark.parametrize("prompt", ["a red circle", "circle " * 200])
def test_the_reference_mode_takes_long_clips_first_77_positions(
    prompt: str, encoders: tuple[State, State], tmp_path: Path
) -> None:
    """diffusers gives it 77 tokens, as it gives any CLIP-L."""
    long = torch.randn(248, 32, generator=torch.Generator().manual_seed(0)).half()
    path, found = tmp_path / "g.safetensors", []
    save_file(encoders[1], path)
    for name, positions in (("long", long), ("short", long[:77].contiguous())):
        save_file({**encoders[0], POSITIONS: positions}, tmp_path / f"{name}.safetensors")
        clip = koala_loader.load_clip(*inspect_text_encoders(tmp_path / f"{name}.safetensors", path, KOALA_TINY))
        found.append(parity.KoalaPrompt.execute(clip, prompt, "", "no style", "reference").result[0][0])
    (text, rest), (wanted, pooled) = found
    assert text.shape == wanted.shape == (1, 77, 96)
    assert torch.allclose(text, wanted, atol=1e-5)
    assert torch.equal(rest["pooled_output"], pooled["pooled_output"])


def test_long_clip_is_saved_with_its_positions(encoders: tuple[State, State], tmp_path: Path) -> None:
    paths = [tmp_path / "l.safetensors", tmp_path / "g.safetensors"]
    long = {**encoders[0], POSITIONS: torch.randn(248, 32).half()}
    for state, path in zip((long, encoders[1]), paths, strict=True):
        save_file(state, path)
    model, _, vae = parity.tiny_models()
    clip = koala_loader.load_clip(*inspect_text_encoders(paths[0], paths[1], KOALA_TINY))
    saver.save_checkpoint(tmp_path / "whole.safetensors", model, clip, vae)
    saver.save_folder(tmp_path / "folder", model, clip, vae)
    for again in (
        koala_loader.load_checkpoint(tmp_path / "whole.safetensors"),
        koala_loader.load_folder(tmp_path / "folder"),
    ):
        assert same(networks(*again[1:]), networks(clip, vae))
    config = json.loads((tmp_path / "folder" / "text_encoder" / "config.json").read_text())
    assert config["max_position_embeddings"] == 248
    ids = load_file(tmp_path / "whole.safetensors")[f"{CLIP_PREFIXES[0]}transformer.text_model.embeddings.position_ids"]
    assert ids.shape == (1, 248)


# Never lenient


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("harm", ["drop", "add", "reshape"])
def test_a_network_is_filled_completely_or_not_at_all(
    harm: str, streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(koala_loader, "streamed", lambda: streams)
    model = parity.tiny_models()[0]
    network = model.model.diffusion_model
    weights = dict(network.state_dict())
    name = "input_blocks.0.0.bias"
    if harm == "drop":
        del weights[name]
    elif harm == "add":
        weights["spare"] = torch.ones(1)
    else:
        weights[name] = torch.ones(7)
    with pytest.raises(
        CheckpointError, match=r"^it\.safetensors does not fill the network .* 1 (missing|extra|misshapen)"
    ):
        koala_loader._fill(network, weights, model, "it.safetensors")


@pytest.mark.parametrize("streams", [False, True])
def test_a_host_that_builds_another_network_is_noticed(streams: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(koala_loader, "streamed", lambda: streams)
    found = inspect_checkpoint(koala_loader.BUILT_IN)
    says = r"^koala-tiny\.safetensors does not fill the network that this ComfyUI builds for it: "
    deeper = replace(found.text_encoder, sizes=replace(found.text_encoder.sizes, layers=4))
    with pytest.raises(CheckpointError, match=says + "16 missing"):
        koala_loader._clip(deeper, found.text_encoder_2)
    taller = replace(found.vae, sizes=replace(found.vae.sizes, layers=2))
    with pytest.raises(CheckpointError, match=says):
        koala_loader._vae(taller)


def test_no_weight_is_left_to_chance(encoders: tuple[State, State]) -> None:
    """CLIP-L comes without a projection and the host's network has one: the identity, each time."""
    for _ in range(2):
        clip = koala_loader._clip(*_tiny_encoders())
        assert torch.equal(clip.cond_stage_model.clip_l.transformer.text_projection.weight, torch.eye(32).half())
        assert all(torch.isfinite(tensor).all() for tensor in clip.cond_stage_model.state_dict().values())


def _tiny_encoders() -> tuple[Any, Any]:
    found = inspect_checkpoint(koala_loader.BUILT_IN)
    return found.text_encoder, found.text_encoder_2


def test_a_checkpoint_without_clip_gs_projection_is_refused(tmp_path: Path) -> None:
    state = load_file(koala_loader.BUILT_IN)
    del state[f"{CLIP_PREFIXES[1]}model.text_projection"]
    save_file(state, tmp_path / "lost.safetensors")
    says = r"^lost\.safetensors: its CLIP-G .*: 1 missing \(first: conditioner\.embedders\.1\.model\.text_projection\)"
    for load in (koala_loader.load_checkpoint, koala_loader.load_checkpoint_parts):
        with pytest.raises(CheckpointError, match=says):
            load(tmp_path / "lost.safetensors")


def test_checkpoints_of_comfyuis_first_years(tmp_path: Path) -> None:
    """They hold CLIP-L's projection and temperature beside the network."""
    state = load_file(koala_loader.BUILT_IN)
    state[f"{CLIP_PREFIXES[0]}text_projection"] = torch.ones(32, 32)
    state[f"{CLIP_PREFIXES[0]}logit_scale"] = torch.tensor(4.6)
    save_file(state, tmp_path / "old.safetensors")
    clip, vae = koala_loader.load_checkpoint_parts(tmp_path / "old.safetensors")
    assert same(networks(clip, vae), networks(*parity.tiny_models()[1:]))


def test_a_vae_alone_needs_no_more_than_its_file(tmp_path: Path) -> None:
    save_file(diffusers(), tmp_path / "vae.safetensors")
    vae = koala_loader.load_vae(inspect_vae(tmp_path / "vae.safetensors"))
    assert vae.decode(torch.zeros(1, 4, 4, 4)).shape == (1, 32, 32, 3)


@pytest.mark.parametrize("stored", ["F4", "C64", "U16", "F8_E8M0"])
def test_what_is_unused_may_have_any_type(stored: str, tmp_path: Path) -> None:
    """What a network does not need is not read: an image encoder beside a text encoder is larger than that."""
    places = (CLIP_PREFIXES[0] + "logit_scale", CLIP_PREFIXES[1] + "model.logit_scale", VAE_PREFIX + "model_ema.decay")
    unused = {name: torch.zeros(16, dtype=torch.uint8) for name in places}
    path = tmp_path / "checkpoint.safetensors"
    save_file(load_file(koala_loader.BUILT_IN) | unused, path)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    count = {"F4": 32, "C64": 2, "U16": 8, "F8_E8M0": 16}[stored]
    for name in places:
        table[name] |= {"dtype": stored, "shape": [count]}
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    clip, vae = koala_loader.load_checkpoint_parts(path)
    built_in = parity.tiny_models()
    for found, wanted in (
        (clip.cond_stage_model, built_in[1].cond_stage_model),
        (vae.first_stage_model, built_in[2].first_stage_model),
    ):
        state = wanted.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())
