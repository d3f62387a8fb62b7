"""The guard on a KOALA MODEL: every stock sampler refuses, or samples, what KOALA Sampler does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.sd
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_custom_sampler import (
    BasicGuider,
    CFGGuider,
    DualCFGGuider,
    KSamplerSelect,
    RandomNoise,
    SamplerCustom,
    SamplerCustomAdvanced,
)
from comfy_extras.nodes_freelunch import FreeU_V2
from comfy_extras.nodes_model_merging import ModelMergeSimple
from comfy_extras.nodes_perpneg import PerpNegGuider

import nodes as core
from koala_sdxl.host.accelerate import patch
from koala_sdxl.host.accelerate.plan import OFF, Acceleration, Reuse, Table
from koala_sdxl.host.transfer import guard
from koala_sdxl.host.transfer.lora import apply_lora
from koala_sdxl.host.transfer.references import UNetSearch
from koala_sdxl.host.transfer.swap import swap
from koala_sdxl.koala.architecture.layout import KOALA_700M, KOALA_TINY
from koala_sdxl.nodes.adapt import KoalaAttentionPatches, KoalaControlNet
from koala_sdxl.nodes.sample import KoalaSampler, KoalaScheduler
from tests.daily import daily
from tests.parity.test_addons import keep
from tests.parity.test_controlnet_node import t2i_adapter
from tests.parity.test_controlnet_packs import Delegating
from tools.measure import parity, transfer
from tools.synthetic import adapters
from tools.synthetic.adapters import SMALL_SDXL

Graph = tuple[Any, Any, Any]
"""A MODEL, a positive and a negative CONDITIONING."""

SEED, CFG = 7, 2.0
STEPS, OF, DENOISE = 3, 5, 0.6
"""The last 3 of 5 steps: there KSampler's noise levels (ddim_uniform) are KOALA Sampler's but for the last digit, and
the scale of the first noise is the same."""


def koala() -> Any:
    return parity.tiny_models()[0]


def latent() -> dict[str, torch.Tensor]:
    return {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))}


def plain(seed: int = 3) -> Any:
    return transfer.conditioning(KOALA_TINY, seed=seed)


# --- the samplers -------------------------------------------------------------------------------------------------


def by_koala_sampler(model: Any, positive: Any, negative: Any) -> torch.Tensor:
    preset = {"preset": "custom", "steps": OF, "cfg": CFG, "spacing": "leading"}
    made = KoalaSampler.execute(model, positive, negative, latent(), SEED, preset, "euler", DENOISE)
    return made.result[0]["samples"]


def by_ksampler(model: Any, positive: Any, negative: Any) -> torch.Tensor:
    inputs = (SEED, STEPS, CFG, "euler", "ddim_uniform", positive, negative, latent(), DENOISE)
    return core.KSampler().sample(model, *inputs)[0]["samples"]


def by_ksampler_advanced(model: Any, positive: Any, negative: Any) -> torch.Tensor:
    inputs = ("enable", SEED, OF, CFG, "euler", "ddim_uniform", positive, negative, latent(), OF - STEPS, OF, "disable")
    return core.KSamplerAdvanced().sample(model, *inputs)[0]["samples"]


def sigmas(model: Any) -> torch.Tensor:
    return KoalaScheduler.execute(model, OF, "leading", DENOISE).result[0]


def euler() -> Any:
    return KSamplerSelect.execute("euler").result[0]


def by_sampler_custom(model: Any, positive: Any, negative: Any) -> torch.Tensor:
    inputs = (True, SEED, CFG, positive, negative, euler(), sigmas(model), latent())
    return SamplerCustom.execute(model, *inputs).result[0]["samples"]


def advanced(guider: Any, model: Any) -> torch.Tensor:
    noise = RandomNoise.execute(SEED).result[0]
    return SamplerCustomAdvanced.execute(noise, guider, euler(), sigmas(model), latent()).result[0]["samples"]


def by_sampler_custom_advanced(model: Any, positive: Any, negative: Any) -> torch.Tensor:
    return advanced(CFGGuider.execute(model, positive, negative, CFG).result[0], model)


SAMPLERS: dict[str, Callable[..., torch.Tensor]] = {
    "KSampler": by_ksampler,
    "KSamplerAdvanced": by_ksampler_advanced,
    "SamplerCustom": by_sampler_custom,
    "SamplerCustomAdvanced": by_sampler_custom_advanced,
}
SAME_SIGMAS = ("SamplerCustom", "SamplerCustomAdvanced")
samplers = pytest.mark.parametrize("sampler", daily(SAMPLERS, ("KSampler", "SamplerCustomAdvanced")))
"""By day the others, too, in the real server: tests/host/test_guard_nodes.py."""
GUIDERS: dict[str, Callable[..., Any]] = {
    "BasicGuider": lambda model, positive, _: BasicGuider.execute(model, positive),
    "CFGGuider": lambda model, positive, negative: CFGGuider.execute(model, positive, negative, CFG),
    "DualCFGGuider, first": lambda model, positive, negative: DualCFGGuider.execute(
        model, positive, plain(5), negative, CFG, CFG, "regular"
    ),
    "DualCFGGuider, second": lambda model, positive, negative: DualCFGGuider.execute(
        model, plain(5), positive, negative, CFG, CFG, "nested"
    ),
    "PerpNegGuider, positive": lambda model, positive, negative: PerpNegGuider.execute(
        model, positive, negative, plain(5), CFG, 1.0
    ),
    "PerpNegGuider, empty": lambda model, positive, negative: PerpNegGuider.execute(
        model, plain(5), negative, positive, CFG, 1.0
    ),
}


# --- the add-ons: as SDXL has them, and adapted --------------------------------------------------------------------


def with_controlnet(adapted: bool, _: Path) -> Graph:
    return koala(), *controlled(transfer.controlnet(), adapted)


def with_t2i_adapter(adapted: bool, folder: Path) -> Graph:
    return koala(), *controlled(t2i_adapter(folder), adapted)


def controlled(control: Any, adapted: bool) -> tuple[Any, Any]:
    control = KoalaControlNet.execute(control).result[0] if adapted else control
    return transfer.conditioning(KOALA_TINY, transfer.hinted(control)), plain(4)


def with_ip_adapter(adapted: bool, _: Path) -> Graph:
    model = transfer.ip_adapter(koala(), keep)
    return KoalaAttentionPatches.execute(model).result[0] if adapted else model, plain(), plain(4)


def with_lora(adapted: bool, _: Path) -> Graph:
    state = adapters.lora(SMALL_SDXL)
    with transfer.on_disk(state) as path:
        ours = apply_lora(koala(), transfer.clip(), path, 1.0, 0.0).model
    stock, _clip = comfy.sd.load_lora_for_models(koala(), None, state, 1.0, 0.0)
    return ours if adapted else stock, plain(), plain(4)


ADD_ONS: dict[str, tuple[Callable[[bool, Path], Graph], str]] = {
    "ControlNet": (with_controlnet, "the conditioning has a ControlNet with SDXL's residuals; koala-tiny has other la"),
    "T2I-Adapter": (with_t2i_adapter, "the conditioning has a ControlNet with SDXL's residuals; koala-tiny has other"),
    "IP-Adapter": (with_ip_adapter, "this MODEL has 54 attention patches on blocks that koala-tiny lacks (input 4 la"),
    "stock LoRA": (with_lora, "this MODEL has a LoRA with 48 modules of another shape than koala-tiny's (first: dif"),
}
add_ons = pytest.mark.parametrize("add_on", ADD_ONS)


def require_same(found: torch.Tensor, wanted: torch.Tensor, sampler: str) -> None:
    bound = 0 if sampler in SAME_SIGMAS else parity.LATENT_BOUND
    torch.testing.assert_close(found, wanted, rtol=0, atol=bound)


def refusal(sampled: Callable[..., Any], *arguments: Any) -> str:
    with transfer.warnings_of_host() as said, pytest.raises(ValueError) as raised:  # noqa: PT011
        sampled(*arguments)
    assert said == []
    return str(raised.value)


@add_ons
@samplers
def test_every_sampler_refuses_what_koala_sampler_refuses(sampler: str, add_on: str, tmp_path: Path) -> None:
    made, begins = ADD_ONS[add_on]
    graph = made(False, tmp_path)
    found = refusal(SAMPLERS[sampler], *graph)
    assert found.startswith(begins)
    assert found == refusal(by_koala_sampler, *graph)


@add_ons
@samplers
def test_every_sampler_draws_the_adapted_one_as_koala_sampler_does(sampler: str, add_on: str, tmp_path: Path) -> None:
    model, positive, negative = ADD_ONS[add_on][0](True, tmp_path)
    with transfer.warnings_of_host() as said:
        found = SAMPLERS[sampler](model, positive, negative)
        wanted = by_koala_sampler(model, positive, negative)
    assert said == []
    require_same(found, wanted, sampler)
    assert (found - unchanged()).abs().max() > 100 * parity.LATENT_BOUND


@cache
def unchanged() -> torch.Tensor:
    """Without any add-on."""
    return by_koala_sampler(koala(), plain(), plain(4))


@samplers
def test_without_add_ons_nothing_changes(sampler: str) -> None:
    bare = SAMPLERS[sampler](transfer.unguarded(koala()), plain(), plain(4))
    assert torch.equal(SAMPLERS[sampler](koala(), plain(), plain(4)), bare)
    require_same(bare, unchanged(), sampler)


@pytest.mark.parametrize("guider", GUIDERS)
def test_every_prompt_of_every_guider_is_looked_at(guider: str) -> None:
    forgotten, negative = controlled(transfer.controlnet(), False)
    adapted, _ = controlled(transfer.controlnet(), True)
    made = [GUIDERS[guider](koala(), positive, negative).result[0] for positive in (forgotten, adapted)]
    assert refusal(advanced, made[0], koala()).startswith("the conditioning has a ControlNet with SDXL's residuals")
    assert advanced(made[1], koala()).isfinite().all()


@samplers
def test_every_region_and_every_controlnet_before_it_is_looked_at(sampler: str) -> None:
    forgotten, negative = controlled(transfer.controlnet(), False)
    adapted, _ = controlled(transfer.controlnet(), True)
    region = [[text, {**options, "area": (8, 8, 0, 0), "strength": 1.0}] for text, options in forgotten]
    behind = controlled(transfer.controlnet(), True)[0]
    behind[0][1]["control"].set_previous_controlnet(forgotten[0][1]["control"])
    for positive in (plain() + region, behind):
        found = refusal(SAMPLERS[sampler], koala(), positive, negative)
        assert found.startswith("the conditioning has a ControlNet with SDXL's residuals")
    assert SAMPLERS[sampler](koala(), plain() + adapted, negative).isfinite().all()


@samplers
def test_a_hook_with_an_sdxl_lora_is_refused(sampler: str) -> None:
    hooks = comfy.hooks.create_hook_lora(adapters.lora(SMALL_SDXL), 1.0, 0.0)
    positive = comfy.hooks.set_hooks_for_conditioning(plain(), hooks)
    for _ in range(2):  # the first run leaves nothing behind by which the second would pass
        found = refusal(SAMPLERS[sampler], koala(), positive, plain(4))
        assert found.startswith("the conditioning has a hook with a LoRA of another model than koala-tiny: ")


@pytest.fixture(scope="module")
def koala_and_sdxl() -> Any:
    """A KOALA merged with an SDXL; the host takes seconds to put the patches into its weights."""
    whole, part = transfer.pair(KOALA_700M)
    return ModelMergeSimple().merge(part, whole, 0.5)[0]


@samplers
def test_a_merge_with_sdxl_is_refused(sampler: str, koala_and_sdxl: Any) -> None:
    found = refusal(SAMPLERS[sampler], koala_and_sdxl, plain(), plain(4))
    assert found.startswith("this MODEL has a merge with a model of another layout: ")


@samplers
def test_a_controlnet_of_unknown_class_is_judged_by_its_residuals(sampler: str) -> None:
    """Only sampling shows them; what looks at them is gone with the run."""
    adapted = transfer.hinted(KoalaControlNet.execute(transfer.controlnet()).result[0])
    right, direct = (transfer.conditioning(KOALA_TINY, each) for each in (Delegating(adapted), adapted))
    wrong = transfer.conditioning(KOALA_TINY, Delegating(transfer.hinted(transfer.controlnet())))
    model = koala()
    before = [*model.wrappers], copy.copy(model.model_options["transformer_options"])
    with pytest.raises(ValueError, match=r"^a ControlNet \(Delegating\) gives 9 residuals, and koala-tiny has 6 skip"):
        SAMPLERS[sampler](model, wrong, plain(4))
    found = SAMPLERS[sampler](model, right, plain(4))
    require_same(found, by_koala_sampler(model, direct, plain(4)), sampler)
    assert ([*model.wrappers], model.model_options["transformer_options"]) == before


# --- where the guard is -------------------------------------------------------------------------------------------


def accelerated(model: Any) -> Any:
    return patch.accelerate(model, Acceleration(OFF, Reuse(Table((0.01,)))), lambda _: None).model


def compiled(model: Any) -> Any:
    clone = model.clone()
    set_torch_compile_wrapper(clone, backend="eager", keys=["diffusion_model"])
    return clone


def merged(model: Any) -> Any:
    return ModelMergeSimple().merge(model, model.clone(), 0.5)[0]


def for_another_device(model: Any) -> Any:
    return model.deepclone_multigpu(torch.device("cpu"))


def swapped(model: Any) -> Any:
    """An accelerated SDXL's MODEL, on the KOALA."""
    return swap(accelerated(transfer.unguarded(transfer.pair(KOALA_700M)[0])), model).model


MADE: dict[str, Callable[[Any], Any]] = {
    "loaded": lambda model: model,
    "cloned": lambda model: model.clone(),
    "FreeU": lambda model: FreeU_V2.execute(model, 1.1, 1.2, 0.9, 0.2).result[0],
    "merged": merged,
    "with a LoRA": lambda model: comfy.sd.load_lora_for_models(model, None, adapters.lora(SMALL_SDXL), 1.0, 0.0)[0],
    "KOALA Attention Patches": lambda model: KoalaAttentionPatches.execute(model).result[0],
    "KOALA Accelerate": accelerated,
    "compiled": compiled,
    "for another device": for_another_device,
    "without dynamic VRAM": lambda model: model.clone(disable_dynamic=True, force_deepcopy=True),
    "swapped": swapped,
    "from a stock loader, KOALA Sampler": lambda model: guard.guarded(accelerated(transfer.unguarded(model))),
}


@pytest.mark.parametrize("made", MADE)
def test_the_guard_goes_first_wherever_the_model_goes(made: str) -> None:
    around = MADE[made](koala()).wrappers[WrappersMP.OUTER_SAMPLE]
    assert next(iter(around)) == guard.KEY
    assert around[guard.KEY] == [guard.check]
    assert ("koala_accelerate" in around) == (made in ("KOALA Accelerate", "swapped") or "stock" in made)


def test_the_guard_is_put_once() -> None:
    model = transfer.unguarded(koala())
    once = guard.guarded(model)
    assert guard.KEY not in model.wrappers.get(WrappersMP.OUTER_SAMPLE, {})
    assert guard.guarded(once) is once
    assert guard.with_guard(once.wrappers) == once.wrappers


def test_the_guard_holds_no_unet_and_can_be_copied() -> None:
    assert not UNetSearch(koala().model).holds(guard.check)
    assert pickle.loads(pickle.dumps(guard.check)) is guard.check
    assert copy.deepcopy(guard.check) is guard.check


@add_ons
def test_a_koala_of_a_stock_loader_is_koala_samplers_to_guard(add_on: str, tmp_path: Path) -> None:
    made, begins = ADD_ONS[add_on]
    model, positive, negative = made(False, tmp_path)
    model = transfer.unguarded(model)
    model.remove_attachments("koala")
    assert refusal(by_koala_sampler, model, positive, negative).startswith(begins[:44])
    assert guard.KEY not in model.wrappers.get(WrappersMP.OUTER_SAMPLE, {})
