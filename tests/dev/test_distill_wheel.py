"""The trainer as an installed tool: its wheel holds all that it needs, and runs without the checkout and ComfyUI."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from tools.harness import testhost
from tools.harness.testhost import ROOT, requirement_lines
from tools.measure import reference
from tools.tiny import SHIPPED, dataset, denoiser, pipeline, text
from tools.tiny.grow import SDXL_TINY

PROJECT = tomllib.loads((ROOT / "distill" / "pyproject.toml").read_text("utf-8"))
IMPORT_ALL = """
import importlib, json, pkgutil, sys
import koala_sdxl.distill, koala_sdxl.koala
for package in (koala_sdxl.distill, koala_sdxl.koala):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
own = {name for name in sys.modules if name.startswith("koala_sdxl.")}
print(json.dumps({"top": sorted({name.partition(".")[0] for name in sys.modules}), "own": sorted(own)}))
"""


def installed(*arguments: str, site: Path) -> subprocess.CompletedProcess[str]:
    """Run a Python that finds the installed trainer, and neither the checkout nor ComfyUI."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=site.parent,
        env=environment | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to which the wheel is installed; it is built from a copy, as building leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("koala", "distill"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", "out", "./distill"]
    subprocess.run([*pip, *build], cwd=folder, check=True)
    (wheel,) = (folder / "out").glob("koala_distill-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", "site", str(wheel)], cwd=folder, check=True)
    for name in ("koala", "distill"):
        shutil.rmtree(folder / name)
    return folder / "site"


def test_every_package_of_koala_is_in_the_wheel() -> None:
    folders = [path.parent.relative_to(ROOT) for path in sorted((ROOT / "koala").rglob("__init__.py"))]
    packages = {"koala_sdxl." + ".".join(folder.parts) for folder in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages | {
        "koala_sdxl.distill",
        "koala_sdxl.distill.carry",
    }


def test_the_lower_bounds_are_the_tested_versions() -> None:
    files = ("requirements-tools.txt", "requirements-dev.txt", "constraints.txt")
    lines = [line for file in files for line in requirement_lines((ROOT / "tools" / file).read_text("utf-8"))]
    tested = {name.lower(): version for name, _, version in (line.partition("==") for line in lines)}
    optional = PROJECT["project"]["optional-dependencies"].values()
    for requirement in [*PROJECT["project"]["dependencies"], *(one for group in optional for one in group)]:
        name, _, bound = requirement.partition(">=")
        assert re.match(rf"{re.escape(bound)}(\.|$)", tested[name]), requirement


@pytest.mark.nightly
def test_it_runs_without_checkout_and_comfyui(site: Path) -> None:
    done = installed("-m", "koala_sdxl.distill", "--help", site=site)
    assert done.returncode == 0, done.stderr
    assert "CONFIG.toml" in done.stdout
    assert {"koala-distill", "koala-carry"} <= {path.name for path in (site / "bin").iterdir()}
    done = installed("-c", IMPORT_ALL, site=site)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not {"comfy", "folder_paths", "host", "nodes", "tools"} & set(found["top"])
    assert "koala_sdxl.distill.train" in found["own"]
    assert not any(name.startswith(("koala_sdxl.host", "koala_sdxl.distill.study")) for name in found["own"])


@pytest.mark.nightly
def test_it_trains_and_writes_its_result(site: Path, tmp_path: Path) -> None:
    shipped = reference.pipeline(SHIPPED)
    torch.manual_seed(0)
    encoders = text.Encoders(shipped.text_encoder, shipped.text_encoder_2)
    tokenizers = text.tokenizers(testhost.test_host().tokenizer)
    teacher = pipeline.assemble(shipped.vae, encoders, tokenizers, denoiser.new_unet(SDXL_TINY))
    pipeline.save(teacher, tmp_path / "sdxl-tiny")
    dataset.write(tmp_path / "pictures", 64, 4)
    (tmp_path / "run.toml").write_text(
        """
        output = "student"
        teacher = { model = "sdxl-tiny", dtype = "fp32" }
        data = { path = "pictures", cache = "cache", resolution = 64, bucket_step = 8, max_aspect = 1.0, workers = 0 }
        training = { steps = 1, batch = 2, precision = "no" }
        """
    )
    done = installed(str(site / "bin" / "koala-distill"), str(tmp_path / "run.toml"), site=site)
    assert done.returncode == 0, done.stderr
    result = tmp_path / "student" / "result"
    assert sorted(path.name for path in result.iterdir()) == ["student", "student.safetensors"]
    assert sorted(path.name for path in (result / "student" / "tokenizer").iterdir()) == [
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
