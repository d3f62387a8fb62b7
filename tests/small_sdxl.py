"""A small SDXL for servers: the nodes of tests/browser/pack, and the file that they read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tools.synthetic import adapters

PACK = Path(__file__).parent / "browser" / "pack" / "tiny_sdxl.py"


def nodes_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of custom nodes with those of the tests, and with what they read."""
    folder = tmp_path_factory.mktemp("pack")
    shutil.copy(PACK, folder)
    save_file(adapters.unet(adapters.SMALL_SDXL), folder / "sdxl.safetensors")
    return folder
