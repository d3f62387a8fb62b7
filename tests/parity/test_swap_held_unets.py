"""KOALA U-Net Swap behind nodes whose functions hold SDXL's U-Net: none of it may run, or stay in memory, in KOALA.

Each stand-in has the pattern of a published pack, in our own words: what it keeps hold of, and how.
"""

from __future__ import annotations

import copy
import functools
import gc
import types
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_freelunch import FreeU_V2
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, RescaleCFG

from koala_sdxl.host.transfer.swap import swap
from koala_sdxl.koala.architecture.layout import KOALA_700M
from tools.measure import transfer
from tools.synthetic.adapters import SMALL_SDXL


def sampled(model: Any) -> torch.Tensor:
    return transfer.sample(model, transfer.conditioning(SMALL_SDXL), steps=2)


def unet_of(model: Any) -> Any:
    return model.model.diffusion_model


def called(unet: Any, arguments: dict[str, Any], apply: Callable[..., Any]) -> torch.Tensor:
    """One pass of another U-Net in the place of the one that is sampled, as a whole-step cache runs it."""
    model: Any = apply.__self__  # type: ignore[attr-defined]
    sampled_unet, model.diffusion_model = model.diffusion_model, unet
    try:
        return apply(arguments["input"], arguments["timestep"], **arguments["c"])
    finally:
        model.diffusion_model = sampled_unet


# --- what packs leave on a MODEL ----------------------------------------------------------------------------------


def step_cache(model: Any) -> str:
    """DeepCache's pattern: a wrapper around each pass with the U-Net in its closure."""
    unet = unet_of(model)

    def wrapper(apply: Any, arguments: Any) -> Any:
        return called(unet, arguments, apply)

    model.set_model_unet_function_wrapper(wrapper)
    return "model_function_wrapper"


def step_cache_in_a_partial(model: Any) -> str:
    def wrapper(unet: Any, apply: Any, arguments: Any) -> Any:
        return called(unet, arguments, apply)

    model.set_model_unet_function_wrapper(functools.partial(wrapper, unet_of(model)))
    return "model_function_wrapper"


def step_cache_in_a_default(model: Any) -> str:
    whole = unet_of(model)

    def wrapper(apply: Any, arguments: Any, *, unet: Any = whole) -> Any:
        return called(unet, arguments, apply)

    model.set_model_unet_function_wrapper(wrapper)
    return "model_function_wrapper"


def step_cache_of_a_copy(model: Any) -> str:
    """A deep copy is SDXL, too."""
    unet = copy.deepcopy(unet_of(model))

    def wrapper(apply: Any, arguments: Any) -> Any:
        return called(unet, arguments, apply)

    model.set_model_unet_function_wrapper(wrapper)
    return "model_function_wrapper"


def step_cache_by_weakref(model: Any) -> str:
    unet = weakref.ref(unet_of(model))

    def wrapper(apply: Any, arguments: Any) -> Any:
        return called(unet(), arguments, apply)

    model.set_model_unet_function_wrapper(wrapper)
    return "model_function_wrapper"


def step_cache_by_proxy(model: Any) -> str:
    unet = weakref.proxy(unet_of(model))

    def wrapper(apply: Any, arguments: Any) -> Any:
        return called(unet, arguments, apply)

    model.set_model_unet_function_wrapper(wrapper)
    return "model_function_wrapper"


@dataclass
class FirstBlocks:
    """A first-block cache's pattern: an object that keeps lists of the U-Net's blocks."""

    blocks: dict[str, list[Any]]

    def __call__(self, executor: Any, x: Any, *arguments: Any, **further: Any) -> Any:
        self.blocks["input"][0](x)
        return executor(x, *arguments, **further)


def first_block_cache(model: Any) -> str:
    unet = unet_of(model)
    cached = FirstBlocks({"input": list(unet.input_blocks), "output": list(unet.output_blocks)})
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "first blocks", cached)
    return "diffusion_model wrapper"


class Slotted:
    __slots__ = ("module",)

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, q: Any, k: Any, v: Any, options: Any) -> Any:
        return self.module.to_out(q)


def attention_couple(model: Any) -> str:
    """Attention couple's pattern: each patch holds the attention module that it stands for."""
    for place in transfer.attention_places(SMALL_SDXL):
        blocks = {"input": "input_blocks", "output": "output_blocks"}
        block, number, index = place
        owner = unet_of(model).middle_block if block == "middle" else getattr(unet_of(model), blocks[block])[number]
        model.set_model_attn2_replace(Slotted(owner[1].transformer_blocks[index].attn2), *place)
    return "attn2 replacement"


class Keeper:
    """A patch whose ``self`` holds the MODEL."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def patch(self, n: Any, context: Any, value: Any, options: Any) -> Any:
        return n, context, value

    def after(self, arguments: Any) -> Any:
        return arguments["denoised"]


def bound_method(model: Any) -> str:
    model.set_model_attn1_patch(Keeper(model.clone()).patch)
    return "attn1_patch"


def guidance(model: Any) -> str:
    model.set_model_sampler_post_cfg_function(Keeper(model.model).after)
    return "sampler_post_cfg_function"


def by_module(model: Any) -> str:
    """Patches in a dict whose keys are modules."""
    scales = {module: 0.5 for module in unet_of(model).modules() if isinstance(module, torch.nn.Linear)}

    def patch(h: Any, options: Any) -> Any:
        return h * len(scales) / len(scales)

    model.set_model_input_block_patch(patch)
    return "input_block_patch"


def module_as_key(model: Any) -> str:
    model.model_options["transformer_options"]["scales"] = {unet_of(model).middle_block: 0.5}
    return "transformer option scales"


def weight_of_a_layer(model: Any) -> str:
    """A view of a weight: another object, the same memory."""
    weight = unet_of(model).out[2].weight.detach()[:1]

    def patch(h: Any, hsp: Any, options: Any) -> Any:
        return h + 0 * weight.sum(), hsp

    model.set_model_output_block_patch(patch)
    return "output_block_patch"


def class_attribute(model: Any) -> str:
    class Settings:
        unet = unet_of(model)

        def __call__(self, arguments: Any) -> Any:
            return arguments["denoised"]

    model.set_model_sampler_post_cfg_function(Settings())
    return "sampler_post_cfg_function"


def callback(model: Any) -> str:
    unet = unet_of(model)
    model.add_callback(CallbacksMP.ON_PRE_RUN, lambda _: unet.eval())
    return "on_pre_run callback"


def sampling_object(model: Any) -> str:
    """An object patch that holds the model that it was made from."""
    made = copy.copy(model.get_model_object("model_sampling"))
    made.of_model = [model.model]
    model.add_object_patch("model_sampling", made)
    return "object patch model_sampling"


def attachment(model: Any) -> str:
    model.set_attachments("unets", (unet_of(model),))
    return "attachment unets"


def nested(model: Any) -> str:
    """Deep inside plain containers and objects."""
    inner: Any = unet_of(model)
    for _ in range(60):
        inner = types.SimpleNamespace(inner=[{"held": (inner,)}])

    def patch(arguments: Any) -> Any:
        return arguments["denoised"] if inner else None

    model.set_model_sampler_post_cfg_function(patch)
    return "sampler_post_cfg_function"


HOLDERS = (
    step_cache,
    step_cache_in_a_partial,
    step_cache_in_a_default,
    step_cache_of_a_copy,
    step_cache_by_weakref,
    step_cache_by_proxy,
    first_block_cache,
    attention_couple,
    bound_method,
    guidance,
    by_module,
    module_as_key,
    weight_of_a_layer,
    class_attribute,
    callback,
    sampling_object,
    attachment,
    nested,
)


# --- the tests ----------------------------------------------------------------------------------------------------


def reached(start: Any, targets: Iterable[Any]) -> list[Any]:
    """Those of ``targets`` that can be reached from an object, weak references included, but not by way of modules'
    globals, classes or code."""
    wanted, seen, open_ = set(map(id, targets)), {id(start): start}, [start]
    found = []
    while open_:
        held = open_.pop()
        if id(held) in wanted:
            found.append(held)
        if isinstance(held, types.FunctionType):
            inner = [held.__closure__, held.__defaults__, held.__kwdefaults__, vars(held)]
        elif isinstance(held, types.ModuleType | types.CodeType | type):
            inner = []
        elif type(held) is weakref.ref:
            inner = [held()]
        else:
            inner = gc.get_referents(held)
        for each in inner:
            if id(each) not in seen:
                seen[id(each)] = each
                open_.append(each)
    return found


def own_parts(model: Any) -> list[Any]:
    unet = unet_of(model)
    return [model.model, *unet.modules(), *unet.parameters()]


def test_the_walk_of_these_tests_finds_what_is_there() -> None:
    whole, koala = transfer.pair(KOALA_700M)
    held = whole.clone()
    step_cache(held)
    assert reached(held.model_options, own_parts(whole))
    assert not reached(koala, own_parts(whole))


@pytest.mark.parametrize("holder", HOLDERS, ids=lambda holder: holder.__name__)
def test_what_holds_sdxls_unet_is_dropped_and_named(holder: Callable[[Any], str]) -> None:
    whole, koala = transfer.pair(KOALA_700M)
    held = whole.clone()
    what = holder(held)
    swapped, report = swap(held, koala)
    assert reached(swapped, own_parts(whole)) == []
    (line,) = [line for line in report.splitlines() if line.startswith("dropped: ")]
    assert what in line
    assert "test_swap_held_unets" in line or holder in (module_as_key, sampling_object, attachment)  # core's, or data
    assert "SDXL's U-Net" in line
    assert line.endswith("put that node behind the swap")
    torch.testing.assert_close(sampled(swapped), sampled(koala), rtol=0, atol=0)


def test_the_node_that_set_it_is_named() -> None:
    whole, koala = transfer.pair(KOALA_700M)

    class DeepCacheLike:
        def apply(self, model: Any) -> Any:
            unet = unet_of(model)
            model.set_model_unet_function_wrapper(lambda apply, arguments: called(unet, arguments, apply))
            return model

    DeepCacheLike.apply.__module__ = "/home/me/ComfyUI/custom_nodes/deep-cache-like.nodes"
    held = DeepCacheLike().apply(whole.clone())
    held.model_options["model_function_wrapper"].__module__ = DeepCacheLike.apply.__module__
    line = swap(held, koala).report.splitlines()[-1]
    assert "DeepCacheLike.apply" in line
    assert "<locals>" not in line
    assert "deep-cache-like" in line
    assert "/home/me" not in line


def test_as_many_patches_as_were_dropped_are_said() -> None:
    whole, koala = transfer.pair(KOALA_700M)
    held = whole.clone()
    attention_couple(held)
    assert "70 attn2 replacements" in swap(held, koala).report.splitlines()[-1]


def test_all_functions_of_one_node_go_together() -> None:
    """A cache whose wrapper inside the U-Net goes cannot do with the one around sampling alone."""
    whole, koala = transfer.pair(KOALA_700M)
    held = whole.clone()
    first_block_cache(held)
    calls = []

    def outer(executor: Any, *arguments: Any, **further: Any) -> Any:
        calls.append("outer")
        return executor(*arguments, **further)

    held.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "first blocks", outer)
    held.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "another node", outer)
    swapped, report = swap(held, koala)
    assert "outer_sample wrapper of" in report
    assert "it belongs to another of the same node (first blocks)" in report
    sampled(swapped)
    assert calls == ["outer"]
    assert not swapped.wrappers[WrappersMP.DIFFUSION_MODEL].get("first blocks")


def test_what_is_free_of_it_is_carried_over() -> None:
    """Functions that know numbers, tensors of their own and the sampling are carried over, beside one that is not."""
    whole, koala = transfer.pair(KOALA_700M)
    held = FreeU_V2.execute(whole, 1.1, 1.2, 0.9, 0.2).result[0]
    held = ModelSamplingDiscrete().patch(held, "eps", True)[0]
    held = RescaleCFG().patch(held, 0.7)[0]
    sampling, own = held.get_model_object("model_sampling"), torch.nn.Linear(4, 4)

    def gated(arguments: Any) -> Any:
        own(torch.zeros(1, 4))
        return arguments["denoised"] * (1 if sampling.percent_to_sigma(0.5) else 0)

    held.set_model_sampler_post_cfg_function(gated)
    guidance(held)
    swapped, report = swap(held, koala)
    assert swapped.model_options["sampler_post_cfg_function"] == [gated]
    assert swapped.model_options["sampler_cfg_function"] is held.model_options["sampler_cfg_function"]
    assert swapped.get_model_object("model_sampling") is sampling
    (line,) = [line for line in report.splitlines() if line.startswith("dropped: ")]
    assert "Keeper.after" in line


CORES: dict[str, Callable[[Any], Any]] = {
    "EasyCache": lambda model: EasyCacheNode.execute(model, 0.2, 0.15, 0.95, False),
    "LazyCache": lambda model: LazyCacheNode.execute(model, 0.2, 0.15, 0.95, False),
    "FreeU": lambda model: FreeU_V2.execute(model, 1.1, 1.2, 0.9, 0.2),
    "Differential Diffusion": lambda model: DifferentialDiffusion.execute(model, 1.0),
}


@pytest.mark.parametrize("node", CORES)
def test_cores_nodes_are_carried_over_after_a_run_too(node: str) -> None:
    """What a function remembers of a run on SDXL is not its U-Net."""
    whole, koala = transfer.pair(KOALA_700M)
    patched = CORES[node](whole).result[0]
    sampled(patched)
    swapped, report = swap(patched, koala)
    assert "dropped" not in report
    assert reached(swapped, own_parts(whole)) == []


def test_a_forward_that_was_replaced_on_a_module_is_named(tmp_path: Path) -> None:
    """What a node changed on SDXL's modules themselves stays there, and the report says that it has no effect here."""
    whole, koala = transfer.model(SMALL_SDXL, transfer.sdxl_weights(), tmp_path), transfer.pair(KOALA_700M)[1]

    def forward(self: Any, *arguments: Any, **further: Any) -> Any:
        return type(self).forward(self, *arguments, **further)

    middle = unet_of(whole).middle_block
    middle.forward = types.MethodType(forward, middle)
    swapped, report = swap(whole, koala)
    (line,) = [line for line in report.splitlines() if line.startswith("dropped: ")]
    assert "forward of 1 module" in line
    assert "middle_block" in line
    assert reached(swapped, own_parts(whole)) == []


def test_sdxl_is_let_go_behind_such_nodes(tmp_path: Path) -> None:
    whole = transfer.model(SMALL_SDXL, transfer.sdxl_weights(), tmp_path)
    held = whole.clone()
    for holder in (step_cache, first_block_cache, attention_couple, bound_method, callback, attachment):
        holder(held)
    swapped = swap(held, transfer.pair(KOALA_700M)[1]).model
    sampled(swapped)
    network = weakref.ref(unet_of(whole))
    comfy.model_management.unload_all_models()
    del whole, held
    gc.collect()
    comfy.model_management.cleanup_models()
    gc.collect()
    assert network() is None


def test_what_is_too_large_to_be_searched_is_dropped_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is shown to be free of SDXL's U-Net is carried over."""
    from koala_sdxl.host.transfer import references

    whole, koala = transfer.pair(KOALA_700M)
    held = whole.clone()
    chain: Any = []
    for _ in range(5000):
        chain = [chain]
    held.set_attachments("chain", chain)
    assert swap(held, koala).model.get_attachment("chain") is chain
    monkeypatch.setattr(references, "MOST_OBJECTS", 1000)
    swapped, report = swap(held, koala)
    assert swapped.get_attachment("chain") is None
    assert "attachment chain" in report
