"""`dev.py lineage` on students cut out of a random SDXL: it must find the cut, or say why it cannot."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from koala_sdxl.koala.architecture.keys import Numbering, renaming
from koala_sdxl.koala.architecture.layout import KOALA_1B, KOALA_700M, KOALA_TINY, SDXL, Layout
from koala_sdxl.koala.architecture.lineage import KEPT_LAYERS, Lineage, at_widths_of
from koala_sdxl.koala.files.conventions import UNET_PREFIX
from tests.unit import files
from tools.harness.errors import UserError
from tools.harness.testhost import ROOT
from tools.measure import lineage
from tools.synthetic.random_weights import unet_state

State = dict[str, torch.Tensor]
WHOLE = at_widths_of(KOALA_TINY, SDXL)
DRIFT = 4 / 3  # noise of this size beside a weight's own leaves a cosine of 0.6

ODD: dict[Layout, dict[str, tuple[int, ...]]] = {
    KOALA_700M: {
        "down_blocks.1.attentions.0": (0, 1),
        "down_blocks.2.attentions.0": (0, 2, 3, 6, 9),
        "up_blocks.0.attentions.0": (1, 2, 5, 7, 8),
        "up_blocks.0.attentions.1": (0, 1, 2, 3, 9),
        "up_blocks.1.attentions.0": (0, 1),
        "up_blocks.1.attentions.1": (0, 1),
    },
    KOALA_1B: {
        "down_blocks.1.attentions.0": (0, 1),
        "down_blocks.2.attentions.0": (0, 2, 4, 6, 8, 9),
        "mid_block.attentions.0": (1, 3, 5, 7, 8, 9),
        "up_blocks.0.attentions.0": (4, 5, 6, 7, 8, 9),
        "up_blocks.0.attentions.1": (0, 1, 3, 4, 7, 8),
        "up_blocks.1.attentions.0": (0, 1),
        "up_blocks.1.attentions.1": (0, 1),
    },
}
"""Choices that no table has, another for each module."""


@pytest.fixture(scope="module")
def whole() -> State:
    """A random SDXL as wide as koala-tiny."""
    return unet_state(WHOLE)


@pytest.fixture(scope="module")
def sdxl(whole: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(whole, tmp_path_factory.mktemp("sdxl") / "sdxl.safetensors")


def cut(whole: State, wide: Layout) -> State:
    """The student of that topology with the odd choice of blocks."""
    return Lineage(at_widths_of(KOALA_TINY, wide), ODD[wide]).cut(whole, "diffusers")


def drifted(state: State, seed: int = 1) -> State:
    """The weights as after a long training: each tensor with noise of ``DRIFT`` times its own size."""
    generator = torch.Generator().manual_seed(seed)

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(tensor.shape, generator=generator)
        return (tensor.float() + DRIFT * tensor.float().square().mean().sqrt() * noise).half()

    return {name: moved(tensor) for name, tensor in state.items()}


def written(state: Mapping[str, torch.Tensor], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def renumbered(state: State, shape: Layout, numbering: Numbering) -> State:
    """As in a single-file checkpoint."""
    naming = renaming(shape, "diffusers", numbering)
    return {UNET_PREFIX + naming[name]: tensor for name, tensor in state.items()}


def tables(text: str) -> tuple[dict[str, tuple[int, ...]], str, dict[str, tuple[int, ...]]]:
    """What a literal says: KEPT_LAYERS, the layout's name, and the layout's rows of KEPT_TRANSFORMERS."""
    layers, transformers = (node for node in ast.parse(text).body if isinstance(node, ast.AnnAssign))
    assert isinstance(layers.target, ast.Name)
    assert isinstance(transformers.target, ast.Name)
    assert (layers.target.id, transformers.target.id) == ("KEPT_LAYERS", "KEPT_TRANSFORMERS")
    assert layers.value
    assert isinstance(transformers.value, ast.Dict)
    (key,), (rows,) = transformers.value.keys, transformers.value.values
    assert isinstance(key, ast.Name)
    return ast.literal_eval(layers.value), key.id, ast.literal_eval(rows)


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`dev.py lineage` in a process of its own, from another folder than the checkout."""
    line = [sys.executable, str(ROOT / "dev.py"), "lineage", *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, check=False)


# --- the choice is found -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "wide"), [("KOALA_700M", KOALA_700M), ("KOALA_1B", KOALA_1B)])
def test_an_odd_choice_is_found_after_a_long_training(
    whole: State, sdxl: Path, tmp_path: Path, name: str, wide: Layout
) -> None:
    student = written(drifted(cut(whole, wide)), tmp_path / "student.safetensors")
    stages = list(lineage.measure(*lineage.open_pair(sdxl, student)))
    cosines = [
        row[column]
        for stage in stages
        for found in stage.comparisons
        for row, column in zip(found.table, found.choice.chosen, strict=True)
    ]
    assert min(cosines) > 0.55
    assert max(cosines) < 0.65
    lineage.run(sdxl, student, tmp_path / "tables.py")
    assert tables((tmp_path / "tables.py").read_text()) == (KEPT_LAYERS, name, ODD[wide])


@pytest.mark.parametrize("wide", [KOALA_700M, KOALA_1B])
def test_what_is_found_cuts_the_student_out_again(whole: State, sdxl: Path, tmp_path: Path, wide: Layout) -> None:
    student = written(cut(whole, wide), tmp_path / "student.safetensors")
    lineage.run(sdxl, student, tmp_path / "tables.py")
    rows = tables((tmp_path / "tables.py").read_text())[2]
    again = Lineage(at_widths_of(KOALA_TINY, wide), rows).cut(load_file(sdxl), "diffusers")
    kept = load_file(student)
    assert again.keys() == kept.keys()
    assert all(torch.equal(again[name], kept[name]) for name in kept)


def test_the_module_that_blocks_came_from_is_measured_and_not_taken_for_granted(
    whole: State, sdxl: Path, tmp_path: Path
) -> None:
    """A student whose second attention module on the way up came from SDXL's second, though its resnet, by its shape,
    came from the third: no row of KEPT_LAYERS can say that."""
    state = cut(whole, KOALA_700M)
    own = "up_blocks.0.attentions.1."
    for name in [name for name in state if name.startswith(own)]:
        inner = name.removeprefix(own)
        block = ODD[KOALA_700M][own[:-1]]
        if inner.startswith("transformer_blocks."):
            _, index, rest = inner.split(".", 2)
            inner = f"transformer_blocks.{block[int(index)]}.{rest}"
        state[name] = whole[own + inner]
    student = written(drifted(state), tmp_path / "student.safetensors")
    stage = next(s for s in lineage.measure(*lineage.open_pair(sdxl, student)) if s.part == "up_blocks.0")
    assert [found.choice.chosen for found in stage.layers] == [(0, 2), (0, 1)]
    assert stage.transformers[own[:-1]].columns == "up_blocks.0.attentions.1.transformer_blocks"
    assert stage.transformers[own[:-1]].choice.chosen == ODD[KOALA_700M][own[:-1]]
    with pytest.raises(UserError, match=r"kept different layers: .*up_blocks.0.attentions \(0, 1\)"):
        lineage.run(sdxl, student, tmp_path / "tables.py")
    assert not (tmp_path / "tables.py").exists()


# --- choosing ----------------------------------------------------------------------------------------------------


def test_each_row_takes_its_largest_cosine_where_these_are_in_order() -> None:
    choice = lineage.choose([[0.6, 0.1, 0.0], [0.0, 0.3, 0.5]])
    assert (choice.chosen, choice.largest) == ((0, 2), (0, 2))
    assert choice.margins == pytest.approx((0.5, 0.2))  # to (1, 2) and to (0, 1)
    assert choice.doubtful == (False, False)


def test_no_margin_exceeds_the_cosine() -> None:
    assert lineage.choose([[0.6, -0.2], [-0.2, 0.5]]).margins == (0.6, 0.5)


def test_order_decides_between_two_that_are_nearly_alike() -> None:
    """Row 0's largest is row 1's, too: the order leaves it the one before, and that without a doubt."""
    choice = lineage.choose([[0.0, 0.50, 0.52, 0.0], [0.0, 0.0, 0.60, 0.0]])
    assert (choice.chosen, choice.largest) == ((1, 2), (2, 2))
    assert choice.margins == pytest.approx((0.5, 0.58))  # without: (0, 2) at row 0, (2, 3) at row 1


@pytest.mark.parametrize(
    "table",
    [
        [[0.0, 0.6], [0.6, 0.0]],  # the other way round
        [[0.0, 0.0, 0.6], [0.0, 0.0, 0.6]],  # one block twice
        [[0.60, 0.55]],  # two alike
        [[0.05]],  # the only one of its shape, and unlike
        [[float("nan"), float("nan")]],
    ],
)
def test_what_the_cosines_leave_open_is_doubtful(table: list[list[float]]) -> None:
    assert any(lineage.choose(table).doubtful)


def test_a_choice_against_the_largest_cosines_is_told() -> None:
    found = lineage.Comparison("part", "whole", ((0.0, 0.50, 0.52, 0.0), (0.0, 0.0, 0.60, float("-inf"))))
    lines = list(lineage.report(found))
    assert lines[2].split() == ["0", "0.00", "[0.50]", "0.52", "0.00", "0.50"]
    assert lines[3].split() == ["1", "0.00", "0.00", "[0.60]", "-", "0.60"]
    assert "(2, 2), are not in increasing order" in lines[4]


# --- the command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbering", ["comfy", "script", "diffusers"])
def test_the_command_prints_the_tables_and_writes_them(
    whole: State, sdxl: Path, tmp_path: Path, numbering: Numbering
) -> None:
    """Checkpoints in ComfyUI's numbering and the conversion script's, and Hugging Face folders."""
    shape, state = at_widths_of(KOALA_TINY, KOALA_1B), drifted(cut(whole, KOALA_1B))
    if numbering == "diffusers":
        written(whole, tmp_path / "sdxl" / "unet" / "diffusion_pytorch_model.fp16.safetensors")
        written(state, tmp_path / "koala" / "unet" / "diffusion_pytorch_model.safetensors")
        given = [tmp_path / "sdxl", tmp_path / "koala"]
    else:
        given = [written(renumbered(whole, WHOLE, "comfy"), tmp_path / "sdxl.safetensors")]
        given += [written(renumbered(state, shape, numbering), tmp_path / "koala.safetensors")]
    done = command(*given, "--out", "tables.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    text = (tmp_path / "tables.py").read_text()
    assert tables(text) == (KEPT_LAYERS, "KOALA_1B", ODD[KOALA_1B])
    assert f"\n\n{text}\n" in done.stdout
    away = re.search(r"are ([\d.]+) % away from those of SDXL", done.stdout)
    assert away
    assert float(away[1]) == pytest.approx(100 * DRIFT, abs=1)
    assert "mid_block.attentions.0.transformer_blocks (rows) against SDXL's" in done.stdout
    assert "doubtful" not in done.stdout
    # as ruff formats it, and as it stands in koala/architecture/lineage.py
    ruff = [sys.executable, "-m", "ruff", "format", "--check", "--config", str(ROOT / "pyproject.toml"), "tables.py"]
    subprocess.run(ruff, cwd=tmp_path, check=True, capture_output=True)
    source = (ROOT / "koala" / "architecture" / "lineage.py").read_text()
    assert all(f"\n{line}\n" in source for line in text.splitlines() if "[" in line or "KOALA_1B" in line)


def test_unrelated_weights_are_doubtful_and_nothing_is_written(sdxl: Path, tmp_path: Path) -> None:
    shape = at_widths_of(KOALA_TINY, KOALA_700M)
    student = written(unet_state(shape, seed=5), tmp_path / "other.safetensors")
    done = command(sdxl, student, "--out", "tables.py", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("dev.py: ")
    assert "rows are doubtful" in done.stderr
    assert "other.safetensors may not have been cut out of sdxl.safetensors" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "doubtful" in done.stdout
    assert "KEPT" not in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]


def test_unrelated_weights_stay_far_below_the_margin(sdxl: Path, tmp_path: Path) -> None:
    student = written(unet_state(at_widths_of(KOALA_TINY, KOALA_700M), seed=5), tmp_path / "other.safetensors")
    stages = lineage.measure(*lineage.open_pair(sdxl, student))
    margins = [margin for stage in stages for found in stage.comparisons for margin in found.choice.margins]
    assert max(margins) < lineage.MARGIN / 2


# --- wrong files: said from their headers, before a weight is read ------------------------------------------------

LORA = {"lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight": (8, 640)}
VAE = {"decoder.conv_in.weight": (512, 4, 3, 3), "decoder.up_blocks.0.resnets.0.conv1.weight": (512, 512, 3, 3)}
SDXL_UNET, KOALA_UNET = files.unet(SDXL), files.unet(KOALA_700M)
CUT_SHORT = {name: shape for name, shape in KOALA_UNET.items() if name != "conv_out.bias"}


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (KOALA_UNET, SDXL_UNET, "first.safetensors is the U-Net of KOALA-700M; expected SDXL's own U-Net."),
        (SDXL_UNET, SDXL_UNET, "second.safetensors is an SDXL base model (2,567M-parameter U-Net); expected one with"),
        (SDXL_UNET, LORA, "second.safetensors is a LoRA; expected KOALA's U-Net."),
        (LORA, KOALA_UNET, "first.safetensors is a LoRA; expected SDXL's U-Net."),
        (SDXL_UNET, VAE, "second.safetensors is a VAE; expected KOALA's U-Net."),
        (SDXL_UNET, CUT_SHORT, "with tensors missing or of another shape (1, first: conv_out.bias)"),
        (SDXL_UNET, files.unet(KOALA_TINY), "second.safetensors has widths ((32, 64, 128), 96, 1600); expected (("),
        (SDXL_UNET, files.unet(replace(KOALA_700M, in_channels=9)), "second.safetensors is an inpainting U-Net"),
    ],
)
def test_a_wrong_file_is_named(
    tmp_path: Path, first: dict[str, tuple[int, ...]], second: dict[str, tuple[int, ...]], said: str
) -> None:
    paths = files.write(tmp_path / "first.safetensors", first), files.write(tmp_path / "second.safetensors", second)
    with pytest.raises(UserError) as problem:
        lineage.open_pair(*paths)
    assert said in str(problem.value)


def test_a_path_with_nothing_there_is_named(sdxl: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.safetensors cannot be read \(No such file or directory\)"):
        lineage.open_pair(sdxl, tmp_path / "nowhere.safetensors")
    with pytest.raises(UserError, match=r"holds no unet/diffusion_pytorch_model.fp16.safetensors"):
        lineage.open_pair(sdxl, tmp_path)
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html>")
    with pytest.raises(UserError, match=r"page\.safetensors is a web page"):
        lineage.open_pair(sdxl, tmp_path / "page.safetensors")


def test_swapped_files_end_the_command_in_one_line(whole: State, sdxl: Path, tmp_path: Path) -> None:
    student = written(cut(whole, KOALA_700M), tmp_path / "student.safetensors")
    done = command(student, sdxl, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "student.safetensors is the U-Net of koala-tiny; expected SDXL's own U-Net. Give SDXL's" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("name", "why"), [("mine.py", "is there already"), ("none/tables.py", "its folder is not")])
def test_the_tables_take_the_place_of_nothing(sdxl: Path, tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "mine.py").write_text("mine")
    with pytest.raises(UserError, match=why):
        lineage.run(sdxl, sdxl, tmp_path / name)
    assert (tmp_path / "mine.py").read_text() == "mine"
