"""`dev.py generate`: what is out of date is named and nothing is written by --check; images go by their sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from tools import commands
from tools.generate import __main__ as command
from tools.generate import drawn, frozen, pictures, sheet, thumbnails
from tools.generate.__main__ import GENERATORS
from tools.generate.generator import Generator, of_texts
from tools.tiny.pictures import draw


def test_every_generator_has_its_name_on_the_command_line() -> None:
    assert tuple(GENERATORS) == commands.GENERATED


def test_texts_are_written_where_they_differ_and_named_by_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.json").write_text("old")
    (tmp_path / "same.json").write_text("same")
    wanted = {tmp_path / "same.json": "same", tmp_path / "changed.json": "new"}
    monkeypatch.setattr(command, "GENERATORS", {"workflows": of_texts(tmp_path, "*.json", lambda: wanted)})
    assert command.main(["--check"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/changed.json: missing [python3 dev.py generate workflows]",
        f"{tmp_path}/old.json: no longer generated; delete it [python3 dev.py generate workflows]",
    ]
    assert not (tmp_path / "changed.json").exists()
    assert command.main([]) == 0
    (tmp_path / "old.json").unlink()
    assert command.main(["--check", "workflows"]) == 0
    (tmp_path / "same.json").write_text("other")
    assert command.main(["--check", "workflows"]) == 1
    assert "same.json: differs from what is generated" in capsys.readouterr().out


def test_only_the_generators_asked_for_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, bool]] = []

    def fake(name: str) -> Generator:
        return Generator(lambda redraw: ran.append((name, redraw)), list)

    monkeypatch.setattr(command, "GENERATORS", {name: fake(name) for name in commands.GENERATED})
    command.main(["frozen", "workflows", "--redraw"])
    assert ran == [("workflows", True), ("frozen", True)]
    with pytest.raises(SystemExit):
        command.main(["workflow"])


def test_an_image_is_out_of_date_once_its_source_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn, "RECORD", tmp_path / "drawn.json")
    image = tmp_path / "image.png"
    assert drawn.faults({image: "1"}, "PNG") == [f"{image}: missing"]
    Image.new("RGB", (8, 8)).save(image)
    assert drawn.faults({image: "1"}, "PNG") == [f"{image}: what it shows has changed since it was drawn"]
    drawn.record({image: "1"})
    assert drawn.faults({image: "1"}, "PNG") == []
    assert drawn.faults({image: "1"}, "JPEG") == [f"{image}: a PNG image, expected JPEG"]
    assert drawn.to_draw({image: "1"}, redraw=False) == {}
    assert drawn.stale({image: "2"}) == {image: "2"}


def test_a_thumbnail_goes_by_its_graph_not_by_its_note_or_the_version() -> None:
    path = thumbnails.FOLDER / "07 KOALA-700M accelerated.json"
    face = thumbnails.FACES["KOALA-700M accelerated"]
    workflow: dict[str, Any] = json.loads(path.read_text("utf-8"))
    before = thumbnails.source(workflow, face)
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            node["widgets_values"] = ["another text"]
        else:
            node["properties"]["ver"] = "9.9.9"
    assert thumbnails.source(workflow, face) == before
    sampler = next(node for node in workflow["nodes"] if node["type"] == "KoalaSampler")
    sampler["widgets_values"][0] += 1
    assert thumbnails.source(workflow, face) != before


def test_every_node_of_ours_has_a_help_image() -> None:
    assert {path.stem for path in pictures.sources()} == {path.stem for path in pictures.HELP.glob("*.png")} | {
        "canvas",
        "contact-sheet",
    }


def test_a_frozen_file_that_was_changed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "FOLDER", tmp_path)
    monkeypatch.setattr(frozen, "CHECKSUMS", tmp_path / "SHA256SUMS")
    folder = tmp_path / "0.0.1"
    folder.mkdir()
    for name in ("changed", "gone", "kept"):
        (folder / f"{name}.json").write_text(name)
    frozen.CHECKSUMS.write_text(frozen.checksums(frozen.files()))
    (folder / "changed.json").write_text("other")
    (folder / "gone.json").unlink()
    (folder / "new.json").write_text("new")
    faults = [line for line in frozen.check() if "0.0.1" in line]
    assert [line.split("0.0.1/")[1].split(";")[0] for line in faults] == [
        "changed.json: was changed",
        "gone.json: is gone",
        "new.json: not in SHA256SUMS",
    ]


def test_the_sheet_shows_the_image_that_is_nearest_to_a_drawing() -> None:
    prompt = "a red circle on a white background"
    wanted, square, other = (
        sheet.drawings(said)
        for said in (prompt, "a red square on a white background", "a red circle on a blue background")
    )
    place = torch.tensor([3, 300])
    drawn = [draw(shown.pick(place), 128) for shown in (square, other, wanted)]
    drawn.insert(1, drawn[2] + 0.3 * torch.randn(drawn[2].shape, generator=torch.Generator().manual_seed(0)))
    images = [to_pil_image(((pictures[0] + 1) / 2).clamp(0, 1)) for pictures in drawn]
    assert sheet.nearest(images, prompt) is images[3]
    assert sheet.nearest(images[:3], prompt) is images[1]
