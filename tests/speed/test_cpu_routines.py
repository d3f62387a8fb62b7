"""KOALA Accelerate's faster routines: how near they come, and what they leave alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.ops
import folder_paths
import pytest
import torch
from comfy.ldm.modules.attention import FeedForward
from comfy_extras.nodes_hypernetwork import HypernetworkLoader

from koala_sdxl.host.accelerate import cpu_routines as kernels
from koala_sdxl.host.accelerate.plan import BF16, EXACT, PRESETS, Acceleration
from tests.daily import daily
from tests.speed import sampling
from tests.speed.sampling import BASE, decibels, pictures, plain, prompts, run
from tools.measure import parity
from tools.tiny.evaluate import grid_prompts

said = pytest.fixture(sampling.said)
faster = pytest.fixture(sampling.faster)


def test_exact_routines_give_the_same_picture(faster: Callable[..., Any]) -> None:
    texts = prompts(grid_prompts(216)[0][::108])
    found, wanted = run(faster(PRESETS["exact"]), texts), plain(texts)
    assert not torch.equal(found, wanted)
    assert float((pictures(found) - pictures(wanted)).abs().max()) <= 1 / 255


def test_bf16_is_near_and_only_where_it_is_faster(faster: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    texts = prompts(grid_prompts(216)[0][5::108])
    exact = run(faster(Acceleration(EXACT)), texts)
    monkeypatch.setattr(kernels, "bf16_is_faster", lambda: False)
    assert torch.equal(run(faster(Acceleration(BF16)), texts), exact)
    monkeypatch.setattr(kernels, "bf16_is_faster", lambda: True)
    found = run(faster(Acceleration(BF16)), texts)
    assert found.dtype == torch.float32
    assert not torch.allclose(found, exact, atol=1e-4)
    assert decibels(found, exact) >= 39
    assert torch.equal(run(faster(Acceleration(EXACT)), texts), exact)


@pytest.mark.parametrize("first", daily([True, False], [False]), ids=["before it", "behind it"])
def test_a_patchs_own_layers_keep_their_type_in_bf16(
    first: bool, faster: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A hypernetwork's layers are in fp32, whatever the U-Net computes in."""
    monkeypatch.setattr(kernels, "bf16_is_faster", lambda: True)
    generator = torch.Generator().manual_seed(0)

    def layers(width: int) -> dict[str, torch.Tensor]:
        return {
            "linear.0.weight": 0.02 * torch.randn(2 * width, width, generator=generator),
            "linear.0.bias": torch.zeros(2 * width),
            "linear.1.weight": torch.ones(2 * width),
            "linear.1.bias": torch.zeros(2 * width),
            "linear.2.weight": 0.02 * torch.randn(width, 2 * width, generator=generator),
            "linear.2.bias": torch.zeros(width),
            "linear.3.weight": torch.ones(width),
            "linear.3.bias": torch.zeros(width),
        }

    content: dict[Any, Any] = {width: (layers(width), layers(width)) for width in (64, 96, 128)}
    torch.save(content | {"is_layer_norm": True, "activation_func": "relu"}, tmp_path / "some.pt")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "hypernetworks", ([str(tmp_path)], {".pt"}))

    def with_hypernetwork(model: Any) -> Any:
        return HypernetworkLoader.execute(model, "some.pt", 0.1).result[0]

    model, texts = parity.tiny_models()[0], prompts(grid_prompts(216)[0][5::108])
    in_fp32 = run(with_hypernetwork(model), texts)
    settings = Acceleration(BF16)
    accelerated = faster(settings, with_hypernetwork(model)) if first else with_hypernetwork(faster(settings))
    assert decibels(run(accelerated, texts), in_fp32) >= 35
    assert decibels(plain(texts), in_fp32) < 35


def feed_forward() -> Any:
    """A U-Net of one of ComfyUI's layers, random."""
    layer = FeedForward(24, glu=True, operations=comfy.ops.disable_weight_init)
    for weights in layer.parameters():
        torch.nn.init.normal_(weights, std=0.2)
    return torch.nn.Sequential(layer)


def test_a_feed_forward_layer_in_pieces_is_the_same_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, x = feed_forward(), torch.randn(2, 50, 24)
    rows: list[int] = []
    unet[0].net[0].register_forward_hook(lambda _, given, __: rows.append(given[0].numel() // 24))
    bytes_of_a_row = 2 * 4 * 24 * 4
    with torch.inference_mode():
        wanted = unet(x)
        with kernels.feed_forward_in_pieces(unet):
            assert torch.equal(unet(x), wanted)
        monkeypatch.setattr(kernels, "LARGE", 99 * bytes_of_a_row)
        monkeypatch.setattr(kernels, "PIECE", 32 * bytes_of_a_row)
        with kernels.feed_forward_in_pieces(unet):
            found = unet(x)
            assert unet(x[:, :49]).shape == (2, 49, 24)
        assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)
        assert torch.equal(unet(x), wanted)
    assert rows == [100, 100, 25, 25, 25, 25, 98, 100]


@pytest.mark.parametrize("changed", ["converts", "patched", "another node's"])
def test_other_feed_forward_layers_stay(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LARGE", 0)
    monkeypatch.setattr(kernels, "PIECE", 1)
    unet, x, calls = feed_forward(), torch.randn(1, 6, 24), []
    layer = unet[0]
    layer.net[0].register_forward_hook(lambda *_: calls.append(0))
    if changed == "converts":
        layer.half()
        x = x.half()
    elif changed == "patched":
        layer.net[2].weight_function = [lambda weights: weights]
    else:
        own = vars(layer)["forward"] = lambda x: layer.net(x) + 1
    with torch.inference_mode(), kernels.feed_forward_in_pieces(unet):
        unet(x)
    assert len(calls) == 1
    assert vars(layer).get("forward") is (own if changed == "another node's" else None)


def test_layers_are_as_before_when_a_run_breaks_off() -> None:
    unet = feed_forward()
    with pytest.raises(KeyboardInterrupt), kernels.feed_forward_in_pieces(unet):
        raise KeyboardInterrupt
    assert "forward" not in vars(unet[0])


def test_layers_of_another_type_give_their_inputs_type() -> None:
    rows, weight, bias = torch.randn(2, 5, 8).bfloat16(), torch.randn(3, 8), torch.randn(3)
    wanted = torch.nn.functional.linear(rows.float(), weight, bias).bfloat16()
    own = torch.nn.functional.linear(rows, weight.bfloat16())
    with kernels.ForeignLayers():
        assert torch.equal(torch.nn.functional.linear(rows, weight, bias=bias), wanted)
        assert torch.equal(torch.nn.functional.linear(input=rows, weight=weight.bfloat16()), own)


def test_an_attention_that_was_chosen_stays(faster: Callable[..., Any]) -> None:
    called = []

    def chosen(function: Any, *arguments: Any, **named: Any) -> Any:
        called.append(function)
        return function(*arguments, **named)

    model = parity.tiny_models()[0].clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = chosen
    run(faster(PRESETS["exact"], model), preset=BASE | {"steps": 1})
    assert called
