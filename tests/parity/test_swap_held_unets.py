"""KOALA U-Net Swap behind nodes whose functions hold SDXL's U-Net: none of it may run, or stay in memory, in KOALA."""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_freelunch import FreeU_V2
from comfy_extras.nodes_lumina2 import RenormCFG
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, RescaleCFG

from koala_sdxl.host.transfer.swap import swap
from koala_sdxl.koala.architecture.layout import KOALA_700M
from tests.parity.holders import (
    HOLDERS,
    attachment,
    attention_couple,
    bound_method,
    callback,
    called,
    first_block_cache,
    guidance,
    module_as_key,
    sampling_object,
    step_cache,
    unet_of,
)
from tools.measure import transfer
from tools.synthetic.adapters import SMALL_SDXL


def sampled(model: Any) -> torch.Tensor:
    return transfer.sample(model, transfer.conditioning(SMALL_SDXL), steps=2)


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
    assert "tests.parity.holders" in line or holder in (module_as_key, sampling_object, attachment)  # core's, or data
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


def test_cores_own_node_is_named_without_a_path() -> None:
    """ComfyUI loads its extra nodes as modules that have a path for a name."""
    whole, koala = transfer.pair(KOALA_700M)
    held = RenormCFG.execute(whole, 100.0, 1.0).result[0]
    held.model_options["sampler_cfg_function"].__module__ = "/home/me/ComfyUI/comfy_extras/nodes_lumina2"
    line = swap(held, koala).report.splitlines()[-1]
    assert "sampler_cfg_function of RenormCFG.execute in nodes_lumina2: SDXL's U-Net is in it" in line


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
