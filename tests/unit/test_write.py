"""What is written from plain tensors: koala-tiny again, tensor by tensor, as one file and as a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from koala_sdxl.koala.architecture.component_detection import read_autoencoder
from koala_sdxl.koala.architecture.keys import renaming, shapes_of
from koala_sdxl.koala.architecture.layout import KOALA_700M, KOALA_TINY
from koala_sdxl.koala.files import convert, export
from koala_sdxl.koala.files.conventions import CLIP_PREFIXES, UNET_PREFIX, VAE_PREFIX
from koala_sdxl.koala.files.convert import State
from koala_sdxl.koala.files.inspect import inspect_checkpoint, inspect_folder, inspect_model
from koala_sdxl.koala.files.write import TextAndVAE, cast, cast_state, stored_dtypes, write_checkpoint, write_folder
from koala_sdxl.koala.model_info import ModelFacts, assumed_facts
from tools.tiny import SHIPPED

VOCABULARY = dict.fromkeys(export.TOKENIZER_FILES, b"{}")


@pytest.fixture(scope="module")
def shipped() -> State:
    return load_file(SHIPPED)


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    return inspect_model(SHIPPED).facts("koala-tiny")


@pytest.fixture(scope="module")
def unet(shipped: State) -> State:
    names = renaming(KOALA_TINY, "comfy", "diffusers")
    return {names[key]: tensor for key, tensor in _under(shipped, UNET_PREFIX).items()}


@pytest.fixture(scope="module")
def text_and_vae(shipped: State) -> TextAndVAE:
    original = _under(shipped, VAE_PREFIX)
    stages = len(read_autoencoder(shapes_of(original)).channels)
    return TextAndVAE(
        _under(shipped, f"{CLIP_PREFIXES[0]}transformer."),
        _transformers_clip_g(_under(shipped, f"{CLIP_PREFIXES[1]}model.")),
        convert.diffusers_vae(original, stages),
    )


def _under(state: State, prefix: str) -> State:
    return {key[len(prefix) :]: tensor for key, tensor in state.items() if key.startswith(prefix)}


def _transformers_clip_g(open_clip: State) -> State:
    """By transformers' names, through diffusers' own converter."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    width = open_clip["ln_final.weight"].shape[0]
    layers = len({key.split(".")[2] for key in open_clip if key.startswith("transformer.resblocks.")})
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    with torch.device("meta"):
        model = CLIPTextModelWithProjection(CLIPTextConfig(**sizes, num_attention_heads=1, projection_dim=width))
    found = convert_open_clip_checkpoint(model, dict(open_clip), prefix="")
    return {**found, "logit_scale": open_clip["logit_scale"]}


def test_koala_tiny_is_written_as_it_is(
    shipped: State, facts: ModelFacts, unet: State, text_and_vae: TextAndVAE, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "a.safetensors", facts, unet, text_and_vae, {"author": "someone"})
    written = load_file(tmp_path / "a.safetensors")
    assert written.keys() == shipped.keys()
    assert {key: tensor.dtype for key, tensor in written.items()} == {k: tensor.dtype for k, tensor in shipped.items()}
    assert [key for key, tensor in written.items() if not torch.equal(tensor, shipped[key])] == []
    again = inspect_checkpoint(tmp_path / "a.safetensors").model
    assert (again.identity.variant, again.kept_transformers) == (facts.identity.variant, facts.kept_transformers)
    assert again.unet.metadata["author"] == "someone"


def test_a_unet_alone(shipped: State, facts: ModelFacts, unet: State, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.safetensors", facts, unet, None)
    assert load_file(tmp_path / "a.safetensors").keys() == {key for key in shipped if key.startswith(UNET_PREFIX)}


def test_a_folder(facts: ModelFacts, unet: State, text_and_vae: TextAndVAE, tmp_path: Path) -> None:
    write_folder(tmp_path / "a", facts, unet, text_and_vae, VOCABULARY, {"author": "someone"})
    found = inspect_folder(tmp_path / "a")
    assert found.model.unet.layout == KOALA_TINY
    assert found.model.unet.metadata["author"] == "someone"
    assert {key: tensor.shape for key, tensor in load_file(found.vae.path).items()} == {
        key: tensor.shape for key, tensor in text_and_vae.vae.items()
    }
    assert "logit_scale" not in load_file(found.text_encoder_2.path)
    index = json.loads((tmp_path / "a" / "model_index.json").read_text())
    assert all((tmp_path / "a" / part).is_dir() for part, kind in index.items() if isinstance(kind, list))


def test_names_of_either_transformers_give_the_same_file(
    facts: ModelFacts, unet: State, text_and_vae: TextAndVAE, tmp_path: Path
) -> None:
    first, second = (
        {key.removeprefix("text_model."): tensor for key, tensor in part.items()} for part in text_and_vae[:2]
    )
    write_checkpoint(tmp_path / "4.safetensors", facts, unet, text_and_vae)
    write_checkpoint(tmp_path / "5.safetensors", facts, unet, TextAndVAE(first, second, text_and_vae.vae))
    with safe_open(tmp_path / "4.safetensors", "pt") as four, safe_open(tmp_path / "5.safetensors", "pt") as five:
        assert set(four.keys()) == set(five.keys())


def test_a_clip_g_without_a_temperature_gets_clips_own(text_and_vae: TextAndVAE) -> None:
    encoder = {key: tensor for key, tensor in text_and_vae.text_encoder_2.items() if key != "logit_scale"}
    assert float(convert.clip_g_for_checkpoint(encoder)["model.logit_scale"]) == pytest.approx(4.6055, abs=2e-3)


def test_vae_names_go_both_ways(shipped: State) -> None:
    original = _under(shipped, VAE_PREFIX)
    back = convert.original_vae(convert.diffusers_vae(original, 4), 4)
    assert shapes_of(back) == shapes_of(original)
    assert all(torch.equal(tensor, original[key]) for key, tensor in back.items())


def test_fp8_is_for_matrices_alone(unet: State, text_and_vae: TextAndVAE) -> None:
    dtypes = stored_dtypes("fp8_e4m3fn")
    for key, tensor in cast_state(unet, dtypes).items():
        assert tensor.dtype == (torch.float8_e4m3fn if tensor.ndim > 1 else torch.float16), key
    assert {tensor.dtype for tensor in cast_state(text_and_vae.text_encoder, dtypes.text).values()} <= {
        torch.float16,
        torch.int64,
    }
    same = cast_state(unet, stored_dtypes("default"))
    assert all(tensor is unet[key] for key, tensor in same.items())


def test_what_does_not_fit_is_refused_and_nothing_written(
    facts: ModelFacts, unet: State, text_and_vae: TextAndVAE, tmp_path: Path
) -> None:
    target = tmp_path / "a.safetensors"
    fewer = {key: tensor for key, tensor in unet.items() if key != "conv_in.bias"}
    with pytest.raises(
        ValueError, match=r"^this U-Net does not match the koala-tiny layout: 1 tensors differ \(first: c"
    ):
        write_checkpoint(target, facts, fewer, text_and_vae)
    with pytest.raises(ValueError, match="does not match the KOALA-700M layout"):
        write_folder(target, assumed_facts(KOALA_700M, "fp16", 0), unet, text_and_vae, VOCABULARY)
    query = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    half = {key: tensor for key, tensor in text_and_vae.text_encoder_2.items() if not key.endswith(query[10:])}
    with pytest.raises(ValueError, match=r"^text_encoder_2 lacks .*q_proj\.weight; expected a complete CLIP"):
        write_checkpoint(target, facts, unet, text_and_vae._replace(text_encoder_2=half))
    flat = {key: tensor for key, tensor in text_and_vae.text_encoder_2.items() if key != "text_projection.weight"}
    with pytest.raises(ValueError, match=r"^text_encoder_2 lacks text_projection\.weight; expected a complete CLIP"):
        write_checkpoint(target, facts, unet, text_and_vae._replace(text_encoder_2=flat))
    with pytest.raises(ValueError, match=r"^the VAE lacks encoder"):
        write_folder(target, facts, unet, text_and_vae._replace(vae={}), VOCABULARY)
    assert not list(tmp_path.iterdir())


NARROW = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float32]


@pytest.mark.parametrize("stored", [torch.float64, *NARROW], ids=str)
@pytest.mark.parametrize("choice", ["default", "fp32", "fp16", "bf16", "fp8_e4m3fn"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_what_is_not_finite_is_refused_in_every_type(stored: torch.dtype, choice: str, value: float) -> None:
    """Also where nothing is converted, and where the conversion would make a number of it."""
    if stored == torch.float8_e4m3fn and value == value:
        value = float("nan")  # it has no infinity
    weights = torch.ones(3, 4, dtype=torch.float32)
    weights[1, 2] = value
    what = "NaN" if value != value else "infinity"
    bits = weights.to(stored)
    if stored == torch.float8_e4m3fn:
        bits.view(torch.uint8)[1, 2] = 0x7F
    with pytest.raises(ValueError, match=rf"^mid\.weight holds {what}; expected finite numbers\. .* lower it, or load"):
        cast("mid.weight", bits, stored_dtypes(choice))
    with pytest.raises(ValueError, match=rf"^mid\.bias holds {what}"):
        cast("mid.bias", bits[1], stored_dtypes(choice))


@pytest.mark.parametrize(
    ("stored", "choice", "value"),
    [
        (torch.float32, "fp8_e4m3fn", 449.0),
        (torch.float32, "fp16", -65505.0),
        (torch.bfloat16, "fp16", 1e5),
        (torch.float64, "fp32", 1e300),
        (torch.float64, "bf16", 1e39),
    ],
)
def test_what_is_beyond_the_type_is_refused(stored: torch.dtype, choice: str, value: float) -> None:
    with pytest.raises(ValueError, match=r"^w holds the value \S+; \S+ ends at \S+ Choose another weight_dtype\.$"):
        cast("w", torch.full((2, 2), value, dtype=stored), stored_dtypes(choice))


@pytest.mark.parametrize("dtype", [torch.float64, *NARROW], ids=str)
def test_the_largest_number_of_a_type_is_written(dtype: torch.dtype) -> None:
    weights = torch.full((2, 2), torch.finfo(dtype).max, dtype=dtype)
    assert cast("w", weights, stored_dtypes("default")) is weights
    assert cast("w", torch.empty(0, 2, dtype=dtype), stored_dtypes("fp16")).dtype == torch.float16
