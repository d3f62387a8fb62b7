"""What is measured of the sample images while a student is distilled: a judge of one's own, and the CLIP score."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from koala_sdxl.distill import checkpoints
from koala_sdxl.distill.errors import UserError
from koala_sdxl.distill.measures import ClipScore, Judge
from tests.dev import distill_runs
from tests.dev.distill_runs import SETTINGS, refused, run

place = pytest.fixture(scope="module")(distill_runs.place)
no_accelerator_left = pytest.fixture(autouse=True)(distill_runs.no_accelerator_left)

PROMPTS = ["a red circle", "a blue star"]
JUDGE = """
import json, pathlib, sys
from PIL import Image, ImageStat
folder = pathlib.Path(sys.argv[1])
rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
light = [ImageStat.Stat(Image.open(folder / row["file_name"]).convert("L")).mean[0] for row in rows]
print("a line that is no number")
print(json.dumps({"light": sum(light) / len(light), "words": sum(len(row["text"].split()) for row in rows)}))
"""


@pytest.fixture(scope="module")
def clip(place: Path) -> Path:
    """The folder of a small CLIP with random weights."""
    torch.manual_seed(3)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = CLIPConfig(
        text_config={**small, "eos_token_id": 49407, "bos_token_id": 49406},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model = CLIPModel(settings)
    with torch.no_grad():
        model.visual_projection.weight.neg_()  # the other way round all cosines are below 0, which counts as 0
    model.save_pretrained(place / "clip")
    tokenizer = CLIPTokenizer.from_pretrained(place / "sdxl-tiny" / "tokenizer")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(place / "clip")
    return place / "clip"


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "validation.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def pictures(folder: Path) -> list[Image.Image]:
    return [Image.open(path) for path in sorted(folder.glob("*.png"))]


def test_the_score_is_the_cosine_of_image_and_prompt(clip: Path) -> None:
    images = [Image.effect_noise((48, 64), sigma).convert("RGB") for sigma in (10, 60, 250)] * 7
    prompts = [f"prompt number {number}" for number in range(21)]
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    cosines = []
    for image, prompt in zip(images, prompts, strict=True):
        with torch.no_grad():
            seen = model.get_image_features(**processor(images=image, return_tensors="pt")).pooler_output
            read = model.get_text_features(**processor(text=prompt, return_tensors="pt")).pooler_output
        cosines.append(float(torch.nn.functional.cosine_similarity(seen, read)))
    wanted = sum(max(cosine, 0.0) for cosine in cosines) / len(cosines) * 100
    assert wanted > 1
    assert ClipScore(clip, torch.device("cpu"))(images, prompts) == pytest.approx(wanted, rel=1e-4)


def test_the_best_checkpoint_is_chosen_by_a_measure_of_ones_own(place: Path, clip: Path) -> None:
    (place / "judge.py").write_text(JUDGE)
    tables: dict[str, dict[str, Any]] = {
        "training": {**SETTINGS["training"], "steps": 3, "learning_rate": 0.02, "keep": 1, "checkpoint_every": 3},
        "validation": {"every": 1, "judge": [sys.executable, "judge.py"], "clip": "clip", "best": "highest light"},
        "log": {"prompts": PROMPTS, "sample_steps": 1},
    }
    said = run(place, "judged", **tables)
    folder, rows = place / "judged", table(place / "judged")
    assert list(rows[0]) == ["step", "clip_score", "light", "words"]
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert {row["words"] for row in rows} == {"6.0"}
    images = pictures(folder / "samples" / "step-0000002")
    assert [image.size for image in images] == [(64, 64), (64, 64)]
    assert ClipScore(clip, torch.device("cpu"))(images, PROMPTS) == pytest.approx(float(rows[1]["clip_score"]))
    brightest = max(rows, key=lambda row: float(row["light"]))
    best = checkpoints.Best(step=int(brightest["step"]), measure="highest light", value=float(brightest["light"]))
    assert checkpoints.best(folder / "checkpoints") == best
    kept = {"best.json", "step-0000003", f"step-{best.step:07d}"}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == kept
    assert f"the highest light in validation is {best.value:.4f}, of step {best.step}; the result is of step 3." in said


def test_a_judge_is_no_process_of_the_run_and_may_say_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    script = "import os, sys; sys.stdout.buffer.write(b'\\xff\\n'); print(len(os.environ.get('WORLD_SIZE', '')))"
    assert Judge((sys.executable, "-c", script))(tmp_path) == {"judge": 0.0}


def test_a_judge_that_fails_ends_no_run(place: Path) -> None:
    script = "import sys; print('no images of mine', file=sys.stderr); sys.exit(3)"
    said = run(
        place,
        "failing",
        validation={"every": 1, "judge": [sys.executable, "-c", script], "best": "lowest judge"},
        log={"prompts": PROMPTS, "sample_steps": 1},
    )
    told = [line for line in said if line.startswith("step 1: ")]
    assert told[0].startswith(f"step 1: validation.judge: {sys.executable} -c ")
    assert "has failed (it ended with status 3: no images of mine); expected a number or " in told[0]
    assert told[1] == "step 1: validation.best = 'lowest judge', but measured was nothing."
    assert said[-1] == f"finished: {place / 'failing' / 'result'}"


@pytest.mark.parametrize(
    ("printed", "found"),
    [
        ("0.25", {"judge": 0.25}),
        ('{"fid": 12, "light": 0.5}', {"fid": 12.0, "light": 0.5}),
        ("", "it printed '' last"),
        ("good", "it printed 'good' last"),
        ('{"fid": "12"}', "it printed fid = '12'"),
        ('{"loss": 1.0}', "it printed loss = 1.0"),
        ("true", "it printed judge = True"),
    ],
)
def test_what_a_judge_prints_is_a_number_or_several(tmp_path: Path, printed: str, found: Any) -> None:
    judge = Judge((sys.executable, "-c", f"print({printed!r})"))
    if isinstance(found, dict):
        assert judge(tmp_path) == found
        return
    with pytest.raises(UserError) as problem:
        judge(tmp_path)
    assert f"has failed ({found}); expected a number or a JSON object of numbers as its last line" in str(problem.value)


@pytest.mark.parametrize(
    ("validation", "prompts", "said"),
    [
        ({"judge": ["no-such-command"]}, PROMPTS, "validation.judge: there is no command no-such-command; expected a "),
        ({"clip": "nowhere"}, PROMPTS, "validation.clip: {place}/nowhere has no config.json; expected a folder with "),
        ({"clip": "clip"}, [], "log.prompts is empty; validation.judge and validation.clip measure the images of "),
        ({"clip": "clip"}, PROMPTS, "validation.best = 'lowest loss' is not measured; expected lowest or highest and "),
        ({"clip": "sdxl-tiny/unet", "best": "highest clip_score"}, PROMPTS, "validation.clip: {place}/sdxl-tiny/unet "),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_first_step(
    place: Path, clip: Path, validation: dict[str, Any], prompts: list[str], said: str, request: pytest.FixtureRequest
) -> None:
    name = f"refused-{request.node.callspec.indices['validation']}"
    found = refused(place, name, validation=validation, log={"prompts": prompts, "sample_steps": 1})
    assert found.startswith(said.format(place=place))
    assert len(found.splitlines()) == 1
    assert not (place / name / "metrics.csv").exists()


def test_best_json_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "step-0000007").mkdir()
    checkpoints.write_best(tmp_path, found := checkpoints.Best(step=7, measure="lowest fid", value=3.5), keep=1)
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 7, "measure": "lowest fid", "value": 3.5}
    assert checkpoints.best(tmp_path) == found
