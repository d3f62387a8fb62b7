"""Needs a server (fixture object_info of tests/host): canvases of the repository become graphs with their places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from batch.columns import places
from batch.workflow import read
from tools.harness.testhost import ROOT

PLACES = {
    "01 KOALA-tiny text to image": ("4.positive", "4.negative", "6.seed", "5.width"),
    "04 KOALA-700M in an SDXL graph": ("5.text", "6.text", "8.seed", "7.width"),
    "08 KOALA-700M with SamplerCustom": ("6.positive", "6.negative", "8.noise_seed", "7.width"),
    "10 KOALA-tiny with a LoRA": ("4.positive", "4.negative", "6.seed", "5.width"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_canvas_and_a_png_with_nothing_else(object_info: dict[str, Any], tmp_path: Path, name: str) -> None:
    file = ROOT / "example_workflows" / f"{name}.json"
    info = PngInfo()
    info.add_text("workflow", file.read_text("utf-8"))
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png", pnginfo=info)
    for path in (file, tmp_path / "image.png"):
        workflow = read(path, lambda: object_info)
        assert workflow.canvas == json.loads(file.read_text("utf-8"))
        found = places(workflow.graph, ["prompt", "negative", "seed", "width"], "t.csv")
        assert tuple(f"{place.node}.{place.input}" for (place,) in found.values()) == PLACES[name]
