"""What each generator of this package offers, and what several of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.harness.testhost import ROOT, say


@dataclass(frozen=True)
class Generator:
    """How some files of the repository are written and checked."""

    write: Callable[[bool], None]
    """Writes what is out of date; given True, images that are up to date, too. Says which files it wrote."""
    check: Callable[[], list[str]]
    """A line for each file that is not as ``write`` leaves it: the file, and what is wrong. Writes nothing."""
    needs_server: bool = False
    """Whether ``check`` starts a ComfyUI: such a check is left out of `dev.py test`, whose tests have a server."""


def of_texts(folder: Path, pattern: str, contents: Callable[[], Mapping[Path, str]]) -> Generator:
    """The generator of text files: all files of ``folder`` that match ``pattern``, and no others."""

    def check() -> list[str]:
        return text_faults(contents(), folder.glob(pattern))

    return Generator(lambda _: write_texts(contents()), check)


def write_texts(contents: Mapping[Path, str]) -> None:
    """Write the files whose text is not already this."""
    for path, text in contents.items():
        if not path.is_file() or path.read_text("utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
            say(f"written: {shown(path)}")


def text_faults(contents: Mapping[Path, str], present: Iterable[Path]) -> list[str]:
    """What is wrong with generated text files, ``present`` being those that there are."""
    faults = [
        f"{shown(path)}: {'differs from what is generated' if path.is_file() else 'missing'}"
        for path, text in contents.items()
        if not path.is_file() or path.read_text("utf-8") != text
    ]
    return faults + [f"{shown(path)}: no longer generated; delete it" for path in sorted({*present} - contents.keys())]


def shown(path: Path) -> str:
    """A path as messages name it: relative to the checkout where it is inside."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)
