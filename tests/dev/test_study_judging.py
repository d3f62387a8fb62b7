"""distill/study/judging: what tells a good U-Net from a bad one, and the pictures it keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from koala_sdxl.distill.study import judging
from tools.measure import reference
from tools.tiny import SHIPPED, denoiser, pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped koala-tiny as a diffusers folder."""
    made = reference.pipeline(SHIPPED)
    pipeline.save(made, path := tmp_path_factory.mktemp("judged") / "koala-tiny")
    return path


def test_the_held_out_error_tells_a_trained_net_from_a_random_one(folder: Path) -> None:
    torch.manual_seed(0)
    trained = pipeline.load(folder).unet
    found = judging.held_out_error(trained, folder, 8)
    assert 0.005 < found < 0.1
    assert judging.held_out_error(trained, folder, 8) == found
    assert judging.held_out_error(denoiser.new_unet(), folder, 8) > 10 * found


@pytest.mark.nightly
def test_a_judgement_counts_pictures_and_keeps_some(folder: Path, tmp_path: Path) -> None:
    found = judging.judge(pipeline.load(folder).unet, folder, tmp_path / "seen.png", prompts=12, held_out=8)
    assert found["n"] == 12
    assert found["colour"] >= 75  # it is koala-tiny that drew them
    assert Image.open(tmp_path / "seen.png").size == (12 * 128, 128)
