"""The node KOALA Accelerate: what it says, takes and refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from koala_sdxl.host.accelerate import cpu_routines as kernels
from koala_sdxl.host.accelerate.patch import Accelerated
from koala_sdxl.host.accelerate.plan import OFF, PRESETS
from koala_sdxl.host.model import model_facts
from koala_sdxl.koala.architecture.layout import KOALA_700M
from koala_sdxl.nodes import speed
from koala_sdxl.nodes.speed import KoalaAccelerate
from tools.measure import parity, transfer


def node(**preset: Any) -> Any:
    return KoalaAccelerate.execute(parity.tiny_models()[0], preset)


def test_the_node_says_what_it_will_do() -> None:
    text = {name: node(preset=name).ui["text"][0].splitlines() for name in PRESETS}
    assert [lines[0] for lines in text.values()] == [
        "25 of 25 steps run the full U-Net",
        "at least 12 of 25 steps run the full U-Net",
        "at least 9 of 25 steps run the full U-Net",
    ]
    assert all(lines[-1].startswith("on this CPU: ") for lines in text.values())
    assert "bf16" not in text["exact"][-1]
    assert ("bf16" in text["fast"][-1]) == kernels.bf16_is_faster()


def test_the_vae_output_needs_the_vae() -> None:
    vae = parity.tiny_models()[2]
    made = KoalaAccelerate.execute(parity.tiny_models()[0], {"preset": "exact"}, vae)
    assert made.result[1].first_stage_model is vae.first_stage_model
    assert made.ui["text"][0].split(", ")[-1] in ("VAE by NNPACK", "VAE in channels_last")
    assert "no VAE is connected" in node(preset="exact").result[1].message


def test_custom_settings() -> None:
    chosen = {"preset": "custom", "reuse": "fast", "guidance_start": 0.0, "guidance_end": 0.7, "cpu_routines": OFF}
    made = node(**chosen)
    assert made.ui["text"][0].splitlines() == ["at least 9 of 25 steps run the full U-Net", "guidance from 0 to 0.7"]
    with pytest.raises(ValueError, match=r"guidance_start is 0\.8 and guidance_end 0\.7; expected an end after"):
        node(**chosen | {"guidance_start": 0.8})


def test_settings_that_do_nothing_are_named() -> None:
    chosen = {"preset": "custom", "reuse": OFF, "guidance_start": 0.0, "guidance_end": 1.0, "cpu_routines": OFF}
    assert node(**chosen).ui["text"][0].splitlines() == [
        "25 of 25 steps run the full U-Net",
        "changes nothing on this machine: these settings leave everything as it is",
    ]


GRAPHS, NO_NVIDIA = "CUDA graphs (triton not found)", "faster execution needs an NVIDIA GPU"


@pytest.mark.parametrize(
    ("preset", "execution", "why_eager", "vae", "said"),
    [
        ("exact", GRAPHS, "", "", [f"on this GPU: {GRAPHS}"]),
        ("fast", GRAPHS, "", "VAE compiled", [f"on this GPU: {GRAPHS}, VAE compiled"]),
        ("exact", "", NO_NVIDIA, "", [f"changes nothing on this machine: {NO_NVIDIA}"]),
        ("fast", "", NO_NVIDIA, "", [f"the U-Net as ComfyUI runs it: {NO_NVIDIA}"]),
        (
            "exact",
            "",
            "too little",
            "VAE compiled",
            ["on this GPU: VAE compiled", "the U-Net as ComfyUI runs it: too little"],
        ),
    ],
)
def test_what_is_said_of_a_gpu(preset: str, execution: str, why_eager: str, vae: str, said: list[str]) -> None:
    """What is found out on a GPU, by itself, is tested there."""
    model = parity.tiny_models()[0].clone()
    model.load_device = torch.device("cuda")
    made = Accelerated(model, "", execution, why_eager)
    text = speed._summary(model_facts(model), PRESETS[preset], made, vae)
    assert text.splitlines()[1:] == said


def test_models_that_are_no_koala_are_refused() -> None:
    whole = transfer.pair(KOALA_700M)[0].clone()
    whole.attachments.clear()
    with pytest.raises(ValueError, match="this MODEL is not a KOALA model"):
        KoalaAccelerate.execute(whole, {"preset": "fast"})
