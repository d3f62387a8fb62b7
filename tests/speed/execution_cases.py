"""What must hold wherever passes are compiled or captured; tests/gpu runs the same on a GPU.

``Case.faster`` is koala-tiny, or another MODEL, with a way of execution; ``Case.near`` is the PSNR in decibels between
its images and those that ComfyUI draws, which differ by rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.model_management
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_freelunch import FreeU_V2
from torch._dynamo.utils import counters

import nodes as core
from koala_sdxl.host.accelerate import execution, gpu_vae
from koala_sdxl.host.accelerate.patch import accelerate
from koala_sdxl.host.accelerate.plan import OFF, REUSE, Acceleration
from koala_sdxl.host.accelerate.strategy import EAGER, Choice, Strategy
from koala_sdxl.koala.architecture.layout import KOALA_700M
from koala_sdxl.nodes.adapt import KoalaControlNet
from koala_sdxl.nodes.lora import KoalaHookLora, KoalaLoraLoader
from koala_sdxl.nodes.prompt import KoalaPrompt
from tests.speed.sampling import BASE, Said, decibels, prompts, run
from tools.measure import parity, transfer
from tools.measure.bench.image_quality import psnr

EXACT = Acceleration(OFF)
BALANCED = Acceleration(OFF, REUSE["balanced"])
SHORT = BASE | {"steps": 3}


class Streamed(ModelPatcher):
    """A MODEL with dynamic VRAM, as far as a CPU can have one: the host makes a plain one of it there."""

    def is_dynamic(self) -> bool:
        return True


@dataclass
class Case:
    """A strategy, and what was told after each run."""

    strategy: Strategy
    near: float
    said: Said = field(default_factory=Said)

    kept: list[execution.Prepared] = field(default_factory=list)
    """What was captured, which would else go with each MODEL."""

    def close(self) -> None:
        """Forget all that was captured."""
        for made in self.kept:
            made.release()

    def faster(self, settings: Acceleration = EXACT, model: Any = None) -> Any:
        """An accelerated clone."""
        given = parity.tiny_models()[0] if model is None else model
        self.kept.append(execution.prepared(given.model.diffusion_model, self.strategy))
        return accelerate(given, settings, self.said.append, lambda one: Choice(one.clone(), self.strategy)).model

    @property
    def captures(self) -> Any:
        """The captured passes of koala-tiny's U-Net."""
        unet = parity.tiny_models()[0].model.diffusion_model
        return execution.prepared(unet, self.strategy).captures

    def told(self, count: int, first: int = 1, what: str = "pass") -> str:
        """Of a run's passes through the U-Net, of which some were the first of their size."""
        how = "compiled" if self.strategy.compiled else "as in ComfyUI itself"
        of_first = f"{first} {what}{'' if first == 1 else 'es'} {how}: {execution.FIRST}"
        return "; ".join([f"{count - first} {what}es by CUDA graph", *([of_first] if first else [])])

    def same(self, model: Any = None, settings: Acceleration = EXACT, **changes: Any) -> torch.Tensor:
        """Draws with and without it, and compares; returns the latents."""
        given = parity.tiny_models()[0] if model is None else model
        changes = {"preset": SHORT} | changes
        texts = changes.pop("texts", None) or prompts()
        wanted = run(given, texts, **changes)
        found = run(self.faster(settings, given), texts, **changes)
        assert decibels(found, wanted) >= self.near
        return found


def graphs_compiled() -> int:
    """How many graphs PyTorch has compiled in this process so far."""
    return int(counters["stats"]["unique_graphs"])


def with_lora(model: Any, strength: float) -> Any:
    """koala-tiny with some.safetensors, which the caller has put into models/loras."""
    clip = parity.tiny_models()[1]
    return KoalaLoraLoader.execute(model, clip, "some.safetensors", strength, 1.0, "auto", 0.0).result[0]


def scheduled_lora(strength: float, *keyframes: tuple[float, float]) -> Any:
    """The same as HOOKS for koala-tiny; ``keyframes``: its strength from a part of the schedule on, each with it."""
    hooks = KoalaHookLora.execute(parity.tiny_models()[0], "some.safetensors", strength, 1.0, "auto").result[0]
    group = comfy.hooks.HookKeyframeGroup()
    for factor, start in keyframes:
        group.add(comfy.hooks.HookKeyframe(strength=factor, start_percent=start))
    hooks.set_keyframes_on_hooks(group)
    return hooks


def eagerly(model: Any, settings: Acceleration) -> Any:
    """An accelerated clone whose passes run as ComfyUI runs them."""
    return accelerate(model, settings, lambda _: None, lambda one: Choice(one.clone(), EAGER)).model


def in_type(model: Any, dtype: torch.dtype) -> Any:
    """A clone that computes in a type, whatever its weights have."""
    typed = model.clone()
    typed.set_model_compute_dtype(dtype)
    return typed


def exact_equals_eager(case: Case) -> None:
    """Whole passes, of all steps; the word on the sampler's node."""
    case.same(preset=BASE)
    assert case.said[-1] == case.told(25)
    assert len(case.captures) == 1
    case.same(preset=BASE)
    assert case.said[-1] == case.told(25, first=0)


def branches_equal_eager(case: Case) -> None:
    """Deep and shallow branches, with cached features: compared with the same preset as ComfyUI executes it."""
    wanted = run(eagerly(parity.tiny_models()[0], BALANCED))
    found = run(case.faster(BALANCED))
    assert decibels(found, wanted) >= case.near
    assert case.said[-1].splitlines() == [
        "12 of 25 passes ran the full U-Net, 25 with guidance",
        case.told(44, first=2, what="branch pass"),
    ]
    assert len(case.captures) == 2


def nothing_is_compiled_anew(case: Case) -> None:
    """After a first step, in which nothing is captured: while a pass is captured, and for other prompts, their length,
    seeds, cfg, LoRAs and their strength, sizes, batches."""
    model = parity.tiny_models()[0]
    case.same(preset=BASE | {"steps": 1})
    compiled = graphs_compiled()
    assert case.captures.count == 0
    case.same()
    captured = case.captures.count
    case.same(texts=prompts(["a green star on a blue background"]), seed=6)
    case.same(preset=SHORT | {"cfg": 3.0})
    assert case.captures.count == captured
    images = {case.same(with_lora(model, strength)).sum().item() for strength in (0.1, 0.2)}
    images.add(case.same().sum().item())
    assert len(images) == 3  # each LoRA drew another image
    long = KoalaPrompt.execute(parity.tiny_models()[1], "a red circle, " * 30, "", "no style", "comfy").result
    assert long[0][0][0].shape[1] > 77
    case.same(texts=long)
    for height, width, batch in ((16, 24, 1), (24, 16, 1), (16, 16, 2)):
        case.same(texts=prompts(["a red circle"] * batch), latent={"samples": torch.zeros(batch, 4, height, width)})
    assert graphs_compiled() == compiled


def a_size_is_captured_once(case: Case) -> None:
    """Also after another size."""
    wide = {"samples": torch.zeros(1, 4, 16, 24)}
    case.same()
    count = case.captures.count
    case.same(latent=wide)
    case.same()
    case.same(latent=wide)
    assert case.captures.count == count + 1


def a_lora_under_a_captured_pass(case: Case) -> None:
    """The host puts patched weights elsewhere: the pass is captured anew, at the first step, and right."""
    model = parity.tiny_models()[0]
    plain = case.same()
    patched = case.same(with_lora(model, 0.2))
    assert case.said[-1] == case.told(3, first=0)
    assert not torch.allclose(patched, plain, atol=1e-2)
    assert decibels(case.same(), plain) >= case.near


def weights_moved_away_and_back(case: Case) -> None:
    """What the host's Free Memory does: the memory of the passes is given back, and the next run is right."""
    before = case.same()
    model = case.faster()
    run(model, preset=SHORT)
    assert len(case.captures) == 1
    comfy.model_management.unload_all_models()
    assert len(case.captures) == 0
    assert decibels(run(model, preset=SHORT), before) >= case.near


def too_little_memory_for_a_capture(case: Case) -> None:
    """By the host's own estimate of what a pass takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "pass_memory", lambda *_: 1e15)
        case.same()
    assert "GiB of VRAM missing for a CUDA graph" in case.said[-1]
    assert len(case.captures) == 0
    case.same()
    assert case.said[-1] == case.told(3, first=0)


def a_cancelled_run_leaves_nothing_wrong(case: Case) -> None:
    """Cancelled in the first pass of a size, and between passes that are replayed."""
    unet = parity.tiny_models()[0].model.diffusion_model
    cancel = comfy.model_management.interrupt_current_processing
    hook = unet.input_blocks[1][0].register_forward_pre_hook(lambda *_: cancel())
    try:
        with pytest.raises(InterruptProcessingException):
            run(case.faster(), preset=SHORT)
    finally:
        hook.remove()
    assert len(case.captures) == 0
    wanted = case.same()
    count = case.captures.count
    model = parity.tiny_models()[0].clone()
    model.set_model_sampler_pre_cfg_function(lambda given: cancel() or given["conds_out"])
    with pytest.raises(InterruptProcessingException):
        run(case.faster(model=model), preset=SHORT)
    assert not any("forward" in vars(module) for module in unet.modules())
    assert decibels(run(case.faster(), preset=SHORT), wanted) >= case.near
    assert case.captures.count == count


def add_ons_fall_back(case: Case) -> None:
    """What a node adds to a U-Net is in the image, and the sampler's node is told why less was captured."""
    model = parity.tiny_models()[0]
    case.same(FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2).result[0])
    assert case.said[-1].endswith(": patches on the MODEL act between its blocks")
    patched = model.clone()
    patched.set_model_attn2_output_patch(lambda n, options: 0.9 * n)
    assert psnr(case.same(patched), case.same()) < 60
    assert case.said[-2].endswith(": patches on the MODEL act within its blocks")
    exchanged = model.clone()
    exchanged.add_object_patch("diffusion_model.out", torch.nn.Sequential(*model.model.diffusion_model.out))
    case.same(exchanged)
    assert case.said[-1] == "3 passes as in ComfyUI itself: another node has exchanged parts of the U-Net"
    wrapped = model.clone()
    wrapped.add_weight_wrapper("diffusion_model.out.2.weight", lambda weight: 0.9 * weight)
    case.same(wrapped)
    assert case.said[-1].startswith("3 passes as in ComfyUI itself: ComfyUI streams the weights")
    chosen = model.clone()
    options = chosen.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda function, *inputs, **named: function(*inputs, **named)
    case.same(chosen)
    assert case.said[-1].endswith(": another node has chosen how attention is computed")


def weights_of_another_type(case: Case) -> None:
    """The host converts them whenever they are used, as it does with fp8."""
    model = in_type(parity.tiny_models()[0], torch.bfloat16)
    wanted, found = (run(one, preset=SHORT) for one in (model, case.faster(model=model)))
    assert decibels(found, wanted) >= min(case.near, 38)
    assert case.said[-1] == case.told(3)


def the_vae_draws_the_same(case: Case) -> None:
    """Decoded, in tiles too, and encoded; the given VAE stays as it is."""
    vae = parity.tiny_models()[2]
    faster, words = gpu_vae.install(vae, lambda _: "")
    assert words
    latent = run(parity.tiny_models()[0], preset=SHORT)
    tiles = {"tile_x": 8, "tile_y": 8, "overlap": 2}
    wanted, found = vae.decode(latent), faster.decode(latent)
    assert not torch.equal(found, wanted)
    assert psnr(found, wanted) >= case.near
    assert psnr(faster.decode_tiled(latent, **tiles), vae.decode_tiled(latent, **tiles)) >= case.near
    assert psnr(faster.decode(faster.encode(wanted)), vae.decode(vae.encode(wanted))) >= case.near
    assert torch.equal(vae.decode(latent), wanted)


def controlnets_fall_back(case: Case) -> None:
    """Their residuals reach the layers that they are for."""
    model, layout = transfer.pair(KOALA_700M)[1], transfer.small(KOALA_700M)
    control = KoalaControlNet.execute(transfer.controlnet()).result[0]
    texts = transfer.conditioning(layout, transfer.hinted(control))
    for settings in (EXACT, BALANCED):
        wanted = transfer.sample(eagerly(model, settings), texts, steps=5)
        found = transfer.sample(case.faster(settings, model), texts, steps=5)
        assert float((found - wanted).abs().max()) <= 1e-2 * float(wanted.abs().max())
        assert ": a ControlNet adds to its layers" in case.said[-1]


def hooks_masks_and_areas(case: Case) -> None:
    """LoRAs that are scheduled, masks of the image, and prompts for parts of it."""
    hooks = scheduled_lora(0.2, (1.0, 0.0), (0.0, 0.5))
    case.same(texts=tuple(comfy.hooks.set_hooks_for_conditioning(side, hooks) for side in prompts()))
    assert "LoRAs that are scheduled or masked" in case.said[-1]
    mask = torch.zeros(1, 128, 128)
    mask[:, :, 64:] = 1
    case.same(latent={"samples": torch.ones(1, 4, 16, 16), "noise_mask": mask})
    positive, negative = prompts()
    other = prompts(["a blue square on a black background"])[0]
    left = core.ConditioningSetArea().append(positive, 64, 128, 0, 0, 1.0)[0]
    right = core.ConditioningSetArea().append(other, 64, 128, 64, 0, 1.0)[0]
    case.same(texts=(left + right, negative))
    assert "by CUDA graph; " in case.said[-1]
    assert case.said[-1].endswith(execution.FIRST)


def check(case: Callable[[Case], None], strategy: Strategy, near: float) -> None:
    """One of the above."""
    given = Case(strategy, near)
    try:
        case(given)
    finally:
        given.close()


ALL: tuple[Callable[[Case], None], ...] = (
    exact_equals_eager,
    branches_equal_eager,
    nothing_is_compiled_anew,
    a_size_is_captured_once,
    a_lora_under_a_captured_pass,
    weights_of_another_type,
    weights_moved_away_and_back,
    too_little_memory_for_a_capture,
    a_cancelled_run_leaves_nothing_wrong,
    add_ons_fall_back,
    controlnets_fall_back,
    hooks_masks_and_areas,
)


def put_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixture's body: a models/loras of one test's own, with an SDXL LoRA for koala-tiny."""
    import folder_paths
    from safetensors.torch import save_file

    from tools.synthetic import adapters

    known = folder_paths.folder_names_and_paths
    monkeypatch.setitem(known, "loras", ([str(tmp_path)], known["loras"][1]))
    save_file(adapters.lora(adapters.SMALL_SDXL, only=adapters.in_attention), tmp_path / "some.safetensors")
