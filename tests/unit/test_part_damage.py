"""A text encoder or VAE with any damage is refused with one line that names the file, in every source and naming."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from koala_sdxl.koala.architecture.component_keys import text_tensors, vae_tensors
from koala_sdxl.koala.architecture.components import Autoencoder, TextEncoder
from koala_sdxl.koala.architecture.layout import KOALA_700M, KOALA_TINY, Layout
from koala_sdxl.koala.files.conventions import CLIP_PREFIXES, VAE_PREFIX
from koala_sdxl.koala.files.header import CheckpointError, read_header
from koala_sdxl.koala.files.inspect import (
    inspect_checkpoint,
    inspect_folder,
    inspect_text_and_vae,
    inspect_text_encoder,
    inspect_text_encoders,
    inspect_vae,
)
from tests.unit import files, reference
from tests.unit.reference import Shapes
from tests.unit.test_folder import published
from tools.tiny import SHIPPED

TINY_VAE = Autoencoder((32, 64, 96, 96), layers=1, latent_channels=4, embed=4, image_channels=3)
UNUSED = ("position_ids", "logit_scale")


def parts_of_the_built_in_model() -> tuple[Shapes, dict[str, str]]:
    header = read_header(SHIPPED)
    shapes = {name: shape for name, shape in header.shapes.items() if not name.startswith("model.diffusion_model.")}
    return shapes, {name: header.dtypes[name] for name in shapes}


BUILT_IN = parts_of_the_built_in_model()


@dataclass(frozen=True)
class Sample:
    """A whole file of one source and naming, and what judges it."""

    shapes: Shapes
    judge: Callable[[Path], object]
    dtypes: str | dict[str, str] = "F16"


def open_clip(found: Shapes) -> Shapes:
    return reference.open_clip(found)


def bare(found: Shapes) -> Shapes:
    return {name.removeprefix("text_model."): shape for name, shape in found.items()}


def whole_clip() -> Shapes:
    """CLIP-L with its image encoder, as OpenAI's model is published on Hugging Face."""
    vision = dict.fromkeys(("vision_model.embeddings.class_embedding", "visual_projection.weight"), (768, 1024))
    position = {"text_model.embeddings.position_ids": (1, 77)}
    return {**reference.clip_l(), **vision, **position, "text_projection.weight": (768, 768), "logit_scale": ()}


SAMPLES: dict[str, Sample] = {
    "checkpoint": Sample(BUILT_IN[0], inspect_text_and_vae, BUILT_IN[1]),
    "CLIP-L": Sample(reference.clip_l(32, 3), inspect_text_encoder),
    "CLIP-L, transformers 5": Sample(bare(reference.clip_l(32, 3)), inspect_text_encoder),
    "CLIP-L, open_clip": Sample(open_clip(reference.clip_l(32, 3)), inspect_text_encoder),
    "whole CLIP": Sample(whole_clip(), inspect_text_encoder),
    "CLIP-G": Sample(reference.clip_g(), inspect_text_encoder),
    "CLIP-G, transformers 5": Sample(bare(reference.clip_g()), inspect_text_encoder),
    "CLIP-G, open_clip": Sample(open_clip(reference.clip_g()), inspect_text_encoder),
    "VAE": Sample(vae_tensors(TINY_VAE, "diffusers"), inspect_vae),
    "VAE, old names": Sample(vae_tensors(TINY_VAE, "diffusers 0.17"), inspect_vae),
    "VAE, original names": Sample(vae_tensors(TINY_VAE, "original"), inspect_vae),
    "SDXL's VAE": Sample(reference.vae(), inspect_vae),
}


def unused(name: str) -> bool:
    return name.endswith(UNUSED) or "vision_model." in name or "visual_projection." in name


def damaged(sample: Sample, draw: random.Random, name: str) -> Iterator[tuple[str, Shapes, str | dict[str, str]]]:
    """Each kind of damage to one tensor: what it is, the file's shapes and types."""
    shape = sample.shapes[name]
    rest = {key: value for key, value in sample.shapes.items() if key != name}
    kinds = dict.fromkeys(sample.shapes, sample.dtypes) if isinstance(sample.dtypes, str) else sample.dtypes
    yield "dropped", rest, kinds
    for other in (f"{name}.x", name.replace(".", "_"), f"other.{name}"):
        if other != name and not unused(other):
            yield "renamed", {**rest, other: shape}, {**kinds, other: kinds[name]}
    axis = draw.randrange(max(1, len(shape)))
    more = (*shape[:axis], shape[axis] + 1, *shape[axis + 1 :]) if shape else (2,)
    for form in (more, (*shape, 2), shape[1:], tuple(size * (place != axis) for place, size in enumerate(shape))):
        if form != shape:
            yield "reshaped", {**rest, name: form}, kinds
    yield "retyped", sample.shapes, {**kinds, name: draw.choice(["I8", "U8", "BOOL", "F64", "I32"])}


def refusal(sample: Sample, path: Path) -> str:
    """What is said of a file; nothing where it is accepted."""
    try:
        sample.judge(path)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("source", SAMPLES)
def test_damage_to_a_tensor_is_refused(source: str, every: int, tmp_path: Path) -> None:
    """Every tensor of the small files, and twenty of the large ones, in each way; by day every seventh of these.

    A layer of a text encoder has sixteen tensors, so that each of these is among them in some layer.
    """
    draw, sample = random.Random(source), SAMPLES[source]
    path = tmp_path / "it.safetensors"
    sample.judge(files.write(path, sample.shapes, sample.dtypes))
    needed = [name for name in sample.shapes if not unused(name)]
    if source != "checkpoint" and len(needed) > 100:
        needed = draw.sample(needed, 20)
    elif source == "checkpoint":
        assert len(needed) == 269
    for name in needed[::every]:
        for damage, shapes, dtypes in damaged(sample, draw, name):
            said = refusal(sample, files.write(path, shapes, dtypes))
            assert said.startswith("it.safetensors"), (damage, name, said)
            assert "\n" not in said


def test_what_is_unused_may_be_absent_or_of_any_kind(tmp_path: Path) -> None:
    for source in ("checkpoint", "whole CLIP", "CLIP-G, open_clip"):
        sample = SAMPLES[source]
        kinds = dict.fromkeys(sample.shapes, sample.dtypes) if isinstance(sample.dtypes, str) else sample.dtypes
        names = [name for name in sample.shapes if unused(name)]
        assert names
        for name in names:
            rest = {key: shape for key, shape in sample.shapes.items() if key != name}
            sample.judge(files.write(tmp_path / "without.safetensors", rest, kinds))
            sample.judge(files.write(tmp_path / "int.safetensors", sample.shapes, {**kinds, name: "I32"}))


PREFIX_OF = {"text_encoder": CLIP_PREFIXES[0], "text_encoder_2": CLIP_PREFIXES[1], "vae": VAE_PREFIX}


@pytest.mark.parametrize("extra", ["scaled_fp8", "copy.weight", "decoder.conv_in.weight.absmax"])
@pytest.mark.parametrize("part", PREFIX_OF)
def test_a_tensor_too_many_is_refused(part: str, extra: str, tmp_path: Path) -> None:
    shapes, dtypes = BUILT_IN
    name = PREFIX_OF[part] + extra
    path = files.write(tmp_path / "it.safetensors", {**shapes, name: (1,)}, {**dtypes, name: "F16"})
    with pytest.raises(CheckpointError, match=r"^it\.safetensors.* (quantised|1 extra \(first: )"):
        inspect_text_and_vae(path)


@pytest.mark.parametrize("part", PREFIX_OF)
def test_a_damaged_part_of_a_folder_is_refused(part: str, tmp_path: Path) -> None:
    folder, draw = published(tmp_path / "koala", KOALA_TINY), random.Random(part)
    (path,) = (folder / part).glob("*.safetensors")
    header = read_header(path)
    sample = Sample(dict(header.shapes), lambda _: inspect_folder(folder), dict(header.dtypes))
    for name in draw.sample(sorted(sample.shapes), 8):
        for damage, shapes, dtypes in damaged(sample, draw, name):
            files.write(path, shapes, dtypes)
            said = refusal(sample, path)
            assert said.startswith(f"koala/{part}"), (damage, name, said)
            assert "\n" not in said


def test_the_first_line_counts_and_names(tmp_path: Path) -> None:
    whole, path = reference.clip_g(), tmp_path / "clip_g.safetensors"
    lost = {name: shape for name, shape in whole.items() if name != "text_projection.weight"}
    with pytest.raises(CheckpointError) as caught:
        inspect_text_encoder(files.write(path, lost))
    assert str(caught.value) == (
        "clip_g.safetensors: its CLIP-G does not match the 517 tensors that its sizes ask for: 1 missing (first: "
        "text_projection.weight). Fetch the text encoder again."
    )
    with pytest.raises(CheckpointError) as caught:
        inspect_text_encoder(files.write(path, whole, "I8"))
    assert str(caught.value).startswith(
        "clip_g.safetensors holds its CLIP-G quantised or in an unusual type (I8); expected plain weights in one of F32"
    )


@pytest.mark.parametrize(
    ("before", "says"),
    [
        ("conditioner.embedders.0.transformer.", "its CLIP-L has no layers; expected tensors under {} with"),
        ("conditioner.embedders.1.model.", "its CLIP-G has no layers; expected tensors under {} with"),
        ("first_stage_model.", "its VAE has no stages; expected tensors such as {}encoder.down.0.block.0.conv1.weight"),
    ],
)
def test_a_part_under_other_names_is_named_with_those_that_are_expected(before: str, says: str, tmp_path: Path) -> None:
    """Whatever stands in the place of a part: the message names the file, the part and the names it should have."""
    shapes, dtypes = BUILT_IN
    outer = before.removesuffix("transformer.").removesuffix("model.") if before.startswith("cond") else before
    names = {name: name.replace(before, f"{outer}net.") for name in shapes}
    path = files.write(
        tmp_path / "it.safetensors",
        {names[name]: shape for name, shape in shapes.items()},
        {names[name]: dtype for name, dtype in dtypes.items()},
    )
    with pytest.raises(CheckpointError) as caught:
        inspect_text_and_vae(path)
    assert str(caught.value).startswith(f"it.safetensors: {says.format(before)}")
    assert str(caught.value).endswith(" Fetch the file again, or choose another checkpoint.")


def test_an_encoder_that_lost_its_last_layer_is_not_a_smaller_encoder(tmp_path: Path) -> None:
    found = {name: shape for name, shape in reference.clip_l().items() if ".layers.11." not in name}
    with pytest.raises(CheckpointError, match=r"16 missing \(first: text_model\.encoder\.layers\.11\."):
        inspect_text_encoder(files.write(tmp_path / "l.safetensors", found))


@pytest.mark.parametrize(
    ("shapes", "judge", "says"),
    [
        (
            text_tensors(TextEncoder(100, 400, 3, None), "transformers"),
            inspect_text_encoder,
            "has the width 100; expected a multiple of 64",
        ),
        (reference.clip_l(32, 2), inspect_text_encoder, "has 2 layers; expected 3 or more"),
        (vae_tensors(Autoencoder((32, 64, 96), 1, 4, 4, 3), "original"), inspect_vae, "has 3 stages; expected"),
        (vae_tensors(Autoencoder((32, 48, 96, 96), 1, 4, 4, 3), "original"), inspect_vae, "a stage of 48 channels"),
        (vae_tensors(Autoencoder((32, 64, 96, 96), 1, 16, 16, 3), "original"), inspect_vae, "16 latent channels"),
    ],
    ids=["width", "layers", "stages", "channels", "latents"],
)
def test_sizes_that_no_network_has(shapes: Shapes, judge: Callable[[Path], object], says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"^odd.safetensors: its .* {says}"):
        judge(files.write(tmp_path / "odd.safetensors", shapes))


@pytest.mark.parametrize("extra", ["loss.logvar", "model_ema.decay", "model_ema.decoderconv_inweight"])
def test_a_vae_may_bring_what_it_was_trained_with(extra: str, tmp_path: Path) -> None:
    shapes = {**vae_tensors(TINY_VAE, "original"), extra: (1,)}
    inspect_vae(files.write(tmp_path / "vae.safetensors", shapes))


def test_attention_as_a_matrix_or_a_convolution(tmp_path: Path) -> None:
    for naming in ("original", "diffusers", "diffusers 0.17"):
        shapes = vae_tensors(TINY_VAE, naming)
        name = next(key for key in shapes if key.endswith((".q.weight", ".to_q.weight", ".query.weight")))
        other = shapes[name][:2] if len(shapes[name]) == 4 else (*shapes[name], 1, 1)
        inspect_vae(files.write(tmp_path / "vae.safetensors", {**shapes, name: other}))
        with pytest.raises(CheckpointError, match="1 misshapen"):
            inspect_vae(files.write(tmp_path / "vae.safetensors", {**shapes, name: (*shapes[name][:2], 3, 3)}))


# Widths


def test_a_checkpoints_encoders_are_compared_with_its_unet(tmp_path: Path) -> None:
    """The built-in model's text encoders beside a U-Net that takes SDXL's text."""
    shapes, dtypes = BUILT_IN
    unet = files.unet(KOALA_700M, "comfy", "model.diffusion_model.")
    path = files.write(tmp_path / "it.safetensors", {**unet, **shapes}, {**dict.fromkeys(unet, "F16"), **dtypes})
    wanted = (
        r"^it\.safetensors: the text encoders give text of width 96 and pooled 64; KOALA-700M expects 2048 and 1280"
    )
    with pytest.raises(CheckpointError, match=wanted):
        inspect_checkpoint(path)
    with pytest.raises(CheckpointError, match=wanted):
        inspect_text_and_vae(path, KOALA_700M)
    inspect_text_and_vae(path, KOALA_TINY)
    inspect_text_and_vae(path)


@pytest.mark.parametrize("layout", [KOALA_TINY, KOALA_700M], ids=["tiny", "700M"])
def test_encoders_in_any_order(layout: Layout, tmp_path: Path) -> None:
    """A small CLIP-L with a projection, as ComfyUI saves it, looks like a CLIP-G: the U-Net's widths tell."""
    sizes = ((32, 3), (64, 3)) if layout == KOALA_TINY else ((), ())
    clip_l = reference.clip_l(*sizes[0])
    width = clip_l["text_model.final_layer_norm.weight"][0]
    first = files.write(tmp_path / "l.safetensors", {**clip_l, "text_projection.weight": (width, width)})
    second = files.write(tmp_path / "g.safetensors", reference.clip_g(*sizes[1]))
    for pair in ((first, second), (second, first)):
        assert [file.path for file in inspect_text_encoders(*pair, layout)] == [first, second]
    with pytest.raises(CheckpointError, match=r"l\.safetensors and l\.safetensors are both CLIP-|text of width"):
        inspect_text_encoders(first, first, layout)
