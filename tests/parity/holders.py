"""Stand-ins for other packs' nodes that leave something on a MODEL which holds its U-Net.

Each has the pattern of a published pack, in our own words: what it keeps hold of, and how. Each returns the name by
which KOALA U-Net Swap's report calls what it left.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from tools.measure import transfer
from tools.synthetic.adapters import SMALL_SDXL


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


def step_cache(model: Any, held: Any = None) -> str:
    """DeepCache's pattern: a wrapper around each pass with the U-Net, or what stands for it, in its closure."""
    unet = unet_of(model) if held is None else held

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
    return step_cache(model, copy.deepcopy(unet_of(model)))


def step_cache_by_weakref(model: Any) -> str:
    unet = weakref.ref(unet_of(model))

    def wrapper(apply: Any, arguments: Any) -> Any:
        return called(unet(), arguments, apply)

    model.set_model_unet_function_wrapper(wrapper)
    return "model_function_wrapper"


def step_cache_by_proxy(model: Any) -> str:
    return step_cache(model, weakref.proxy(unet_of(model)))


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
