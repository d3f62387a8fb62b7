"""What becomes of text encoders and prompts when a LoRA or fine-tune is carried over, and what is said of it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from koala_sdxl.distill.carry import source
from koala_sdxl.distill.carry.fine_tune import RANK, Difference, kept
from tests.dev import carry_runs
from tests.dev.carry_runs import carried, settings

place = pytest.fixture(scope="module")(carry_runs.place)


@pytest.fixture(scope="module")
def tuned(place: Path) -> Iterator[Path]:
    """A fine-tune of the teacher."""
    folder = carry_runs.fine_tuned(place, place / "tuned")
    yield folder
    shutil.rmtree(folder)


def changes(place: Path, tuned: Path, ends: str) -> list[torch.Tensor]:
    """The differences of the text encoders' files in parameters with such names."""
    found = []
    for part in ("text_encoder", "text_encoder_2"):
        (new,), (old,) = (list((folder / part).glob("*.safetensors")) for folder in (tuned, place / "sdxl-tiny"))
        before, after = load_file(old), load_file(new)
        found += [after[name].float() - before[name].float() for name in after if name.endswith(ends)]
    return found


def test_what_a_fine_tunes_text_encoders_lose_is_counted_and_named(place: Path, tuned: Path) -> None:
    opened = source.open_source(settings(place, "x", lora=tuned))
    _, said = opened.change.texts(opened.teacher.pipeline())
    whole, reached = 0.0, 0.0
    for change in changes(place, tuned, "mlp.fc1.weight"):
        strengths = torch.linalg.svdvals(change).square()
        whole, reached = whole + float(strengths.sum()), reached + float(strengths[:RANK].sum())
    found = re.fullmatch(
        r"text encoders: the weights of 6 linear layers, of whose change \(sum of squares\) rank 32 keeps ([\d.]+) %; "
        r"left out, though changed: (.*) \((.*), \.\.\.\)",
        said,
    )
    assert found
    assert 50 < float(found[1]) < 99
    assert float(found[1]) == pytest.approx(100 * reached / whole, abs=0.06)
    assert found[2] == "embeddings 1, biases 3, of norms 1, projection 1"
    assert found[3].split(", ") == [
        "clip_l.embeddings.token_embedding.weight",
        "clip_l.encoder.layers.0.self_attn.q_proj.bias",
        "clip_l.encoder.layers.1.self_attn.q_proj.bias",
    ]


def test_text_encoders_without_losses_are_told_too() -> None:
    assert kept([]) == "text encoders: as SDXL's"
    whole = Difference("clip_l.fc1.weight", {"up": torch.ones(1)}, 4.0, 1.0)
    assert kept([whole]).endswith(
        "the weights of 1 linear layers, of whose change (sum of squares) rank 32 keeps 75.0 %"
    )
    bias = Difference("clip_l.fc1.bias", {}, 1.0, 1.0)
    assert kept([bias]) == (
        "text encoders: the weights of 0 linear layers; left out, though changed: biases 1 (clip_l.fc1.bias)"
    )


def test_prompts_that_are_cut_are_counted_and_named_by_their_lines(place: Path) -> None:
    """A word of these is one token, and the limit of 77 has room for 75."""
    files = {"prompts": place / "long.txt", "keep": place / "longer.txt"}
    lines = ["a star", "", "star " * 75, "star " * 76, "a star", "", "star " * 100]
    files["prompts"].write_text("\n".join(lines))
    files["keep"].write_text("\n".join(["star " * 80] * 12 + ["a star"]))
    told = carried(place, "x", **files, check=True)
    (used, kept_) = [line for line in told if "77 tokens" in line]
    said = "prompts have more than 77 tokens, start and end included, and are cut there: line"
    assert used == f"{files['prompts']}: 2 of 5 {said} 4, 7"
    assert kept_ == f"{files['keep']}: 12 of 13 {said} 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more"


def test_nothing_is_said_of_prompts_that_are_whole(place: Path) -> None:
    assert not [line for line in carried(place, "x", check=True) if "77 tokens" in line]
