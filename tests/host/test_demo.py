"""`dev.py demo` as a person runs it: the contact sheet's pictures are judged by their pixels."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from tests.host.test_nodes import seen
from tools import demo
from tools.harness.testhost import Host


def asked(prompt: str) -> tuple[str, ...]:
    """Colour, shape and background's colour that a prompt names."""
    found = re.fullmatch(r"an? (\w+) (\w+) on an? (\w+) background", prompt)
    assert found
    return found.groups()


@pytest.mark.nightly
def test_the_contact_sheet_follows_its_prompts(host: Host, tmp_path: Path) -> None:
    assert demo.run(host, demo.Request(out=tmp_path / "sheet.png")) == 0
    pictures = sorted((tmp_path / "sheet").glob("*.png"))
    assert len(pictures) == len(demo.SHEET_PROMPTS)
    right = [seen(Image.open(file)) == asked(prompt) for file, prompt in zip(pictures, demo.SHEET_PROMPTS, strict=True)]
    assert sum(right) >= len(right) - 1  # nine in ten is what the model's card promises
    assert (tmp_path / "sheet.png").is_file()


def test_one_prompt_makes_one_picture_at_the_path_asked_for(host: Host, tmp_path: Path) -> None:
    request = demo.Request("a green star on a white background", seed=3, steps=20, out=tmp_path / "star.png")
    assert demo.run(host, request) == 0
    with Image.open(tmp_path / "star.png") as picture:
        assert seen(picture) == ("green", "star", "white")
        assert '"preset.steps": 20' in picture.info["prompt"]
