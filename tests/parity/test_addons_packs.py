"""Add-ons of other packs that go by SDXL's numbers inside their own functions: found by what they keep, not by class.

The stand-ins have the patterns of published packs, in our own words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance

from koala_sdxl.host.transfer.swap import swap
from koala_sdxl.koala.architecture.layout import KOALA_1B, KOALA_700M, SDXL, Layout, name
from koala_sdxl.koala.architecture.lineage import lineage
from koala_sdxl.nodes.adapt import KoalaAttentionPatches
from koala_sdxl.nodes.load import KoalaModelInfo
from koala_sdxl.nodes.sample import KoalaSampler
from tools.measure import parity, transfer
from tools.synthetic.adapters import SMALL_SDXL

koalas = pytest.mark.parametrize("layout", [KOALA_700M, KOALA_1B], ids=name)


def koala(layout: Layout = KOALA_700M) -> Any:
    return transfer.pair(layout)[1]


def named(model: Any) -> list[str]:
    """What KOALA Model Info says beyond the facts that it says of every model."""
    plain = KoalaModelInfo.execute(parity.tiny_models()[0]).result[0].splitlines()
    return list(KoalaModelInfo.execute(model).result[0].splitlines()[len(plain) :])


def run(model: Any, layout: Layout = KOALA_700M) -> Any:
    conditioning = transfer.conditioning(transfer.small(layout))
    preset = {"preset": "custom", "steps": 1, "cfg": 2.0, "spacing": "leading"}
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    return KoalaSampler.execute(model, conditioning, conditioning, latent, 0, preset, "euler", 1.0)


def same(found: Any, wanted: Any) -> bool:
    """But for rounding: a guidance's own pass has half the batch, which adds up in another order."""
    return torch.allclose(found.result[0]["samples"], wanted.result[0]["samples"], rtol=1e-4, atol=1e-4)


def sampled(model: Any, layout: Layout = KOALA_700M) -> torch.Tensor:
    return transfer.sample(model, transfer.conditioning(transfer.small(layout)))


# --- IP-Adapter's weights by transformer --------------------------------------------------------------------------


class Callbacks:
    """IP-Adapter's pattern: a patch that keeps functions and their settings in lists."""

    def __init__(self, callback: Callable[..., Any], **settings: Any) -> None:
        self.callback = [callback]
        self.kwargs = [settings]

    def __call__(self, q: Any, k: Any, v: Any, options: Any) -> Any:
        out = q
        for callback, settings in zip(self.callback, self.kwargs, strict=True):
            out = out + callback(out, options, **settings)
        return out


class Parallel:
    """An older pattern of the same: a list for each setting, with an entry for each adapter."""

    def __init__(self, callback: Callable[..., Any], **settings: Any) -> None:
        self.callback = callback
        self.module_key = settings["module_key"]
        self.weights = [settings["weight"], *settings.get("more", ())]
        self.weight_types = ["style transfer" for _ in self.weights]
        self.adapters = [torch.nn.Linear(2, 2) for _ in self.weights]  # whose own "weight" is none of these

    def __call__(self, q: Any, k: Any, v: Any, options: Any) -> Any:
        out = q
        for weight in self.weights:
            out = out + self.callback(out, options, self.module_key, weight)
        return out


def styled(model: Any, weight: Any, ran: set[int] | None = None, patch: Any = Callbacks, **more: Any) -> Any:
    """An IP-Adapter on all of SDXL's places; ``weight`` is one number, or one for each of some transformers."""

    def adapter(out: Any, options: Any, module_key: str, weight: Any) -> Any:
        index = options["transformer_index"]
        if isinstance(weight, dict):
            if index not in weight:
                return 0
            weight = weight[index]
        if ran is not None:
            ran.add(index)
        return out * weight

    return transfer.ip_adapter(model, lambda place: patch(adapter, module_key=str(place), weight=weight, **more))


@koalas
@pytest.mark.parametrize("patch", [Callbacks, Parallel])
@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({6: 0.8}, "transformer 6 (output 1)"),
        ({3: 0.8}, "transformer 3 (input 8)"),
        ({3: 0.8, 6: 0.5}, "transformers 3 (input 8), 6 (output 1)"),
    ],
    ids=["style", "composition", "style and composition"],
)
def test_style_and_composition_have_no_effect_and_it_is_said(
    layout: Layout, weights: Any, words: str, patch: Any
) -> None:
    ran: set[int] = set()
    count = len(transfer.attention_places(layout))
    bound, text = KoalaAttentionPatches.execute(styled(koala(layout), weights, ran, patch)).result
    plain = KoalaAttentionPatches.execute(styled(koala(layout), {}, patch=patch)).result[0]
    torch.testing.assert_close(sampled(bound, layout), sampled(plain, layout), rtol=0, atol=0)
    assert ran == set()
    said = f"{count} of the {count} remapped patches have no effect: their weights are for SDXL's {words}, which "
    assert said in text
    _, report = swap(styled(transfer.pair(layout)[0], weights, patch=patch), koala(layout))
    assert said in report
    (line,) = named(bound)
    assert line.startswith(said)


@koalas
def test_weights_for_some_of_koalas_transformers_are_counted(layout: Layout) -> None:
    """ "Strong style": the transformers before and behind the composition's."""
    weights = {index: 0.5 for index in range(11) if index != 3}
    ran: set[int] = set()
    bound, text = KoalaAttentionPatches.execute(styled(koala(layout), weights, ran)).result
    run(bound, layout)
    kept = set(lineage(transfer.small(layout)).attention_order)
    assert ran == kept & set(weights) == kept
    assert "have no effect" not in text
    half = {0: 0.5, 6: 0.5}
    text = KoalaAttentionPatches.execute(styled(koala(layout), half)).result[1]
    count = len(transfer.attention_places(layout))
    assert f"{count - 2} of the {count} remapped patches have no effect: their weights are for SDXL's tra" in text
    assert "6 (output 1)" in text


def test_one_weight_for_all_has_nothing_to_be_said() -> None:
    bound, text = KoalaAttentionPatches.execute(styled(koala(), 0.8)).result
    assert "no effect" not in text
    assert named(bound) == []
    both = styled(koala(), {6: 0.5}, patch=Parallel, more=(0.5,))  # a second adapter, with an effect everywhere
    assert "no effect" not in KoalaAttentionPatches.execute(both).result[1]


# --- guidance by places in closures -------------------------------------------------------------------------------


def perturbed(model: Any, *blocks: tuple[Any, ...]) -> Any:
    """A pack's perturbed-attention guidance: the blocks are in the closure of a function around cfg."""
    guided, scale = model.clone(), 3.0

    def value(q: Any, k: Any, v: Any, options: Any, mask: Any = None) -> Any:
        return v

    def after_cfg(arguments: Any) -> Any:
        options = arguments["model_options"].copy()
        for part, number, index in blocks:
            options = comfy.model_patcher.set_model_options_patch_replace(options, value, "attn1", part, number, index)
        (weak,) = comfy.samplers.calc_cond_batch(
            arguments["model"], [arguments["cond"]], arguments["input"], arguments["sigma"], options
        )
        return arguments["denoised"] + (arguments["cond_denoised"] - weak) * scale

    guided.set_model_sampler_post_cfg_function(after_cfg)
    return guided


def perturbed_at(model: Any, unet_block: str, unet_block_id: int) -> Any:
    """The same with one block in two variables."""
    inner = perturbed(model, (unet_block, unet_block_id, None))
    (after_cfg,) = inner.model_options["sampler_post_cfg_function"]
    guided = model.clone()

    class Guidance:
        def __init__(self) -> None:
            self.function, self.unet_block, self.unet_block_id = None, unet_block, unet_block_id

        def __call__(self, arguments: Any) -> Any:
            return after_cfg(arguments)

    del inner
    guided.set_model_sampler_post_cfg_function(Guidance())
    return guided


@pytest.mark.parametrize(
    "guided",
    [
        lambda model: perturbed(model, ("input", 8, None)),
        lambda model: perturbed(model, ("middle", 0, None), ("input", 7, None)),
        lambda model: perturbed(model, ("output", 1, 9)),
        lambda model: perturbed_at(model, "input", 8),
        lambda model: perturbed_at(model, "middle", 0),
    ],
)
def test_guidance_on_blocks_that_koala_lacks_is_named(guided: Callable[[Any], Any]) -> None:
    """It has no effect, so it is sampled; KOALA Sampler says so on the node."""
    model = guided(koala())
    (line,) = named(model)
    assert "test_addons_packs" in line
    assert "it works on attention that koala-tiny lacks (" in line
    assert "no effect" in line
    found = run(model)
    assert same(found, run(koala()))
    assert line in found.ui["text"][0]


def test_guidance_on_some_of_koalas_numbers_is_refused() -> None:
    model = perturbed(koala(), ("input", 5, None), ("input", 7, None), ("output", 1, None))
    with pytest.raises(ValueError, match=r"^this MODEL has a function \(.*test_addons_packs\) that goes by SDXL's num"):
        run(model)
    (line,) = named(model)
    assert "targets the wrong layers" in line
    assert "SDXL's input 3 is its 2, 4 is its 3, 6 is its 4, 7 is its 5" in line


def test_guidance_by_koalas_numbers_is_right() -> None:
    model = perturbed(koala(), ("input", 5, None), ("output", 1, 4))
    assert named(model) == []
    assert not same(run(model), run(koala()))


# --- ControlNet-LLLite --------------------------------------------------------------------------------------------


def lllite_modules(scale: float = 0.5) -> dict[str, Any]:
    """Modules by kohya's names of SDXL's attention layers."""
    parts = {"input": "input_blocks_{}_1", "middle": "middle_block_1", "output": "output_blocks_{}_1"}
    modules = {}
    for (part, number, index), width in transfer.attention_places(SMALL_SDXL).items():
        if part != "output":
            layer = torch.nn.Linear(width, width)
            torch.nn.init.constant_(layer.weight, scale / width)
            prefix = f"lllite_unet_{parts[part].format(number)}_transformer_blocks_{index}"
            modules[f"{prefix}_attn1_to_q"] = layer
    return modules


class LLLite:
    """ControlNet-LLLite's pattern: a patch that looks a module up by the names of blocks."""

    def __init__(self, modules: dict[str, Any]) -> None:
        self.modules = modules
        self.ran: list[str] = []

    def __call__(self, q: Any, k: Any, v: Any, options: Any) -> Any:
        part, number = options["block"]
        block = f"{part}_block_1" if part == "middle" else f"{part}_blocks_{number}_1"
        found = f"lllite_unet_{block}_transformer_blocks_{options['block_index']}_attn1_to_q"
        if found in self.modules:
            self.ran.append(found)
            q = q + self.modules[found](q)
        return q, k, v


def with_lllite(model: Any, patch: Any) -> Any:
    patched = model.clone()
    patched.set_model_attn1_patch(patch)
    return patched


def in_a_closure(modules: dict[str, Any]) -> Any:
    inner = LLLite(modules)
    return lambda q, k, v, options: inner(q, k, v, options)


@pytest.mark.parametrize("patch", [LLLite, in_a_closure])
def test_lllite_without_our_node_is_refused(patch: Callable[..., Any]) -> None:
    model = with_lllite(koala(), patch(lllite_modules()))
    with pytest.raises(
        ValueError, match=r"^this MODEL has a function \(.*\) that goes by SDXL's numbers: .*Put KOALA Att"
    ):
        run(model)
    (line,) = named(model)
    assert "put KOALA Attention Patches behind the node that set it" in line
    bound = KoalaAttentionPatches.execute(model).result[0]
    assert named(bound) == []
    assert run(bound).result


def test_lllites_modules_reach_their_layers() -> None:
    patch = LLLite(lllite_modules())
    run(KoalaAttentionPatches.execute(with_lllite(koala(), patch)).result[0])
    line = lineage(transfer.small(KOALA_700M))
    wanted = {
        f"lllite_unet_{there[0]}_blocks_{there[1]}_1_transformer_blocks_{index}_attn1_to_q"
        for own, kept in line.attention.items()
        for there in [line.blocks[own]]
        for index in kept
        if there[0] == "input"
    }
    assert set(patch.ran) == wanted


# --- core's guidance by the middle block --------------------------------------------------------------------------


def test_perturbed_attention_guidance_is_said_by_the_sampler_too() -> None:
    found = run(PerturbedAttentionGuidance.execute(koala(), 3.0).result[0])
    assert same(found, run(koala()))
    assert "Perturbed-Attention Guidance: it works on the middle block's attention" in found.ui["text"][0]
    assert "each step costs an extra pass and nothing changes; remove it" in found.ui["text"][0]
    on_1b = run(PerturbedAttentionGuidance.execute(koala(KOALA_1B), 3.0).result[0], KOALA_1B)
    assert "Guidance" not in on_1b.ui["text"][0]


@koalas
def test_guidance_that_was_set_on_sdxl(layout: Layout) -> None:
    """The swap onto a KOALA without a middle block drops what counts on one, and names it; on a 1B it works."""
    guided = SelfAttentionGuidance.execute(transfer.pair(layout)[0], 0.5, 2.0).result[0]
    swapped, report = swap(guided, koala(layout))
    unchanged = same(run(swapped, layout), run(koala(layout), layout))
    assert unchanged == (layout == KOALA_700M)
    if unchanged:
        assert (
            "dropped: sampler_post_cfg_function of SelfAttentionGuidance.execute in comfy_extras.nodes_sag: " in report
        )
    else:
        assert "dropped" not in report
    perturbed_ = PerturbedAttentionGuidance.execute(transfer.pair(layout)[0], 3.0).result[0]
    said = (
        "Perturbed-Attention Guidance: it works on the middle block's attention"
        in swap(perturbed_, koala(layout)).report
    )
    assert said == (layout == KOALA_700M)


def test_self_attention_guidance_behind_our_node_is_not_sampled() -> None:
    """The node takes its patch of the middle block off, and what counts on it."""
    guided = SelfAttentionGuidance.execute(koala(), 0.5, 2.0).result[0]
    bound, text = KoalaAttentionPatches.execute(guided).result
    assert "SelfAttentionGuidance" in text
    assert same(run(bound), run(koala()))


def test_sdxls_transformers_are_counted_as_comfyui_counts_them() -> None:
    """The numbers in these tests: of SDXL's eleven attention modules, in forward order."""
    order = list(dict.fromkeys(place[:2] for place in transfer.attention_places(SDXL)))
    assert order[3] == ("input", 8)
    assert order[6] == ("output", 1)
    assert len(order) == 11
