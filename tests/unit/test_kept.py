"""A student of one's own whose file says which of SDXL's transformer blocks it kept: SDXL's add-ons go by that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from koala_sdxl.koala.architecture.keys import tensors
from koala_sdxl.koala.architecture.layout import KOALA_TINY, Layout, compact, name
from koala_sdxl.koala.architecture.lineage import Lineage, at_widths_of, attention_depths, lineage
from koala_sdxl.koala.files.conventions import KEPT_TRANSFORMERS_KEY
from koala_sdxl.koala.files.export import metadata
from koala_sdxl.koala.files.header import CheckpointError
from koala_sdxl.koala.files.inspect import inspect_model
from koala_sdxl.koala.lora.plan import inspect_lora
from koala_sdxl.koala.model_info import ModelFacts
from tests.unit import files
from tools.synthetic import adapters
from tools.synthetic.adapters import SMALL_SDXL

DEPTHS = attention_depths(KOALA_TINY)
EVEN = {module: (0, 2, 4, 6, 9) if depth == 5 else (0, 1) for module, depth in DEPTHS.items()}
MINE = at_widths_of(KOALA_TINY, compact(3, middle=False))
MINE_KEPT = {module: (1, 4, 8) if depth == 3 else (0, 1) for module, depth in attention_depths(MINE).items()}


def told(path: Path, layout: Layout, text: str | None) -> ModelFacts:
    said = {} if text is None else {KEPT_TRANSFORMERS_KEY: text}
    return inspect_model(files.write(path / "mine.safetensors", files.unet(layout), metadata=said)).facts("mine")


def test_a_file_that_says_nothing_goes_by_the_table(tmp_path: Path) -> None:
    facts = told(tmp_path, KOALA_TINY, None)
    assert facts.kept_transformers is None
    assert facts.lineage == lineage(KOALA_TINY)


@pytest.mark.parametrize(("layout", "kept"), [(KOALA_TINY, EVEN), (MINE, MINE_KEPT)], ids=["even", "own layout"])
def test_what_the_file_says_counts(tmp_path: Path, layout: Layout, kept: dict[str, tuple[int, ...]]) -> None:
    facts = told(tmp_path, layout, json.dumps(kept))
    assert facts.lineage == Lineage(layout, kept)
    assert facts.lineage.tensors  # complete: every tensor has an origin
    again = told(tmp_path, layout, metadata(facts, "again", "sgm")[KEPT_TRANSFORMERS_KEY])
    assert again.kept_transformers == kept


def test_an_own_layout_that_says_nothing_has_a_lineage_by_blocks_only(tmp_path: Path) -> None:
    facts = told(tmp_path, MINE, None)
    stated = Lineage(MINE, MINE_KEPT)
    assert facts.lineage.skips == stated.skips
    assert facts.lineage.blocks == stated.blocks
    assert facts.lineage.depths == {block: len(kept) for block, kept in stated.attention.items()}
    assert facts.lineage.attention_order == stated.attention_order
    for asked in ("tensors", "attention", "neighbours"):
        with pytest.raises(ValueError, match="no table says which of SDXL's transformer blocks the custom"):
            getattr(facts.lineage, asked)


def test_an_sdxl_lora_goes_to_the_blocks_that_the_file_names(tmp_path: Path) -> None:
    save_file(adapters.lora(SMALL_SDXL, only=adapters.in_attention), tmp_path / "lora.safetensors")
    plan = inspect_lora(tmp_path / "lora.safetensors", KOALA_TINY, kept_transformers=EVEN)
    by_table = inspect_lora(tmp_path / "lora.safetensors", KOALA_TINY)
    wanted = {part.comfy: whole.diffusers for part, whole in Lineage(KOALA_TINY, EVEN).tensors}
    assert plan.count("applied") == by_table.count("applied") == sum(map(adapters.in_attention, tensors(KOALA_TINY)))
    assert plan.names != by_table.names
    goal = "diffusion_model.input_blocks.5.1.transformer_blocks.4.attn1.to_q"
    source = next(old for old, new in plan.names.items() if new.startswith(goal))
    origin = wanted[f"{goal.removeprefix('diffusion_model.')}.weight"]
    assert origin.startswith("down_blocks.2.attentions.0.transformer_blocks.9.")
    assert "transformer_blocks_9_" in source


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({}),
        json.dumps({**EVEN, "down_blocks.2.attentions.0": [0, 1]}),
        json.dumps({**EVEN, "down_blocks.2.attentions.0": [0, 1, 2, 3, "4"]}),
        json.dumps({**EVEN, "down_blocks.7.attentions.0": [0, 1]}),
        json.dumps({module: len(kept) for module, kept in EVEN.items()}),
        "[]",
        "not JSON",
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=rf"mine.safetensors: the metadata {KEPT_TRANSFORMERS_KEY}"):
        told(tmp_path, KOALA_TINY, text)


@pytest.mark.parametrize(
    ("module", "kept"),
    [
        ("down_blocks.2.attentions.0", (0, 2, 4, 6, 10)),
        ("down_blocks.2.attentions.0", (-1, 2, 4, 6, 9)),
        ("down_blocks.2.attentions.0", (0, 2, 2, 6, 9)),
        ("down_blocks.1.attentions.0", (0, 9)),
    ],
    ids=["beyond", "negative", "twice", "beyond its own module"],
)
def test_indices_that_sdxl_has_not_are_refused(tmp_path: Path, module: str, kept: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match=f"does not fit {name(KOALA_TINY)}: {module} is to keep"):
        told(tmp_path, KOALA_TINY, json.dumps({**EVEN, module: kept}))
