"""What a carried LoRA says that it came from: every file that was read, hashed once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from koala_sdxl.distill.carry import source
from koala_sdxl.distill.carry import work as works
from koala_sdxl.distill.carry.settings import digest, origin
from koala_sdxl.distill.carry.work import Work
from koala_sdxl.distill.errors import UserError
from tests.dev import carry_runs
from tests.dev.carry_runs import carried, settings

place = pytest.fixture(scope="module")(carry_runs.place)


@pytest.fixture(scope="module")
def tuned(place: Path) -> Path:
    """A fine-tune of the teacher."""
    return carry_runs.fine_tuned(place, place / "tuned")


READ = [
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors",
    "text_encoder_2/config.json",
    "text_encoder_2/model.fp16.safetensors",
]


@pytest.mark.parametrize(
    "changed", [*READ, "tokenizer/tokenizer_config.json", "unet/diffusion_pytorch_model.fp16.safetensors"]
)
def test_every_file_of_a_folder_that_is_read_is_in_the_origin(place: Path, tuned: Path, changed: str) -> None:
    given = settings(place, "x", lora=tuned)
    files = source.open_source(given).files
    before = origin(given, files, digest)
    names = set(before["teacher"]["beside"])
    assert names >= {*READ, "tokenizer/tokenizer_config.json", "tokenizer_2/tokenizer_config.json"}
    assert not any("vae" in name for name in names)
    path = tuned / changed
    content = path.read_bytes()
    path.write_bytes(content + b" ")
    after = origin(given, files, digest)
    path.write_bytes(content)
    assert {name for name in before if before[name] != after[name]} == {"lora"}


def test_the_tokenizers_folder_is_in_the_origin(place: Path) -> None:
    given = settings(place, "x", tokenizer=place / "words")
    shutil.copytree(place / "sdxl-tiny" / "tokenizer", place / "words")
    told = origin(given, source.open_source(given).files, digest)["teacher"]["beside"]
    assert any(name.startswith("words/") for name in told)
    assert not any(name.startswith("tokenizer") for name in told)


def test_a_file_is_hashed_once_until_it_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return digest(path)

    monkeypatch.setattr(works, "digest", counted)
    file, folder = tmp_path / "weights", tmp_path / "x.carry"
    file.write_text("one")
    Work(folder).make()
    first = [Work(folder).digest(file) for _ in range(2)]
    assert first == [digest(file)] * 2
    assert hashed == [file]
    file.write_text("two")
    assert Work(folder).digest(file) == digest(file) != first[0]
    assert hashed == [file] * 2
    (folder / "hashes.json").write_text("{")
    with pytest.raises(UserError, match=r"x\.carry cannot be used \("):
        Work(folder).digest(file)


def test_a_check_hashes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(path: Path) -> str:
        raise AssertionError(path)

    monkeypatch.setattr(works, "digest", never)
    carried(place, "x", check=True)
    with pytest.raises(AssertionError):
        carried(place, "x")


def test_an_older_versions_run_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(tmp_path / "x.carry")
    work.make()
    work.open({"seed": 0})
    work.open({"seed": 0})
    monkeypatch.setattr(works, "FORMAT", {what: number + 1 for what, number in works.FORMAT.items()})
    with pytest.raises(UserError, match=r"an unfinished run with other files of the work folder; expected the same"):
        work.open({"seed": 0})
