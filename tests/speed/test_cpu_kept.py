"""What KOALA Accelerate keeps on the CPU for the time of a run: how often it is made, and that no image shows it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.ops
import pytest
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from torch.overrides import TorchFunctionMode

from koala_sdxl.host.accelerate import cpu_kept
from koala_sdxl.host.accelerate import cpu_routines as kernels
from koala_sdxl.host.accelerate.branches import Call
from koala_sdxl.host.accelerate.plan import BF16, EXACT, REUSE, Acceleration
from koala_sdxl.nodes.lora import KoalaHookLora
from tests.speed import execution_cases, sampling
from tests.speed.sampling import BASE, prompts, run
from tools.measure import parity

said = pytest.fixture(sampling.said)
faster = pytest.fixture(sampling.faster)

STEPS = 4
SHORT = {"preset": BASE | {"steps": STEPS}}
SETTINGS = (Acceleration(EXACT), Acceleration(BF16), Acceleration(BF16, REUSE["fast"]))
NAMES = ("exact", "bf16", "bf16 and reuse")


@pytest.fixture(autouse=True)
def in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every processor."""
    monkeypatch.setattr(kernels, "bf16_is_faster", lambda: True)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., torch.Tensor]:
    """``run`` with nothing kept."""

    def run_without(*arguments: Any, **named: Any) -> torch.Tensor:
        with monkeypatch.context() as patched:
            patched.setattr(cpu_kept.Kept, "used", lambda *_: nullcontext())
            return run(*arguments, **named)

    return run_without


class Products(TorchFunctionMode):
    """Counts products of so many rows of text, and weights by their places in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.of_text, self.weights = 0, Counter[int]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.linear:
            self.of_text += args[0].shape[-2:-1] == (77,)
            self.weights[args[1].data_ptr()] += 1
        return function(*args, **(kwargs or {}))


def text_layers() -> int:
    unet = parity.tiny_models()[0].model.diffusion_model
    return sum(2 for block in unet.modules() if isinstance(block, BasicTransformerBlock))


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
def test_the_image_is_the_same_bit_for_bit(
    settings: Acceleration, faster: Callable[..., Any], without: Callable[..., torch.Tensor]
) -> None:
    model, texts = faster(settings), prompts(("a red circle", "two blue squares on green"))
    assert torch.equal(run(model, texts), without(model, texts))


@pytest.mark.parametrize("settings", SETTINGS[:2], ids=NAMES[:2])
def test_keys_and_values_of_the_text_are_computed_once_in_a_run(
    settings: Acceleration, faster: Callable[..., Any], without: Callable[..., torch.Tensor]
) -> None:
    counted, every_step = Products(), Products()
    model, texts = faster(settings), prompts()
    with counted:
        run(model, texts, **SHORT)
        run(model, texts, **SHORT)
    with every_step:
        without(model, texts, **SHORT)
    assert (counted.of_text, every_step.of_text) == (2 * text_layers(), STEPS * text_layers())


def test_weights_are_converted_once_in_a_run(faster: Callable[..., Any], without: Callable[..., torch.Tensor]) -> None:
    model = faster(Acceleration(BF16))
    unet = model.model.diffusion_model
    layer = unet.output_blocks[0][0].in_layers[2]
    seen: list[torch.Tensor] = []
    with _before(layer, lambda: seen.append(layer.weight)):
        run(model, **SHORT)
        assert {weight.dtype for weight in seen} == {torch.bfloat16}
        assert len(seen) == STEPS
        assert len({id(weight) for weight in seen}) == 1
        seen.clear()
        without(model, **SHORT)
        assert {weight.dtype for weight in seen} == {torch.float32}


def test_a_run_that_breaks_off_leaves_the_layers_as_they_were(faster: Callable[..., Any]) -> None:
    model = faster(Acceleration(BF16))
    unet = model.model.diffusion_model

    def stop() -> None:
        raise KeyboardInterrupt

    own = {name: set(vars(layer)) for name, layer in unet.named_modules()}
    with pytest.raises(KeyboardInterrupt), _before(unet.out, stop):
        run(model, **SHORT)
    assert {name: set(vars(layer)) for name, layer in unet.named_modules()} == own
    assert {weight.dtype for weight in unet.parameters()} == {torch.float32}


def test_without_free_memory_weights_are_converted_at_every_step(
    faster: Callable[..., Any],
    without: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    model = faster(Acceleration(BF16))
    wanted = run(model, **SHORT)
    assert "at every step" not in caplog.text
    monkeypatch.setattr("comfy.model_management.get_free_memory", lambda *_: 2**28)
    assert torch.equal(run(model, **SHORT), wanted)
    told = [line for line in caplog.messages if "at every step" in line]
    assert len(told) == 1
    assert "torch.bfloat16" in told[0]
    assert told[0].endswith("free beside a step are 0.0 GiB.")


@pytest.fixture
def loras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execution_cases.put_lora(tmp_path, monkeypatch)


@pytest.mark.parametrize("settings", SETTINGS[:2], ids=NAMES[:2])
def test_a_lora_that_changes_between_runs_and_within_one_has_its_effect(
    settings: Acceleration, loras: None, faster: Callable[..., Any], without: Callable[..., torch.Tensor]
) -> None:
    model = parity.tiny_models()[0]
    before = run(faster(settings), **SHORT)
    patched = execution_cases.with_lora(model, 0.2)
    between = run(faster(settings, patched), **SHORT)
    assert not torch.equal(between, before)
    assert torch.equal(between, without(faster(settings, patched), **SHORT))
    hooks = KoalaHookLora.execute(model, "some.safetensors", 0.2, 1.0, "auto").result[0]
    keyframes = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((0.0, 0.0), (1.0, 0.3), (0.0, 0.6)):
        keyframes.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hooks.set_keyframes_on_hooks(keyframes)
    texts = prompts()
    within = (comfy.hooks.set_hooks_for_conditioning(texts[0], hooks), texts[1])
    found = run(faster(settings), within, **SHORT)
    assert not torch.equal(found, before)
    assert torch.equal(found, without(faster(settings), within, **SHORT))


@pytest.mark.parametrize("settings", SETTINGS[:2], ids=NAMES[:2])
def test_a_patch_that_writes_into_the_keys_does_so_once_a_step(
    settings: Acceleration, faster: Callable[..., Any], without: Callable[..., torch.Tensor]
) -> None:
    def doubled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        return comfy.ldm.modules.attention.optimized_attention(q, k.mul_(2), v, options["n_heads"])

    model = parity.tiny_models()[0].clone()
    model.set_model_attn2_replace(doubled, "output", 0, 0)
    accelerated = faster(settings, model)
    assert torch.equal(run(accelerated, **SHORT), without(accelerated, **SHORT))


def test_layers_that_another_node_changed_stay(
    faster: Callable[..., Any], without: Callable[..., torch.Tensor]
) -> None:
    model, texts = faster(Acceleration(BF16)), prompts()
    layers: list[Any] = [*cpu_kept._cross_attention_layers(model.model.diffusion_model)]
    counted = Products()
    run(model, texts, **SHORT)  # ComfyUI puts layers in order when it loads a MODEL
    layers[0].weight_function = [lambda weight: 2 * weight]
    vars(layers[1])["forward"] = lambda x: 2 * type(layers[1]).forward(layers[1], x)
    try:
        with counted:
            found = run(model, texts, **SHORT)
        assert torch.equal(found, without(model, texts, **SHORT))
        assert counted.of_text == len(layers) - 2 + 2 * STEPS
        assert "weight" not in vars(layers[0])
    finally:
        layers[0].weight_function = []
        del vars(layers[1])["forward"]


def test_of_many_texts_the_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    block = BasicTransformerBlock(8, 1, 8, context_dim=6, operations=comfy.ops.disable_weight_init)
    for weights in block.parameters():
        torch.nn.init.normal_(weights)
    unet = torch.nn.Sequential(block)
    made: list[int] = []
    model: Any = type("Model", (), {"current_hooks": None})()
    run_kept = cpu_kept.Kept(model, None)
    texts = [torch.randn(1, 5, 6) for _ in range(4)]
    bytes_of_a_text = 5 * 16 * 4
    monkeypatch.setattr(cpu_kept, "MOST_TEXT", 2 * bytes_of_a_text + 1)

    def use(text: torch.Tensor) -> bool:
        """Whether its keys were kept."""
        counted = Products()
        with torch.inference_mode(), run_kept.used(unet, _call(text)), counted:
            assert torch.equal(block.attn2.to_k(text), torch.nn.functional.linear(text, block.attn2.to_k.weight))
        made.append(len(run_kept._texts))
        return sum(counted.weights.values()) == 1

    assert [use(texts[i].clone()) for i in (0, 0, 1, 0, 2, 1, 2, 0)] == [
        False, True, False, True, False, True, True, False,
    ]  # fmt: skip
    assert max(made) == 2
    monkeypatch.setattr(cpu_kept, "MOST_TEXT", bytes_of_a_text - 1)
    assert [use(texts[3]), use(texts[3])] == [False, False]


def _call(text: torch.Tensor) -> Any:
    return Call(torch.zeros(1), torch.zeros(1), text, None, None, {})


def test_copies_are_equal_and_share_one_piece_of_memory() -> None:
    tensors = [torch.randn(3, 5), torch.randn(64), torch.randn(1, 2, 3, 4)]
    copies = cpu_kept._in_one_piece(tensors, torch.bfloat16)
    assert [copy.shape for copy in copies] == [tensor.shape for tensor in tensors]
    assert all(torch.equal(copy, tensor.bfloat16()) for copy, tensor in zip(copies, tensors, strict=True))
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1
    assert [copy.storage_offset() % cpu_kept.LINE for copy in copies] == [0, 0, 0]
    assert all(copy.is_contiguous() for copy in copies)


@contextmanager
def _before(layer: torch.nn.Module, call: Callable[[], Any]) -> Iterator[None]:
    """Call something before each call of a layer."""
    handle = layer.register_forward_pre_hook(lambda *_: call())
    try:
        yield
    finally:
        handle.remove()
