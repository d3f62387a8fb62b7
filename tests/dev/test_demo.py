"""What the demo does beside drawing: where it writes, what the sheet looks like."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from tools import demo
from tools.harness import contact_sheet
from tools.harness.errors import UserError


def picture(colour: str, side: int = 128) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


def test_a_png_is_written_where_it_was_asked_for(tmp_path: Path) -> None:
    assert demo.target_for(tmp_path / "deep" / "mine.png", sheet=False) == tmp_path / "deep" / "mine.png"


def test_a_folder_gets_the_next_free_name(tmp_path: Path) -> None:
    (tmp_path / "koala-0001.png").touch()
    (tmp_path / "contact-sheet-0001").mkdir()
    assert demo.target_for(tmp_path, sheet=False).name == "koala-0002.png"
    assert demo.target_for(tmp_path, sheet=True).name == "contact-sheet-0002.png"


def test_nothing_is_written_over(tmp_path: Path) -> None:
    mine = tmp_path / "mine.png"
    mine.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        demo.target_for(mine, sheet=False)
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        demo.target_for(tmp_path / "notes", sheet=False)


def test_one_picture_is_saved_byte_for_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.save([picture("red")], ["red"], tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes() == picture("red")
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "one.png")


def test_several_become_a_sheet_and_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    colours = ["red", "green", "blue", "yellow", "purple"]
    demo.save([picture(colour) for colour in colours], colours, tmp_path / "sheet.png")
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "sheet.png")
    assert min(path.name for path in (tmp_path / "sheet").iterdir()) == "01 red.png"
    sheet = Image.open(tmp_path / "sheet.png")
    across, down = sheet.width // contact_sheet.COLUMNS, sheet.height // 2
    seen = [sheet.getpixel((across * (place % 4) + across // 2, down * (place // 4) + down // 2)) for place in range(5)]
    assert seen == [(255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 0), (128, 0, 128)]


def test_captions_are_broken_to_fit() -> None:
    font = contact_sheet.ImageFont.load_default(size=12)
    lines = contact_sheet.wrapped("a purple triangle on a gray background", font, 160).split("\n")
    assert " ".join(lines) == "a purple triangle on a gray background"
    assert 1 < len(lines) <= 2
    assert all(font.getlength(line) <= 160 for line in lines)


def test_weights_that_are_none_are_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "page.safetensors").write_text("<html>not found</html>")
    with pytest.raises(UserError, match=r"page\.safetensors"):
        demo.find_weights(tmp_path / "page.safetensors")
    with pytest.raises(UserError, match="nothing-here"):
        demo.find_weights(tmp_path / "nothing-here")
