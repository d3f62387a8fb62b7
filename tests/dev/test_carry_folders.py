"""What `dev.py carry --check` refuses of SDXL's folder: all that the run would, before it begins."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from koala_sdxl.distill.errors import UserError
from tests.dev import carry_runs
from tests.dev.carry_runs import carried

place = pytest.fixture(scope="module")(carry_runs.place)
CUT = 1000
"""Bytes that are left of a damaged file."""


def copied(place: Path, folder: Path) -> Path:
    """A teacher's folder, to be damaged."""
    shutil.copytree(place / "sdxl-tiny", folder)
    return folder


def refused(place: Path, teacher: Path) -> str:
    """The one line that --check says."""
    with pytest.raises(UserError) as problem:
        carried(place, "x", teacher=teacher, check=True)
    (line,) = str(problem.value).splitlines()
    assert line.startswith(f"--teacher: {teacher} is not a complete SDXL folder: ")
    assert line.endswith("Fetch it again, or give a single file.")
    return line


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("text_encoder", "it has no text_encoder. Expected"),
        ("text_encoder_2/model.fp16.safetensors", "it has no weights in text_encoder_2. Expected"),
        ("text_encoder_2/config.json", "it has no text_encoder_2/config.json. Expected"),
        ("tokenizer", "it has no tokenizer. Expected"),
        ("tokenizer_2/tokenizer.json", "tokenizer_2 holds no tokenizer that can be read"),
        ("scheduler", "it has no scheduler. Expected"),
        ("vae", "it has no vae. Expected"),
        ("model_index.json", "it has no model_index.json. Expected"),
    ],
)
def test_a_folder_without_a_part_is_refused(place: Path, tmp_path: Path, missing: str, says: str) -> None:
    path = copied(place, tmp_path / "bare") / missing
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert says in refused(place, tmp_path / "bare")


def test_a_folder_whose_text_encoder_is_cut_short_is_refused(place: Path, tmp_path: Path) -> None:
    path = copied(place, tmp_path / "cut") / "text_encoder" / "model.fp16.safetensors"
    path.write_bytes(path.read_bytes()[:-CUT])
    assert "model.fp16.safetensors" in refused(place, tmp_path / "cut")


def test_a_fine_tunes_folder_is_held_to_the_same(place: Path, tmp_path: Path) -> None:
    shutil.rmtree(copied(place, tmp_path / "tuned") / "text_encoder")
    with pytest.raises(UserError, match=r"^\S+tuned is not a complete SDXL folder: it has no text_encoder\. Expected"):
        carried(place, "x", lora=tmp_path / "tuned", check=True)


def test_another_tokenizer_can_take_the_place_of_a_missing_one(place: Path, tmp_path: Path) -> None:
    teacher = copied(place, tmp_path / "teacher")
    shutil.move(teacher / "tokenizer", tmp_path / "words")
    shutil.rmtree(teacher / "tokenizer_2")
    assert carried(place, "x", teacher=teacher, tokenizer=tmp_path / "words", check=True)
