"""The model card beside a distillation's weights: what Hugging Face's hub reads of it, and the facts of the run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.dev import distill_runs
from tests.dev.distill_runs import run
from tools.harness.testhost import ROOT

place = pytest.fixture(scope="module")(distill_runs.place)
no_accelerator_left = pytest.fixture(autouse=True)(distill_runs.no_accelerator_left)


def test_a_result_has_a_model_card_that_the_hub_reads(place: Path) -> None:
    base = "stabilityai/stable-diffusion-xl-base-1.0"
    run(
        place,
        "carded",
        card={"license": "openrail++", "base_model": base},
        validation={"images": 2, "every": 2},
        loss={"place": "residual", "feature": 0.5},
    )
    content = (place / "carded" / "result" / "carded" / "README.md").read_text("utf-8")
    front = yaml.safe_load(content.split("---\n")[1])
    assert front == {
        "license": "openrail++",
        "base_model": base,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["koala", "sdxl", "distillation", "diffusers", "comfyui"],
    }
    card = ModelCard(content)
    assert card.data.to_dict()["base_model"] == base
    facts = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card.text, re.MULTILINE))
    measured = (place / "carded" / "validation.csv").read_text().splitlines()
    assert facts.pop("loss, in validation") == measured[-1].split(",")[1]
    assert facts["teacher"] == "sdxl-tiny, fp32"
    assert facts["steps"] == "2 of 2 images, 64 px"
    assert facts["loss"] == "task x 1, output x 1, features of residual x 0.5"
    assert facts["optimiser"] == "adamw, learning rate 0.001, precision no"


def test_a_card_without_a_base_model_names_none(place: Path) -> None:
    run(place, "plain-card", training={**distill_runs.SETTINGS["training"], "steps": 1})
    card = ModelCard((place / "plain-card" / "result" / "plain-card" / "README.md").read_text("utf-8"))
    assert card.data.to_dict().get("license") == "other"
    assert "base_model" not in card.data.to_dict()
    assert "in validation" not in card.text


def test_the_guides_upload_is_a_command_of_huggingface_hub() -> None:
    (line,) = re.findall(r"^hf upload .*$", (ROOT / "distill" / "README.md").read_text("utf-8"), re.MULTILINE)
    assert line == "hf upload USER/NAME OUTPUT/result/NAME"
    command = [sys.executable, "-m", "huggingface_hub.cli.hf", "upload", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert re.search(r"hf upload .*REPO_ID.*LOCAL_PATH", " ".join(done.stdout.split()))
