"""Good files: recognised in every published form, whatever the numbering, the prefix and the type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from koala_sdxl.koala.architecture.keys import NUMBERINGS, Numbering, parameters
from koala_sdxl.koala.architecture.layout import (
    KOALA_1_7B,
    KOALA_1B,
    KOALA_700M,
    KOALA_NAMES,
    KOALA_TINY,
    Layout,
    compact,
    name,
)
from koala_sdxl.koala.files.header import CheckpointError, read_header
from koala_sdxl.koala.files.inspect import (
    inspect_checkpoint,
    inspect_model,
    inspect_text_and_vae,
    inspect_text_encoder,
    inspect_unet,
    inspect_vae,
    require_text_width,
)
from koala_sdxl.koala.releases import BASE, LIGHTNING
from tests.unit import bad_files, files, others, reference
from tools.tiny import SHIPPED

DTYPES = [("F32", "fp32", 4), ("F16", "fp16", 2), ("BF16", "bf16", 2), ("F8_E4M3", "fp8_e4m3fn", 1)]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("numbering", NUMBERINGS)
@pytest.mark.parametrize("layout", KOALA_NAMES, ids=name)
def test_every_layout_numbering_and_prefix(tmp_path: Path, layout: Layout, numbering: Numbering, prefix: str) -> None:
    found = inspect_unet(files.write(tmp_path / "unet.safetensors", files.unet(layout, numbering, prefix)))
    assert (found.layout, found.numbering, found.prefix) == (layout, numbering, prefix)
    assert found.bytes == 2 * parameters(layout)


@pytest.mark.parametrize(("stored", "called", "width"), DTYPES)
def test_every_type(tmp_path: Path, stored: str, called: str, width: int) -> None:
    found = inspect_unet(files.write(tmp_path / "unet.safetensors", files.unet(KOALA_700M), stored))
    assert (found.dtype, found.bytes) == (called, width * 782_822_724)


def test_the_type_is_that_of_most_weights(tmp_path: Path) -> None:
    """fp8 files often keep norms and biases in 16 bits."""
    shapes = files.unet(KOALA_TINY)
    types = {key: "F8_E4M3" if len(shape) > 1 else "F16" for key, shape in shapes.items()}
    found = inspect_unet(files.write(tmp_path / "mixed.safetensors", shapes, types))
    small = sum(shape[0] for shape in shapes.values() if len(shape) == 1)
    assert (found.dtype, found.bytes) == ("fp8_e4m3fn", parameters(KOALA_TINY) + small)


@pytest.mark.parametrize("layout", [compact(4, middle=False), compact(1, middle=True)], ids=name)
def test_a_cut_of_sdxl_that_nobody_has_published(tmp_path: Path, layout: Layout) -> None:
    path = files.write(tmp_path / "mine.safetensors", files.unet(layout, "comfy"))
    assert inspect_unet(path).layout == layout


@pytest.mark.parametrize("numbering", ["comfy", "script"])
def test_a_checkpoint_in_one_file(tmp_path: Path, numbering: Numbering) -> None:
    path = files.write(tmp_path / "koala-1b.safetensors", others.checkpoint(KOALA_1B, numbering))
    model = inspect_checkpoint(path).model
    assert (model.unet.layout, model.unet.numbering) == (KOALA_1B, numbering)
    assert model.unet.bytes == 2 * parameters(KOALA_1B)  # the U-Net alone
    assert (model.identity.variant, model.identity.certain) == (BASE, True)


def test_the_built_in_model() -> None:
    model = inspect_checkpoint(SHIPPED).model
    assert (model.unet.layout, model.identity.variant, model.identity.certain) == (KOALA_TINY, BASE, True)
    assert SHIPPED.stat().st_size <= 32e6


def test_parts_may_come_from_any_sdxl_checkpoint(tmp_path: Path) -> None:
    bad = bad_files.BAD["sdxl-checkpoint"]
    bad.make(tmp_path / "sdxl.safetensors")
    inspect_text_and_vae(tmp_path / "sdxl.safetensors")


@pytest.mark.parametrize(
    ("file", "metadata", "variant", "certain", "evidence"),
    [
        ("koala-700m.safetensors", {}, BASE, True, "The name"),
        ("my-koala-1b-llava-cap-fp16.safetensors", {}, BASE, True, "The name"),
        ("koala_lightning.safetensors", {}, LIGHTNING, True, "The name"),
        ("unet.safetensors", {}, BASE, False, "Nothing in the file tells"),
        ("unet.safetensors", {"koala.variant": "lightning"}, LIGHTNING, True, "metadata"),
        ("koala-lightning-700m.safetensors", {"koala.variant": "base"}, BASE, True, "metadata"),
        ("unet.safetensors", {"koala.variant": "nonsense", "format": "pt"}, BASE, False, "Nothing in the file tells"),
        ("koala-lightning-1b/unet/diffusion_pytorch_model.safetensors", {}, LIGHTNING, True, "koala-lightning-1b"),
    ],
)
def test_variant(
    tmp_path: Path, file: str, metadata: dict[str, str], variant: object, certain: bool, evidence: str
) -> None:
    path = files.write(tmp_path / file, files.unet(KOALA_TINY), metadata=metadata)
    identity = inspect_model(path).identity
    assert (identity.variant, identity.certain) == (variant, certain)
    assert evidence in identity.evidence


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (lambda: reference.clip_l(), "l"),
        (lambda: {**reference.clip_l(), "text_projection.weight": (768, 768)}, "l"),
        (lambda: reference.clip_l(32, 3), "l"),
        (lambda: reference.clip_g(), "g"),
        (lambda: reference.clip_g(64, 3), "g"),
    ],
)
@pytest.mark.parametrize("drop", ["", "text_model."])
def test_text_encoders_are_told_apart(
    tmp_path: Path, build: Callable[[], reference.Shapes], kind: str, drop: str
) -> None:
    shapes = {key.removeprefix(drop): shape for key, shape in build().items()}
    assert inspect_text_encoder(files.write(tmp_path / "encoder.safetensors", shapes)).kind == kind


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [(KOALA_700M, ((), ())), (KOALA_1_7B, ((), ())), (KOALA_TINY, ((32, 3), (64, 3)))],
    ids=["700M", "1.7B", "tiny"],
)
def test_text_encoders_that_fit(tmp_path: Path, layout: Layout, sizes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    clip_l = inspect_text_encoder(files.write(tmp_path / "l.safetensors", reference.clip_l(*sizes[0])))
    clip_g = inspect_text_encoder(files.write(tmp_path / "g.safetensors", reference.clip_g(*sizes[1])))
    require_text_width(layout, clip_l, clip_g)
    with pytest.raises(CheckpointError, match="expects"):
        require_text_width(layout, clip_g, clip_l)


@pytest.mark.parametrize("rename", [dict, reference.original_vae])
def test_vae_under_both_kinds_of_names(tmp_path: Path, rename: type[dict[str, tuple[int, ...]]]) -> None:
    inspect_vae(files.write(tmp_path / "vae.safetensors", rename(reference.vae())))


def test_a_header_is_read_as_it_stands(tmp_path: Path) -> None:
    path = files.write(tmp_path / "any.safetensors", {"a": (2, 3), "b.c": ()}, "BF16", {"author": "someone"})
    header = read_header(path)
    assert header.shapes == {"a": (2, 3), "b.c": ()}
    assert set(header.dtypes.values()) == {"BF16"}
    assert header.metadata == {"author": "someone"}
    assert header.under("b.") == {"c": ()}
