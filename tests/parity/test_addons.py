"""Add-ons with SDXL's block numbers on a KOALA: bound by KOALA Attention Patches, or named and refused."""

from __future__ import annotations

from typing import Any

import comfy.sd
import pytest
import torch
from comfy_extras.nodes_freelunch import FreeU_V2
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from comfy_extras.nodes_model_merging import ModelMergeSimple
from comfy_extras.nodes_model_merging_model_specific import ModelMergeSDXL
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_extras.nodes_tomesd import TomePatchModel

from koala_sdxl.host.transfer.attention import Remapped, sdxl_numbers
from koala_sdxl.host.transfer.lora import apply_lora
from koala_sdxl.koala.architecture.layout import KOALA_1B, KOALA_700M, KOALA_TINY, Layout
from koala_sdxl.koala.architecture.lineage import KEPT_TRANSFORMERS, Lineage, lineage
from koala_sdxl.nodes.adapt import KoalaAttentionPatches
from koala_sdxl.nodes.load import KoalaModelInfo
from koala_sdxl.nodes.sample import KoalaSampler
from tools.measure import parity, transfer
from tools.synthetic import adapters
from tools.synthetic.adapters import SMALL_SDXL


def koala(layout: Layout = KOALA_700M) -> Any:
    return transfer.pair(layout)[1]


def bind(model: Any) -> tuple[Any, str]:
    return KoalaAttentionPatches.execute(model).result


def named(model: Any) -> list[str]:
    """What KOALA Model Info says beyond the facts that it says of every model."""
    text = KoalaModelInfo.execute(model).result[0].splitlines()
    plain = KoalaModelInfo.execute(parity.tiny_models()[0]).result[0].splitlines()
    return text[len(plain) :]


def keep(place: tuple[Any, ...]) -> Any:
    """A replacement of attention that changes nothing much and can be told from others."""

    def replacement(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
        return q

    return replacement


def test_an_ip_adapter_is_bound_and_the_rest_is_said() -> None:
    model = transfer.ip_adapter(koala(KOALA_1B), keep)
    bound, text = bind(model)
    assert text.startswith("30 patches remapped to ")
    assert "lacks their blocks (input 4" not in text  # input 4 is in it, as its 3
    assert "40 dropped, as custom SDXL sub-network " in text
    assert "lacks their blocks (input 5 layer 0" in text
    assert len(model.model_options["transformer_options"]["patches_replace"]["attn2"]) == 70
    assert len(bound.model_options["transformer_options"]["patches_replace"]["attn2"]) == 30


def test_patches_for_a_whole_block_are_bound_too() -> None:
    model = koala().clone()
    model.set_model_attn1_replace(keep(()), "input", 7)
    model.set_model_attn1_replace(keep(()), "middle", 0)
    bound, text = bind(model)
    assert list(bound.model_options["transformer_options"]["patches_replace"]["attn1"]) == [("input", 5)]
    assert text.endswith("1 dropped, as koala-tiny lacks their blocks (middle 0)")


def test_binding_twice_is_binding_once() -> None:
    once = bind(transfer.ip_adapter(koala(), keep))[0]
    twice, text = bind(once)
    assert text.startswith("0 patches remapped")
    options = [model.model_options["transformer_options"]["patches_replace"]["attn2"] for model in (once, twice)]
    assert options[0] == options[1]


def test_every_number_that_a_patch_asks_for_is_sdxls() -> None:
    asked = set()

    def patch(n: Any, context: Any, value: Any, options: dict[str, Any]) -> Any:
        asked.add((*options["block"], options["block_index"], options["transformer_index"]))
        options["seen"] = True
        return n, context, value

    model = koala(KOALA_1B).clone()
    model.set_model_attn2_patch(patch)
    transfer.sample(bind(model)[0], transfer.conditioning(transfer.small(KOALA_1B)))
    line = lineage(transfer.small(KOALA_1B))
    order = dict(zip(line.attention, line.attention_order, strict=True))
    assert asked == {
        (*line.blocks[block], there, order[block]) for block, kept in line.attention.items() for there in kept
    }


def test_several_patches_in_one_block_are_told_the_same_numbers() -> None:
    seen: dict[str, list[Any]] = {"attn1": [], "attn2": [], "block": [], "after": []}

    def attention_patch(kind: str) -> Any:
        def patch(n: Any, context: Any, value: Any, options: dict[str, Any]) -> Any:
            seen[kind].append((*options["block"], options["block_index"], options["transformer_index"]))
            return n, context, value

        return patch

    def block_patch(kind: str) -> Any:
        def patch(h: Any, options: dict[str, Any]) -> Any:
            seen[kind].append(options["block"])
            return h

        return patch

    model = koala().clone()
    model.set_model_attn1_patch(attention_patch("attn1"))
    model.set_model_attn2_patch(attention_patch("attn2"))
    model.set_model_input_block_patch(block_patch("block"))
    model.set_model_input_block_patch_after_skip(block_patch("after"))
    transfer.sample(bind(model)[0], transfer.conditioning(KOALA_TINY))
    assert seen["attn1"] == seen["attn2"]
    assert seen["block"] == seen["after"]
    assert set(seen["block"]) == {("input", block) for block in (0, 1, 3, 4, 6, 7)}


def test_the_number_inside_a_block_follows_the_table() -> None:
    odd = {**KEPT_TRANSFORMERS[KOALA_700M], "up_blocks.0.attentions.1": (0, 3, 4, 7, 9)}
    here = {"block": ("output", 1), "block_index": 3, "transformer_index": 3}
    there = {"block": ("output", 2), "block_index": 7, "transformer_index": 7}
    assert sdxl_numbers(Lineage(KOALA_700M, odd), here) == there
    assert sdxl_numbers(Lineage(KOALA_700M, odd), {"block": ("middle", 0)}) == {}


def test_the_host_reaches_through_to_the_patch() -> None:
    class Patch:
        device = "cpu"

        def __call__(self, *arguments: Any) -> Any:
            return arguments[0]

        def to(self, device: str) -> Patch:
            self.device = device
            return self

        def models(self) -> list[str]:
            return ["mine"]

    model = koala().clone()
    model.set_model_attn2_replace(Patch(), "input", 7, 0)
    bound = bind(model)[0]
    assert bound.model_patches_models() == ["mine"]
    bound.model_patches_to("meta")
    held = bound.model_options["transformer_options"]["patches_replace"]["attn2"]["input", 5, 0]
    assert isinstance(held, Remapped)
    assert held.device == "meta"
    assert not hasattr(held, "cleanup")


def run(model: Any) -> Any:
    conditioning = transfer.conditioning(KOALA_TINY)
    preset = {"preset": "custom", "steps": 1, "cfg": 1.0, "spacing": "leading"}
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    return KoalaSampler.execute(model, conditioning, conditioning, latent, 0, preset, "euler", 1.0)


def test_koala_sampler_refuses_sdxls_numbers() -> None:
    model = transfer.ip_adapter(parity.tiny_models()[0], keep)
    with pytest.raises(
        ValueError, match=r"^this MODEL has \d+ attention patches on blocks that koala-tiny lacks \(inp"
    ):
        run(model)
    assert run(bind(model)[0]).result
    guided = SelfAttentionGuidance.execute(parity.tiny_models()[0], 0.5, 2.0).result[0]
    with pytest.raises(ValueError, match=r"patches on the middle block, which koala-tiny lacks.*Remove the node"):
        run(guided)


@pytest.mark.parametrize(
    ("place", "stray"),
    [(("output", 1, 9), True), (("input", 4), True), (("middle", 0), True), (("input", 5, 0), False)],
)
def test_numbers_that_koala_has_too_cannot_be_told(place: tuple[Any, ...], stray: bool) -> None:
    model = koala().clone()
    model.set_model_attn2_replace(keep(()), *place)
    assert any("so they use SDXL's numbers" in line for line in named(model)) == stray


# --- KOALA Model Info ---------------------------------------------------------------------------------------------


def test_a_model_without_add_ons_has_nothing_to_be_named() -> None:
    assert named(koala()) == []
    assert named(FreeU_V2.execute(koala(), 1.1, 1.2, 0.9, 0.2).result[0]) == []
    with transfer.on_disk(adapters.lora(SMALL_SDXL, "LoCon")) as path:
        assert named(apply_lora(koala(), transfer.clip(), path, 1.0, 1.0).model) == []


@pytest.mark.parametrize(
    ("node", "inputs", "begins"),
    [
        (SelfAttentionGuidance, (0.5, 2.0), "Self-Attention Guidance: it works on the middle block's attention, and "),
        (PerturbedAttentionGuidance, (3.0,), "Perturbed-Attention Guidance: it works on the middle block's attention"),
    ],
)
def test_guidance_by_the_middle_block_is_named_where_there_is_none(node: Any, inputs: Any, begins: str) -> None:
    found = named(node.execute(koala(KOALA_700M), *inputs).result[0])
    assert found[0].startswith(begins)
    assert found[0].endswith("remove it")
    assert named(node.execute(koala(KOALA_1B), *inputs).result[0]) == []


def test_what_does_nothing_is_named() -> None:
    tome = named(TomePatchModel.execute(koala(), 0.3).result[0])
    assert [line.split(":")[0] for line in tome] == ["Tome Patch Model"]
    tiled = HyperTile.execute(koala(), 256, 2, 0, False)
    assert [line.split(":")[0] for line in named(getattr(tiled, "result", tiled)[0])] == ["HyperTile"]
    deep = HyperTile.execute(koala(), 256, 2, 1, False)
    assert named(getattr(deep, "result", deep)[0]) == []


def test_deep_shrink_is_named_until_it_is_bound() -> None:
    shrunk = PatchModelAddDownscale.execute(koala(), 3, 2.0, 0.0, 0.35, True, "bicubic", "bicubic").result[0]
    (found,) = named(shrunk)
    assert found.startswith("PatchModelAddDownscale (Kohya Deep Shrink): it uses SDXL's block number")
    assert "SDXL's input 3 is its 2, 4 is its 3, 6 is its 4, 7 is its 5" in found
    assert named(bind(shrunk)[0]) == []


def test_merges_by_block_are_named() -> None:
    even = ModelMergeSimple().merge(koala(), koala().clone(), 0.5)[0]
    assert named(even) == []
    names = ModelMergeSDXL.INPUT_TYPES()["required"]
    ratios = {key: 0.5 for key in names if key.endswith(".")} | {"input_blocks.3": 0.9}
    by_block = ModelMergeSDXL().merge(koala(), koala().clone(), **ratios)[0]
    (found,) = named(by_block)
    assert found.startswith("a merge with a ratio for each block: the merge node's blocks are SDXL's")


def test_an_sdxl_lora_from_the_stock_loader_is_named() -> None:
    stock, _ = comfy.sd.load_lora_for_models(koala(), None, adapters.lora(SMALL_SDXL), 1.0, 0.0)
    (found,) = named(stock)
    assert found.startswith("a LoRA with 48 modules of another shape than ")
    assert found.endswith("load it with KOALA LoRA Loader")
