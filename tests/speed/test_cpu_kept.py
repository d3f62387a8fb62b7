"""What KOALA Accelerate keeps on the CPU for the time of a run: how often it is made, and that no image shows it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import comfy.hooks
import comfy.ops
import pytest
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy_api.torch_helpers import set_torch_compile_wrapper
from torch.overrides import TorchFunctionMode

from koala_sdxl.host.accelerate import cpu_kept
from koala_sdxl.host.accelerate import cpu_routines as kernels
from koala_sdxl.host.accelerate.branches import Call
from koala_sdxl.host.accelerate.plan import BF16, EXACT, REUSE, Acceleration
from tests.speed import execution_cases, sampling
from tests.speed.sampling import BASE, prompts, run
from tools.measure import parity

said = pytest.fixture(sampling.said)
faster = pytest.fixture(sampling.faster)
loras = pytest.fixture(execution_cases.put_lora)

LAYERS = (torch.nn.Linear, torch.nn.Conv2d)
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


class Seen(TorchFunctionMode):
    """How many products of 77 rows, a text's, there are, and where weights in bf16 lie in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.of_text, self.places = 0, set[int]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.nn.functional.linear, torch.nn.functional.conv2d):
            self.of_text += args[0].dim() == 3 and args[0].shape[1] == 77
            self.places |= {args[1].untyped_storage().data_ptr()} if args[1].dtype is torch.bfloat16 else set()
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
    kept, every_step = Seen(), Seen()
    model, texts = faster(settings), prompts()
    with kept:
        run(model, texts, **SHORT)
        run(model, texts, **SHORT)
    with every_step:
        without(model, texts, **SHORT)
    assert (kept.of_text, every_step.of_text) == (2 * text_layers(), STEPS * text_layers())


def test_weights_are_kept_in_one_piece_of_memory(
    faster: Callable[..., Any], without: Callable[..., torch.Tensor]
) -> None:
    kept, every_step, short = Seen(), Seen(), Seen()
    model = faster(Acceleration(BF16))
    with kept:
        run(model, **SHORT)
    with every_step:
        without(model, **SHORT)
    with short:
        run(model, preset=BASE | {"steps": cpu_kept.MIN_STEPS - 1})
    assert len(kept.places) == 1
    assert len(every_step.places) > 1
    assert len(short.places) > 1


def test_a_run_that_breaks_off_leaves_the_layers_as_they_were(faster: Callable[..., Any]) -> None:
    model = faster(Acceleration(BF16))
    unet = model.model.diffusion_model

    def stop() -> None:
        raise KeyboardInterrupt

    own = {name: set(vars(layer)) for name, layer in unet.named_modules()}
    with pytest.raises(KeyboardInterrupt), _before(unet.out, stop):
        run(model, **SHORT)
    assert {name: set(vars(layer)) for name, layer in unet.named_modules()} == own


def test_nothing_is_held_after_a_run(faster: Callable[..., Any]) -> None:
    held: list[dict[str, Any]] = []
    model = faster(Acceleration(BF16))

    def hold(n: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        held.append(options)
        return n

    model.set_model_attn2_output_patch(hold)
    run(model, **SHORT)
    of_run = held[0][cpu_kept.KEY]
    assert (of_run._texts, of_run._weights) == ([], {})


@pytest.mark.parametrize("missing", [0, 1])
def test_weights_are_kept_where_memory_is_free_beside_a_step(
    missing: int,
    faster: Callable[..., Any],
    without: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """ComfyUI must be able to go on computing prompt and negative prompt at once."""
    caplog.set_level(logging.INFO)
    model = faster(Acceleration(BF16))
    wanted = without(model, **SHORT)
    layers = [layer for layer in model.model.diffusion_model.modules() if isinstance(layer, LAYERS)]
    weights = 2 * sum(weights.numel() for layer in layers for weights in layer.parameters())
    one_pass = model.memory_required([2, 4, 16, 16])
    monkeypatch.setattr("comfy.model_management.minimum_inference_memory", lambda: one_pass // 4)
    monkeypatch.setattr("comfy.model_management.get_free_memory", lambda *_: weights + 1.5 * one_pass - missing)
    seen = Seen()
    with seen:
        assert torch.equal(run(model, **SHORT), wanted)
    assert (len(seen.places) == 1) == (not missing)
    told = [line for line in caplog.messages if "at every step" in line]
    assert len(told) == missing
    assert not told or "torch.bfloat16" in told[0]


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
    hooks = execution_cases.scheduled_lora(0.2, (0.0, 0.0), (1.0, 0.3), (0.0, 0.6))
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


def test_what_a_patch_gives_in_fp32_is_computed_with_the_exact_weights(
    faster: Callable[..., Any], without: Callable[..., torch.Tensor]
) -> None:
    model = parity.tiny_models()[0].clone()
    last = len(model.model.diffusion_model.output_blocks) - 1  # the one without attention, which takes one type alone

    def in_fp32(h: torch.Tensor, skipped: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return (h.float(), skipped.float()) if options["block"] == ("output", last) else (h, skipped)

    model.set_model_output_block_patch(in_fp32)
    accelerated = faster(Acceleration(BF16), model)
    found = run(accelerated, **SHORT)
    assert torch.equal(found, without(accelerated, **SHORT))
    assert not torch.equal(found, run(faster(Acceleration(BF16)), **SHORT))


def test_layers_that_another_node_changed_stay(
    faster: Callable[..., Any], without: Callable[..., torch.Tensor]
) -> None:
    model, texts, seen = faster(Acceleration(BF16)), prompts(), Seen()
    layers: list[Any] = [*cpu_kept._text_layers(model.model.diffusion_model)]
    during: list[set[str]] = []

    def doubled(weight: torch.Tensor) -> torch.Tensor:
        during.append({"forward", "weight"} & set(vars(layers[0])))
        return 2 * weight

    run(model, texts, **SHORT)  # ComfyUI puts layers in order when it loads a MODEL
    layers[0].weight_function = [doubled]
    own = vars(layers[1])["forward"] = lambda x: 2 * type(layers[1]).forward(layers[1], x)
    try:
        with seen:
            found = run(model, texts, **SHORT)
        assert torch.equal(found, without(model, texts, **SHORT))
        assert vars(layers[1])["forward"] is own
    finally:
        layers[0].weight_function = []
        del vars(layers[1])["forward"]
    assert seen.of_text == len(layers) - 2 + 2 * STEPS
    assert during == 2 * STEPS * [set()]


def test_a_unet_that_is_compiled_keeps_nothing(faster: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = faster(Acceleration(BF16))
    set_torch_compile_wrapper(model, backend="eager")
    monkeypatch.setattr(cpu_kept, "Kept", None)
    run(model, preset=BASE | {"steps": 1})


def _block() -> tuple[BasicTransformerBlock, torch.nn.Module, Any]:
    """A transformer block, random, the U-Net it is in, and the MODEL that this is in."""
    block = BasicTransformerBlock(8, 1, 8, context_dim=6, operations=comfy.ops.disable_weight_init)
    for weights in block.parameters():
        torch.nn.init.normal_(weights)
    unet = torch.nn.Sequential(block)
    return block, unet, SimpleNamespace(current_hooks=None, model=SimpleNamespace(diffusion_model=unet))


def _call(text: torch.Tensor) -> Call:
    return Call(torch.zeros(1), torch.zeros(1), text, None, None, {})


def test_of_many_texts_the_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    block, unet, model = _block()
    of_run = cpu_kept.Kept(model, None, torch.Size())
    texts = [torch.randn(1, 77, 6) for _ in range(4)]
    bytes_of_a_text = 77 * 16 * 4
    monkeypatch.setattr(cpu_kept, "MOST_TEXT", 2 * bytes_of_a_text + 1)
    most: list[int] = []

    def is_known(text: torch.Tensor) -> bool:
        seen = Seen()
        wanted = torch.nn.functional.linear(text, block.attn2.to_k.weight)
        with torch.inference_mode(), of_run.used(unet, _call(text)), seen:
            assert torch.equal(block.attn2.to_k(text), wanted)
        most.append(len(of_run._texts))
        return not seen.of_text

    found = [is_known(texts[i].clone()) for i in (0, 0, 1, 0, 2, 1, 2, 0)]
    assert found == [False, True, False, True, False, True, True, False]
    assert max(most) == 2
    is_known(torch.randn(1, 38, 6))  # a text of another length takes the place of one
    assert [is_known(texts[0]), is_known(texts[2])] == [True, False]
    assert sum(known.size for known in of_run._texts) <= cpu_kept.MOST_TEXT
    monkeypatch.setattr(cpu_kept, "MOST_TEXT", bytes_of_a_text - 1)
    assert [is_known(texts[3]), is_known(texts[3])] == [False, False]


def test_another_unet_and_one_with_gradients_stay_and_a_pass_within_a_pass_changes_nothing() -> None:
    block, unet, model = _block()
    of_run, call = cpu_kept.Kept(model, None, torch.Size()), _call(torch.randn(1, 77, 6))

    def is_changed() -> bool:
        return "forward" in vars(block.attn2.to_k)

    with torch.no_grad(), of_run.used(torch.nn.Sequential(block), call):
        assert not is_changed()
    with torch.enable_grad(), of_run.used(unet, call):
        assert not is_changed()
    with torch.no_grad(), of_run.used(unet, call):
        assert is_changed()
        with cpu_kept.Kept(model, None, torch.Size()).used(unet, call):
            assert is_changed()
        assert is_changed()
    assert not is_changed()


def test_copies_are_equal_and_share_one_piece_of_memory() -> None:
    tensors = [torch.randn(3, 5), torch.randn(64), torch.randn(1, 2, 3, 4)]
    copies = cpu_kept._in_one_piece(tensors, torch.bfloat16)
    assert [copy.shape for copy in copies] == [tensor.shape for tensor in tensors]
    assert all(torch.equal(copy, tensor.bfloat16()) for copy, tensor in zip(copies, tensors, strict=True))
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1
    assert [copy.storage_offset() % cpu_kept.ALIGNMENT for copy in copies] == [0, 0, 0]
    assert all(copy.is_contiguous() for copy in copies)


@contextmanager
def _before(layer: torch.nn.Module, call: Callable[[], Any]) -> Iterator[None]:
    """Call something before each call of a layer."""
    handle = layer.register_forward_pre_hook(lambda *_: call())
    try:
        yield
    finally:
        handle.remove()
