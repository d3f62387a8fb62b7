"""Scheduler configurations: what the U-Net's timesteps follow is taken, all else refused with file, key and remedy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from koala_sdxl.koala.architecture.layout import KOALA_TINY
from koala_sdxl.koala.files.config import CONFIG_LIMIT, SCHEDULER_RULES, complete_scheduler, read_json
from koala_sdxl.koala.files.header import CheckpointError
from koala_sdxl.koala.files.inspect import inspect_folder
from koala_sdxl.koala.releases import SCHEDULER_CONFIG
from koala_sdxl.koala.schedule import schedule
from tests.unit.test_folder import published
from tests.unit.test_header import folder_of_nobody, without_rights

__all__ = ["folder_of_nobody"]

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of diffusers, with NumPy 2

SDXL_BASE = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    **{"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False},
    **{"interpolation_type": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon"},
    **{"sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1},
    **{"timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False},
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "KOALA, SDXL, SSD-1B, Vega": SDXL_BASE,
    "SDXL Turbo": {**SDXL_BASE, "_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    "LCM": {
        **SDXL_BASE,
        **{"_class_name": "LCMScheduler", "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.995},
        **{"original_inference_steps": 50, "rescale_betas_zero_snr": False, "thresholding": False},
        "timestep_scaling": 10.0,
    },
    "DPM++": {
        **SDXL_BASE,
        **{"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "solver_order": 2},
        **{"lambda_min_clipped": float("-inf"), "final_sigmas_type": "zero", "use_lu_lambdas": False},
        **{"use_flow_sigmas": False, "use_beta_sigmas": False, "use_exponential_sigmas": False},
    },
    "steps from 0": {**SDXL_BASE, "steps_offset": 0, "sigma_min": 0.03, "sigma_max": 14, "timestep_type": "discrete"},
    "nothing": {},
}

REFUSED: list[tuple[str, Any]] = [
    ("beta_schedule", "linear"),
    ("beta_schedule", "squaredcos_cap_v2"),
    ("beta_schedule", None),
    ("beta_start", 0.0001),
    ("beta_start", float("nan")),
    ("beta_start", "0.00085"),
    ("beta_end", 0.02),
    ("beta_end", float("inf")),
    ("beta_end", True),
    ("num_train_timesteps", 10_000_000),
    ("num_train_timesteps", 999),
    ("num_train_timesteps", 1000.0),
    ("num_train_timesteps", "1000"),
    ("num_train_timesteps", -1),
    ("trained_betas", [0.001] * 1000),
    ("trained_betas", []),
    ("rescale_betas_zero_snr", True),
    ("rescale_betas_zero_snr", "false"),
    ("prediction_type", "v_prediction"),
    ("prediction_type", "sample"),
    ("prediction_type", 1),
    ("interpolation_type", "log_linear"),
    ("use_karras_sigmas", True),
    ("use_karras_sigmas", 1),
    ("use_exponential_sigmas", True),
    ("use_beta_sigmas", True),
    ("use_beta_sigmas", None),
    ("use_lu_lambdas", True),
    ("use_flow_sigmas", True),
    ("sigma_min", float("nan")),
    ("sigma_min", 0),
    ("sigma_max", float("inf")),
    ("sigma_max", True),
    ("sigma_max", "14"),
    ("timestep_spacing", "uniform"),
    ("timestep_spacing", ["leading"]),
    ("timestep_type", "other"),
    ("steps_offset", True),
    ("steps_offset", 1.0),
    ("steps_offset", -1),
    ("steps_offset", 10_000_000),
    ("final_sigmas_type", "last"),
    ("_class_name", "EDMEulerScheduler"),
    ("_class_name", "FlowMatchEulerDiscreteScheduler"),
    ("_class_name", {}),
]


@pytest.mark.parametrize("config", PUBLISHED.values(), ids=PUBLISHED)
def test_published_configurations_are_taken(config: dict[str, Any]) -> None:
    made = complete_scheduler(json.loads(json.dumps(config)), "it", "")
    assert made == {**SCHEDULER_CONFIG, **config}
    assert len(schedule(25, "leading", config=made).sigmas) == 26


@pytest.mark.parametrize(("key", "value"), REFUSED, ids=str)
def test_what_the_unet_cannot_follow_is_refused(key: str, value: Any) -> None:
    stated = json.loads(json.dumps({**SDXL_BASE, key: value}))
    with pytest.raises(CheckpointError) as caught:
        complete_scheduler(stated, "koala-700m/scheduler/scheduler_config.json", "Restore the published file: URL")
    first, *more = str(caught.value).splitlines()
    assert first.startswith(f"koala-700m/scheduler/scheduler_config.json: {key} is ")
    assert "; expected " in first
    assert first.endswith("Restore the published file: URL")
    assert not more
    assert len(first) < 300


def test_every_rule_refuses_something() -> None:
    assert {key for key, _ in REFUSED} == set(SCHEDULER_RULES)


def test_a_refused_configuration_is_said_when_the_folder_is_inspected(tmp_path: Path) -> None:
    folder = published(tmp_path / "koala-700m", KOALA_TINY)
    (folder / "scheduler" / "scheduler_config.json").write_text('{"beta_schedule": "linear"}')
    with pytest.raises(CheckpointError) as caught:
        inspect_folder(folder)
    assert str(caught.value) == (
        'koala-700m/scheduler/scheduler_config.json: beta_schedule is "linear"; expected "scaled_linear": ComfyUI\'s '
        "SDXL U-Net follows no other noise schedule. Restore the published file: "
        "https://huggingface.co/etri-vilab/koala-700m/resolve/main/scheduler/scheduler_config.json"
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[" * 100_000, "holds no JSON object"),
        (b'{"a":' * 50_000, "holds no JSON object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "holds no JSON object"),
        (b"\xff\xfe{", "holds no JSON object"),
        (b" " * (CONFIG_LIMIT + 1), "has more than 1,000,000 bytes"),
    ],
    ids=["deep list", "deep object", "long number", "no text", "huge"],
)
def test_a_config_that_is_no_config_is_a_line(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "unet" / "config.json"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{tmp_path.name}/unet/config.json {says}"):
        read_json(path)


def test_a_config_that_is_not_a_file_is_not_taken_for_an_absent_one(tmp_path: Path) -> None:
    """In Hugging Face's cache a file is a link, and its target may have been deleted."""
    (tmp_path / "link.json").symlink_to(tmp_path / "blob")
    with pytest.raises(CheckpointError, match=r"/link.json is a link to a file that is not there"):
        read_json(tmp_path / "link.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(CheckpointError, match=r"/folder.json cannot be read \(Is a directory\)"):
        read_json(tmp_path / "folder.json")
    assert read_json(tmp_path / "absent.json") == {}


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="no such rights on this system")
def test_a_config_without_permission_is_not_taken_for_an_absent_one(folder_of_nobody: Path) -> None:
    path = folder_of_nobody / "scheduler" / "scheduler_config.json"
    path.parent.mkdir()
    path.write_text("{}")
    for closed in (path, path.parent):
        mode = closed.stat().st_mode
        closed.chmod(0)
        with without_rights(), pytest.raises(CheckpointError, match=r"_config.json cannot be read \(Permission denied"):
            read_json(path)
        closed.chmod(mode)
