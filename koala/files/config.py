"""The configuration that comes with weights: JSON files of a folder, and JSON in the metadata of a single file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..architecture.layout import Layout, name
from ..architecture.lineage import KeptTransformers, check_kept
from ..releases import SCHEDULER_CONFIG
from .conventions import KEPT_TRANSFORMERS_KEY, label
from .header import CheckpointError, Header


def read_json(path: Path) -> dict[str, object]:
    """A small config file's contents, empty where there is no such file. Raises CheckpointError as ``parse_json``."""
    if not path.is_file():
        return {}
    return parse_json(path.read_bytes(), "/".join(path.parts[-3:]))


def parse_json(text: str | bytes, place: str) -> dict[str, object]:
    """A JSON object; ``place`` says in an error where it is. Raises CheckpointError for anything else."""
    try:
        config = json.loads(text)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{place} holds no JSON object; expected a model's configuration. Restore the published file."
        )
    return config


def complete_scheduler(stated: Mapping[str, object], place: str, remedy: str) -> dict[str, object]:
    """A scheduler configuration, with SDXL's values for all that it does not state.

    Args:
        stated: the model's own configuration.
        place: where it is, for an error.
        remedy: what to do, for an error.

    Raises CheckpointError for a model that does not predict epsilon.
    """
    scheduler = {**SCHEDULER_CONFIG, **stated}
    if scheduler["prediction_type"] != "epsilon":
        raise CheckpointError(
            f"{place} asks for {scheduler['prediction_type']} prediction; every KOALA predicts epsilon. {remedy}"
        )
    return scheduler


def stated_transformers(header: Header, layout: Layout) -> KeptTransformers | None:
    """Which of SDXL's transformer blocks a file says that its U-Net kept; None where it says nothing.

    Raises CheckpointError where that does not fit the layout.
    """
    if KEPT_TRANSFORMERS_KEY not in header.metadata:
        return None
    place = f"{label(header.path)}: the metadata {KEPT_TRANSFORMERS_KEY}"
    stated = parse_json(header.metadata[KEPT_TRANSFORMERS_KEY], place)
    kept = {module: tuple(indices) for module, indices in stated.items() if isinstance(indices, list)}
    try:
        if len(kept) < len(stated) or any(type(index) is not int for indices in kept.values() for index in indices):
            raise ValueError("it has more than lists of whole numbers")
        check_kept(layout, kept)
    except ValueError as error:
        raise CheckpointError(f"{place} does not fit {name(layout)}: {error}. Save the model again.") from None
    return kept
