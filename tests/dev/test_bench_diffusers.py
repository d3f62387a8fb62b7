"""diffusers' engines do what diffusers' own pipeline and documentation do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler
from torch._inductor import config as inductor

from tools.measure.bench import diffusers_engine
from tools.measure.bench.diffusers_engine import FLAGS, Diffusers, Fast, Offloading, in_tiles
from tools.measure.bench.engines import Job


def job(steps: int = 3, px: int = 64) -> Job:
    """Some steps of one image."""
    return Job(torch.ones(1, 4, px // 8, px // 8), torch.ones(2, 77, 8), torch.ones(2, 8), steps)


class UNet:
    """Predicts nothing, and notes what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def __call__(self, x: torch.Tensor, *_: Any, **__: Any) -> Any:
        self.told.append("computed")
        return SimpleNamespace(sample=torch.zeros_like(x))

    def fuse_qkv_projections(self) -> None:
        self.told.append("fused")

    def to(self, **given: Any) -> None:
        self.told.append(given)

    def compile(self, **given: Any) -> None:
        self.told.append(given)


def test_times_are_where_the_steps_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each step would wait for the GPU, which the pipeline's do not."""
    places: list[Any] = []
    plain = EulerDiscreteScheduler.set_timesteps

    def set_timesteps(self: Any, steps: int, device: Any = None) -> None:
        places.append(device)
        plain(self, steps, device=device)

    monkeypatch.setattr(EulerDiscreteScheduler, "set_timesteps", set_timesteps)
    engine = Diffusers("cpu")
    engine.unet = UNet()
    assert engine.denoise(job()).shape == (1, 4, 8, 8)
    assert (places, engine.unet.told) == (["cpu"], ["computed"] * 3)


def test_the_fast_settings_are_those_of_the_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FLAGS:
        monkeypatch.setattr(inductor, name, getattr(inductor, name))  # so that it is as before afterwards
    engine = Fast("cuda")
    engine.unet = UNet()
    engine._speed_up()
    channels_last = {"memory_format": torch.channels_last}
    assert engine.unet.told == ["fused", channels_last, {"mode": "max-autotune", "fullgraph": True}]
    assert {name: getattr(inductor, name) for name in FLAGS} == FLAGS
    assert not inductor.epilogue_fusion


def test_each_step_of_a_captured_graph_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Fast("cpu")
    engine.unet = UNet()
    monkeypatch.setattr(
        diffusers_engine.torch.compiler, "cudagraph_mark_step_begin", lambda: engine.unet.told.append("a new step")
    )
    engine.denoise(job(2))
    assert engine.unet.told == ["a new step", "computed"] * 2


def test_with_offload_1024_px_are_decoded_in_tiles_and_the_gpu_is_free_afterwards() -> None:
    channels = [4, 4, 4, 4]
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=channels,
        norm_num_groups=1,
        layers_per_block=1,
        sample_size=1024,
    ).eval()
    sides: list[tuple[int, ...]] = []
    vae.decoder.register_forward_pre_hook(lambda _, given: sides.append(tuple(given[0].shape[2:])))
    freed: list[int] = []
    engine = Offloading("cpu")
    engine.vae, engine.pipe = vae, SimpleNamespace(maybe_free_model_hooks=lambda: freed.append(len(sides)))
    in_tiles(vae)
    with torch.inference_mode():
        assert engine.decode(torch.zeros(1, 4, 128, 128)).shape == (1, 1024, 1024, 3)
    assert len(sides) == 9
    assert max(sides) == (64, 64)
    assert freed == [9]
