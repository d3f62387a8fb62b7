"""Which files of a Hugging Face folder are read: one list, for the reader and for whoever asks whether one changed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..architecture.layout import KOALA_NAMES
from ..releases import release_for
from .conventions import FOLDER_PARTS, folder_label, folders_above
from .header import CheckpointError

SCHEDULER_FILE = "scheduler/scheduler_config.json"
UNET_CONFIG_FILE = "unet/config.json"


def folder_files(folder: Path) -> dict[str, Path]:
    """What is read of a folder: part -> its weights, fp16 preferred, where there are any; and the path of each
    configuration file, by itself, whether it is there or not."""
    files = {part: present(folder / part, choices) for part, choices in FOLDER_PARTS.items()}
    files |= {file: folder / file for file in (SCHEDULER_FILE, UNET_CONFIG_FILE)}
    return {name: path for name, path in files.items() if path}


def present(folder: Path, choices: Iterable[str]) -> Path | None:
    """The first of these files that is there, or that may be: whoever reads it says what keeps it from being read."""
    for path in (folder / choice for choice in choices):
        try:
            if path.is_file():
                return path
        except OSError:
            return path
    return None


def require_part(files: dict[str, Path], folder: Path, part: str) -> Path:
    """The weights of one model in ``folder_files(folder)``. Raises CheckpointError where there are none."""
    if part in files:
        return files[part]
    choices, named = FOLDER_PARTS[part], folder_label(folder)
    wanted = f"{named}/{part}/{choices[0]} (or {choices[1]})"
    release = release_for(next(iter(KOALA_NAMES)), named, folders_above(folder))
    url = release.url(f"{part}/{choices[1] if part == 'vae' else choices[0]}")
    pickled = sorted(item.name for item in (folder / part).glob("*.bin")) if (folder / part).is_dir() else []
    only = f" Only {', '.join(pickled)} is there, a pickle, which is not loaded." if pickled else ""
    raise CheckpointError(f"{wanted} is not there; a KOALA folder needs it.{only} It is published at {url}")
