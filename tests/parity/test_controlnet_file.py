"""KOALA ControlNet Loader: what core loads is loaded and fitted, koala-tiny's own is built in, the rest is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.controlnet
import pytest
import torch
from safetensors.torch import load_file, save_file

from koala_sdxl.host.transfer.control_file import load_control
from koala_sdxl.koala.architecture.layout import KOALA_700M
from koala_sdxl.nodes.adapt import KoalaControlNet, KoalaControlNetLoader
from koala_sdxl.nodes.base import BUILT_IN, choices
from tests.parity.test_controlnet_node import equal, given
from tools.harness import assets
from tools.measure import transfer
from tools.synthetic import adapters


def saved(state: dict[str, torch.Tensor], folder: Path) -> Path:
    save_file(state, folder / "control.safetensors")
    return folder / "control.safetensors"


def test_it_gives_what_cores_loader_and_koala_controlnet_give(tmp_path: Path) -> None:
    path = saved(adapters.controlnet(), tmp_path)
    by_core = KoalaControlNet.execute(comfy.controlnet.load_controlnet(str(path))).result[0]
    wanted = given(KOALA_700M, transfer.hinted(by_core))
    found = given(KOALA_700M, transfer.hinted(load_control(path)))
    assert any(residual is not None for key in wanted for residual in wanted[key])
    assert all(equal(found[key], wanted[key]) for key in wanted)


def test_the_file_may_go_once_it_is_loaded(tmp_path: Path) -> None:
    path = saved(adapters.controlnet(), tmp_path)
    wanted = given(KOALA_700M, transfer.hinted(load_control(path)))
    control = load_control(path)
    path.write_bytes(b"")
    assert equal(given(KOALA_700M, transfer.hinted(control))["output"], wanted["output"])


def test_koala_tinys_is_offered_last_and_loads() -> None:
    assert choices("controlnet")[-1] == "built-in koala-tiny-outline"
    assert choices("loras")[-1] == "built-in koala-tiny-cyan"
    assert [path.resolve() for path in BUILT_IN.values()] == [assets.LORA, assets.CONTROLNET]
    (control,) = KoalaControlNetLoader.execute("built-in koala-tiny-outline").result
    assert isinstance(control, comfy.controlnet.ControlNet)
    assert KoalaControlNetLoader.fingerprint_inputs("built-in koala-tiny-outline")


def with_another_shape() -> dict[str, torch.Tensor]:
    state = load_file(assets.CONTROLNET)
    key = "zero_convs.1.0.weight"
    return state | {key: torch.zeros(1, *state[key].shape[1:])}


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (lambda: load_file(assets.LORA), r"control\.safetensors is a LoRA; expected an SDXL ControlNet or T2I-Adapter"),
        (lambda: load_file(assets.SHIPPED), r"is the U-Net of koala-tiny; expected an SDXL ControlNet"),
        (lambda: {"some": torch.zeros(2)}, r"is a file of an unknown kind \(1 tensors, first: some\); expected"),
        (
            with_another_shape,
            r"is a ControlNet, and ComfyUI cannot build .*size mismatch for zero_convs.*; expected an",
        ),
        (
            lambda: adapters.controlnet(numbering="diffusers"),  # as narrow as no published one
            r"is a ControlNet, and ComfyUI cannot build a ControlNet of it \(.*\); expected an SDXL ControlNet",
        ),
    ],
    ids=["LoRA", "checkpoint", "unknown", "another shape", "another width"],
)
def test_what_is_no_controlnet_is_named(state: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        load_control(saved(state(), tmp_path))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "control.safetensors"
    path.write_bytes(assets.CONTROLNET.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"^control\.safetensors is cut short"):
        load_control(path)
    with pytest.raises(FileNotFoundError):
        load_control(tmp_path / "absent.safetensors")
