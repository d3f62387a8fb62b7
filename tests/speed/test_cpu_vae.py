"""KOALA Accelerate's VAE on the CPU: the same images, whatever computes them, and what it leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfy.ldm.modules.diffusionmodules.model import AttnBlock, ResnetBlock, normal_attention, pytorch_attention

from koala_sdxl.host.accelerate import cpu_vae, cpu_winograd
from koala_sdxl.host.accelerate.cpu_winograd import Activation, Memory
from koala_sdxl.host.accelerate.exchanged import with_methods
from koala_sdxl.host.accelerate.plan import BF16, EXACT, OFF
from tests.speed import sampling
from tests.speed.sampling import plain, prompts
from tools.measure import parity
from tools.tiny.evaluate import grid_prompts

by_winograd = pytest.fixture(sampling.by_winograd)


@pytest.mark.parametrize(("routines", "most"), [(EXACT, 0.1), (BF16, 6)])
def test_the_vae_by_other_routines(routines: str, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """``most``: by how much of 255 a pixel may differ."""
    monkeypatch.setattr(cpu_vae, "bf16_convolves_faster", lambda: True)
    monkeypatch.setattr(cpu_vae, "winograd_is_faster_for_large_images", lambda: False)
    vae = parity.tiny_models()[2]
    faster, words = cpu_vae.install(vae, routines)
    assert ("bf16" in words) == (routines == BF16)
    latent = plain(prompts(grid_prompts(216)[0][5::108]))
    wanted, found = vae.decode(latent), faster.decode(latent)
    assert not torch.equal(found, wanted)
    assert float((found - wanted).abs().max()) <= most / 255
    tiles = {"tile_x": 8, "tile_y": 8, "overlap": 2}
    assert float((faster.decode_tiled(latent, **tiles) - vae.decode_tiled(latent, **tiles)).abs().max()) <= most / 255
    code, again = vae.encode(wanted), faster.encode(wanted)
    assert not torch.equal(again, code)
    assert float((again - code).abs().max() / code.abs().max()) <= most / 100
    assert torch.equal(vae.decode(latent), wanted)
    assert cpu_vae.install(vae, OFF) == (vae, "")


def test_the_vae_by_winograds_algorithm(by_winograd: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the choice beside bf16, too, unless that is much faster: it keeps the image."""
    monkeypatch.setattr(cpu_vae, "bf16_convolves_faster", lambda: False)
    vae = parity.tiny_models()[2]
    faster, words = cpu_vae.install(vae, BF16)
    assert words == "VAE by NNPACK"
    latent = plain(prompts(grid_prompts(216)[0][5::108]))
    wanted, found = vae.decode(latent), faster.decode(latent)
    assert by_winograd
    assert not torch.equal(found, wanted)
    assert float((found - wanted).abs().max()) <= 0.1 / 255
    code, again = vae.encode(wanted), faster.encode(wanted)
    assert not torch.equal(again, code)
    assert float((again - code).abs().max() / code.abs().max()) <= 1e-3


def test_a_vae_that_computes_in_another_type_is_not_by_nnpack(by_winograd: list[tuple[int, ...]]) -> None:
    """As with --bf16-vae."""
    vae = copy.copy(parity.tiny_models()[2])
    vae.vae_dtype = torch.bfloat16
    assert cpu_vae.install(vae, EXACT)[1] == "VAE in channels_last"


def test_a_vaes_attention_is_pytorchs_while_it_decodes() -> None:
    vae = parity.tiny_models()[2]
    block = next(block for block in vae.first_stage_model.decoder.modules() if type(block) is AttnBlock)
    used: list[Any] = []
    hook = block.register_forward_pre_hook(lambda *_: used.append(block.optimized_attention))
    latent = torch.zeros(1, 4, 8, 8)
    try:
        cpu_vae.install(vae, EXACT)[0].decode(latent)
        vae.decode(latent)
    finally:
        hook.remove()
    assert used == [pytorch_attention, normal_attention]


def test_a_vaes_attention_that_was_chosen_stays_and_all_is_as_before_when_decoding_breaks_off() -> None:
    vae, other = AttnBlock(32), AttnBlock(32)
    vae.optimized_attention, other.optimized_attention = normal_attention, print
    both = torch.nn.ModuleList([vae, other])
    with cpu_vae.attention_by_pytorch(both):
        assert [block.optimized_attention for block in both] == [pytorch_attention, print]
    with pytest.raises(KeyboardInterrupt), cpu_vae.attention_by_pytorch(both):
        raise KeyboardInterrupt
    assert [block.optimized_attention for block in both] == [normal_attention, print]


# Strip by strip


def random_norm(channels: int) -> torch.nn.GroupNorm:
    norm = torch.nn.GroupNorm(4, channels, eps=1e-6).requires_grad_(False)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("into_added", [False, True])
@pytest.mark.parametrize(
    ("size", "workspace"),
    [((1, 40, 25), 2**28), ((5, 19, 31), 7 * 6 * 256 * (16 + 24)), ((2, 41, 24), 1)],
    ids=["whole", "two together", "bands"],
)
def test_what_is_before_and_after_a_convolution_is_computed_on_the_way(
    size: tuple[int, int, int],
    workspace: int,
    into_added: bool,
    by_winograd: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_winograd, "WORKSPACE", workspace)
    batch, height, width = size
    norm, memory = random_norm(24), Memory()
    for offset in (0.0, 3.0):
        x, added = torch.randn(batch, 24, height, width) + offset, torch.randn(batch, 16, height, width)
        weight, bias = torch.randn(16, 24, 3, 3), torch.randn(16)
        exactly = torch.nn.Conv2d(24, 16, 3, padding=1).double().requires_grad_(False)
        exactly.load_state_dict({"weight": weight, "bias": bias})
        wanted = exactly(torch.nn.functional.silu(copy.deepcopy(norm).double()(x.double()))) + added
        activation, out = Activation.of(norm, x), added if into_added else None
        found = cpu_winograd.convolve(x, weight, bias, activation, added, out, memory)
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    assert activation is not None


@pytest.mark.parametrize(("offset", "is_known"), [(0.0, True), (-30.0, True), (1e4, False), (float("nan"), False)])
def test_a_variance_that_sums_do_not_tell_is_left_to_the_norm(offset: float, is_known: bool) -> None:
    norm, x = random_norm(8), torch.randn(2, 8, 16, 16)
    x[1, 2:4] += offset
    assert (Activation.of(norm, x) is not None) == is_known


def residual_block(channels_out: int = 32) -> Any:
    """The host's, random, of 32 channels."""
    block = ResnetBlock(in_channels=32, out_channels=channels_out, temb_channels=0).eval().requires_grad_(False)
    for weights in block.parameters():
        torch.nn.init.normal_(weights, std=0.2)
    return torch.nn.Sequential(block)


@pytest.mark.parametrize("channels_out", [32, 64])
@pytest.mark.parametrize(("offset", "most"), [(0.0, 1e-5), (300.0, 1e-4)])
def test_a_residual_block_in_strips_is_the_same(
    channels_out: int, offset: float, most: float, by_winograd: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_winograd, "WORKSPACE", 1)
    network, x = residual_block(channels_out), torch.randn(2, 32, 33, 40) + offset
    given, normed, group_norm = x.clone(), list[int](), torch.nn.functional.group_norm

    def noted(*given: Any) -> torch.Tensor:
        normed.append(len(given))
        return group_norm(*given)

    with torch.inference_mode():
        wanted = network(x)
        monkeypatch.setattr(torch.nn.functional, "group_norm", noted)
        with cpu_vae.in_strips(network):
            found = network(x)
            assert "forward" in vars(network[0])
    assert float((found - wanted).norm() / (wanted - offset).norm()) < most
    assert torch.equal(x, given)
    assert by_winograd
    assert len(normed) == (1 if offset else 0)
    assert "forward" not in vars(network[0])


@pytest.mark.parametrize(
    "changed", ["hooked", "exchanged", "seamless", "circular", "patched", "in training", "with gradients", "in bf16"]
)
def test_other_residual_blocks_stay(changed: str, by_winograd: list[tuple[int, ...]]) -> None:
    network, x = residual_block(), torch.randn(1, 32, 33, 40)
    if changed == "hooked":
        network[0].norm1.register_forward_hook(lambda *_: None)
    elif changed == "exchanged":
        vars(network[0].swish)["forward"] = torch.nn.functional.silu
    elif changed == "seamless":  # as nodes that make an image's edges fit together do it
        layer = network[0].conv1
        layer._conv_forward = layer._conv_forward
    elif changed == "circular":
        network[0].conv2.padding_mode = "circular"
    elif changed == "patched":
        network[0].conv2.weight_function = [lambda weights: weights]
    elif changed == "in training":
        network.train()
    elif changed == "in bf16":
        network, x = network.bfloat16(), x.bfloat16()
    with torch.set_grad_enabled(changed == "with gradients"), cpu_vae.in_strips(network):
        assert "forward" not in vars(network[0])
        network(x)
    assert not by_winograd


def test_memory_is_used_again_for_the_same_purpose() -> None:
    memory = Memory()
    first, other = memory.take("some", 2, 3), memory.take("other", 2, 3)
    assert memory.take("some", 5).data_ptr() == first.data_ptr() != other.data_ptr()
    assert memory.take("some", 4, 4).shape == (4, 4)


# The VAE's methods


def test_a_copy_of_a_faster_vae_uses_its_own_network_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As core's Select VAE Device makes one."""
    vae: Any = parity.tiny_models()[2]
    ran: list[torch.nn.Module] = []
    by_itself: list[Any] = []
    monkeypatch.setattr(type(vae), "decode_tiled", lambda self, _: by_itself.append(self))

    def run(network: torch.nn.Module, method: Callable[..., torch.Tensor], *given: Any, **options: Any) -> torch.Tensor:
        ran.append(network)
        return method(*given, **options)

    faster, latent = with_methods(vae, run), torch.zeros(1, 4, 8, 8)
    copied: Any = copy.copy(faster)
    copied.first_stage_model = copy.copy(vae.first_stage_model)
    for one in (faster, copied):
        assert torch.equal(one.decode(latent), vae.decode(latent))
    assert ran == [vae.first_stage_model, copied.first_stage_model]
    assert isinstance(faster, type(vae))
    copied.device = torch.device("meta")
    copied.decode_tiled(latent)
    assert len(ran) == 2
    assert by_itself == [copied]


def test_a_method_that_another_node_has_put_on_a_vae_stays() -> None:
    given: Any = copy.copy(parity.tiny_models()[2])
    given.decode = lambda latent: -latent
    ran: list[torch.Tensor] = []

    def run(_: Any, method: Callable[..., torch.Tensor], latent: torch.Tensor) -> torch.Tensor:
        ran.append(latent)
        return method(latent)

    faster = with_methods(given, run)
    assert faster.decode(torch.ones(1)) == -1
    assert ran == [1]
