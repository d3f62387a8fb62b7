"""What generated images were drawn from: a digest for each, in drawn.json.

An image cannot be compared with a new one, as no two machines draw the same pixels. So each image's source is
remembered by its digest, and an image is out of date once the digest of its source is another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from tools.generate.generator import shown
from tools.harness.testhost import ROOT

RECORD = ROOT / "tools" / "generate" / "drawn.json"


def digest(source: Any) -> str:
    """A short digest of a source that JSON can hold."""
    return hashlib.sha256(json.dumps(source, sort_keys=True, default=str).encode()).hexdigest()[:16]


@cache
def file_digest(path: Path) -> str:
    """A short digest of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def graph(workflow: Mapping[str, Any]) -> list[Any]:
    """What of a workflow an image shows or depends on: neither notes, nor which version wrote it or where files are."""
    shown_of = ("type", "pos", "size", "inputs", "widgets_values")
    nodes = (node for node in workflow["nodes"] if node["type"] != "MarkdownNote")
    return [[[node[key] for key in shown_of] for node in nodes], workflow["links"]]


def recorded() -> dict[str, str]:
    """Image, by its path in the checkout -> digest of what it was drawn from."""
    digests: dict[str, str] = json.loads(RECORD.read_text("utf-8")) if RECORD.is_file() else {}
    return digests


def record(drawn: Mapping[Path, str]) -> None:
    """Record the sources of images just drawn, and forget those of images that are gone."""
    digests = {name: source for name, source in recorded().items() if (ROOT / name).is_file()}
    digests |= {shown(path): source for path, source in drawn.items()}
    RECORD.write_text(json.dumps(dict(sorted(digests.items())), indent=1) + "\n", "utf-8")


def stale(images: Mapping[Path, str]) -> dict[Path, str]:
    """Those of the images, by path and digest of their source, that are missing or were drawn from another source."""
    known = recorded()
    return {path: source for path, source in images.items() if not path.is_file() or known.get(shown(path)) != source}


def to_draw(images: Mapping[Path, str], redraw: bool) -> dict[Path, str]:
    """The images that a generator is to draw: all of them if told to ``redraw``, else those that are out of date."""
    return dict(images) if redraw else stale(images)


def faults(images: Mapping[Path, str], kind: str) -> list[str]:
    """A line for each image that is missing, drawn from another source, or no image of this ``kind`` (PNG, JPEG)."""
    lines, outdated = [], stale(images)
    for path in images:
        if not path.is_file():
            lines.append(f"{shown(path)}: missing")
        elif path in outdated:
            lines.append(f"{shown(path)}: what it shows has changed since it was drawn")
        else:
            with Image.open(path) as image:
                if image.format != kind:
                    lines.append(f"{shown(path)}: a {image.format} image, expected {kind}")
    return lines
