"""An SDXL T2I-Adapter on koala-tiny: KOALA ControlNet gives what diffusers' own pipeline gives."""

from pathlib import Path

import comfy.controlnet
import diffusers
import pytest
import torch

import nodes as core
from koala_sdxl.distill.study.addon_training import save
from koala_sdxl.distill.study.effects import t2i
from koala_sdxl.nodes.adapt import KoalaControlNet
from koala_sdxl.nodes.prompt import KoalaPrompt
from koala_sdxl.nodes.sample import KoalaSampler
from tools.measure import parity

SEED, STEPS, CFG = 3, 4, 5.0


@torch.inference_mode()
def test_its_latents_are_those_of_diffusers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = t2i.new_adapter()
    save(made.state_dict(), tmp_path / "t2i.safetensors")
    made.half().float()  # as in the file
    hint = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(4))

    pipe = parity.tiny_pipeline()
    pipe = diffusers.StableDiffusionXLAdapterPipeline(**pipe.components, adapter=made)
    pipe.set_progress_bar_config(disable=True)
    wanted = pipe(
        parity.PROMPT,
        image=hint,
        height=128,
        width=128,
        num_inference_steps=STEPS,
        guidance_scale=CFG,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).images

    model, clip, _ = parity.tiny_models()
    control = KoalaControlNet.execute(comfy.controlnet.load_controlnet(str(tmp_path / "t2i.safetensors"))).result[0]
    positive, negative = KoalaPrompt.execute(clip, parity.PROMPT, "", "no style", "reference").result
    positive, negative = core.ControlNetApplyAdvanced().apply_controlnet(
        positive, negative, control, hint.movedim(1, -1), 1.0, 0.0, 1.0
    )
    preset = {"preset": "custom", "steps": STEPS, "cfg": CFG, "spacing": "leading"}
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    found = KoalaSampler.execute(model, positive, negative, latent, SEED, preset, "euler", 1.0).result[0]["samples"]
    assert found * parity.LATENT_SCALE == pytest.approx(wanted, abs=parity.LATENT_BOUND)
