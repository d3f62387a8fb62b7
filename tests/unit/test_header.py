"""Headers are read by the safetensors library, once for each file that is inspected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from koala_sdxl.koala.architecture.layout import KOALA_TINY
from koala_sdxl.koala.files import header
from koala_sdxl.koala.files.header import CheckpointError, Header, Source, read_header
from koala_sdxl.koala.files.inspect import (
    inspect_checkpoint,
    inspect_folder,
    inspect_model,
    inspect_text_and_vae,
    inspect_text_encoder,
    inspect_unet,
    inspect_vae,
)
from tests.unit import files, reference
from tests.unit.test_folder import published
from tools.tiny import SHIPPED


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """How many times each file was opened for its header."""
    found = Counter[Path]()

    def counted(path: Path, **options: Any) -> Any:
        found[path] += 1
        return safe_open(path, **options)

    monkeypatch.setattr(header, "safe_open", counted)
    return found


@pytest.mark.parametrize("look", [inspect_unet, inspect_model, inspect_checkpoint, inspect_text_and_vae])
def test_a_single_file_is_opened_once(look: Callable[[Path], object], opened: Counter[Path]) -> None:
    look(SHIPPED)
    assert opened == {SHIPPED: 1}


def test_each_file_of_a_folder_is_opened_once(tmp_path: Path, opened: Counter[Path]) -> None:
    found = inspect_folder(published(tmp_path / "koala", KOALA_TINY))
    parts = (found.model.unet, found.text_encoder, found.text_encoder_2, found.vae)
    assert opened == {part.path: 1 for part in parts}
    assert len(opened) == 4


def test_what_was_inspected_carries_its_header(tmp_path: Path) -> None:
    unet = inspect_unet(SHIPPED)
    assert unet.header == read_header(SHIPPED)
    assert unet.shapes == unet.header.under("model.diffusion_model.")
    encoder = inspect_text_encoder(files.write(tmp_path / "l.safetensors", reference.clip_l(32, 3)))
    assert encoder.shapes == reference.clip_l(32, 3)
    vae = inspect_vae(files.write(tmp_path / "vae.safetensors", reference.vae()))
    assert (vae.prefix, vae.shapes) == ("", reference.vae())


def test_sources_are_told_apart_by_path_and_prefix() -> None:
    one, other = Header(Path("a"), {}, {}, {}), Header(Path("a"), {"x": "F16"}, {"x": (1,)}, {})
    assert Source(one) == Source(other)
    assert hash(Source(one)) == hash(Source(other))
    assert Source(one) != Source(one, "x")
    assert Source(one) != Source(Header(Path("b"), {}, {}, {}))


def test_tensors_are_listed_in_the_order_of_their_data(tmp_path: Path) -> None:
    shapes = {"b": (2,), "a": (3,), "c": (1,)}
    assert list(read_header(files.write(tmp_path / "any.safetensors", shapes)).shapes) == ["b", "a", "c"]


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"^{tmp_path.name} is not a file; expected a .safetensors file of LoRA"):
        read_header(tmp_path, "LoRA weights")
