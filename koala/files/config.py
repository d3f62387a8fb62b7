"""The configuration that comes with weights: JSON files of a folder, and JSON in the metadata of a single file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from ..architecture.layout import Layout, name
from ..architecture.lineage import KeptTransformers, check_kept
from ..releases import SCHEDULER_CONFIG, SPACINGS, Identity
from .conventions import KEPT_TRANSFORMERS_KEY, SETTINGS_KEY, label
from .header import CheckpointError, Header

CONFIG_LIMIT = 1_000_000
"""Bytes. A published configuration has two thousand."""
SHOWN = 40
"""Characters of a value that an error shows."""


class Rule(NamedTuple):
    """What a scheduler configuration may say under one key, and the same in words."""

    accepts: Callable[[object], bool]
    expected: str


def _one_of(*values: object) -> Rule:
    """One of these values, of the same type: true is not 1."""

    def accepts(value: object) -> bool:
        return any(type(value) is type(accepted) and value == accepted for accepted in values)

    return Rule(accepts, " or ".join(json.dumps(accepted) for accepted in values))


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < inf


def _is_scale(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 100


_OFF = _one_of(False)
_LIMIT = Rule(lambda value: value is None or _is_positive(value), "null or a positive number")
_KINDS = (
    *("DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSDE", "DPMSolverSinglestep"),
    *("EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete"),
    *("LCM", "LMSDiscrete", "PNDM", "TCD", "UniPCMultistep"),
)
"""diffusers' schedulers over 1000 discrete betas; its EDM and flow schedulers have other noise."""

SCHEDULER_RULES: Mapping[str, Rule] = {
    "_class_name": _one_of(*(f"{kind}Scheduler" for kind in _KINDS))._replace(expected='"EulerDiscreteScheduler"'),
    "prediction_type": _one_of("epsilon"),
    "num_train_timesteps": _one_of(1000),
    "beta_schedule": _one_of("scaled_linear"),
    "beta_start": _one_of(SCHEDULER_CONFIG["beta_start"]),
    "beta_end": _one_of(SCHEDULER_CONFIG["beta_end"]),
    "trained_betas": _one_of(None),
    "rescale_betas_zero_snr": _OFF,
    "interpolation_type": _one_of("linear"),
    "use_karras_sigmas": _OFF,
    "use_exponential_sigmas": _OFF,
    "use_beta_sigmas": _OFF,
    "use_lu_lambdas": _OFF,
    "use_flow_sigmas": _OFF,
    "sigma_min": _LIMIT,
    "sigma_max": _LIMIT,
    "timestep_spacing": _one_of(*SPACINGS),
    "timestep_type": _one_of("discrete", "continuous"),
    "steps_offset": _one_of(0, 1),
    "final_sigmas_type": _one_of("zero", "sigma_min"),
}
"""Key of a scheduler_config.json -> what is accepted: all that changes a noise schedule.

The host's U-Net finds its timestep by the sigma, in the table of SDXL's 1000 betas, to the nearest whole number. So the
betas must be SDXL's, and the timesteps of a schedule whole numbers below 1000; Karras', exponential and beta sigmas lie
between them (the final latent then differs by 0.002 to 0.011 from diffusers', against 0.00002). ``sigma_min`` and
``sigma_max`` serve these alone, and ``timestep_type`` v-prediction alone. Other keys, such as DDIM's ``clip_sample``,
change no schedule.
"""
SETTINGS_RULES: Mapping[str, Rule] = {
    "steps": Rule(lambda value: type(value) is int and 1 <= value <= 1000, "a whole number from 1 to 1000"),
    "cfg": Rule(_is_scale, "a number from 0 to 100"),
    "spacing": _one_of(*SPACINGS),
}
"""Key of the metadata ``SETTINGS_KEY`` -> what KOALA Sampler takes."""


def read_json(path: Path) -> dict[str, object]:
    """A small config file's contents, empty where there is no such file.

    Raises CheckpointError as ``parse_json``, and where it cannot be read or is a link to nothing.
    """
    place = "/".join(path.parts[-3:])
    try:
        with path.open("rb") as file:
            text = file.read(CONFIG_LIMIT + 1)
    except FileNotFoundError:
        if not path.is_symlink():
            return {}
        raise CheckpointError(
            f"{place} is a link to a file that is not there; expected a model's configuration. "
            f"Restore the published file."
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{place} cannot be read ({error.strerror}); expected a model's configuration. Restore the published file."
        ) from None
    return parse_json(text, place)


def parse_json(text: str | bytes, place: str) -> dict[str, object]:
    """A JSON object; ``place`` says in an error where it is. Raises CheckpointError for anything else."""
    if len(text) > CONFIG_LIMIT:
        raise CheckpointError(
            f"{place} has more than {CONFIG_LIMIT:,} bytes; expected a model's configuration. "
            f"Restore the published file."
        )
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):  # the latter where it is nested too deeply
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

    Raises CheckpointError for a value that ``SCHEDULER_RULES`` does not accept.
    """
    for key, rule in SCHEDULER_RULES.items():
        if key in stated and not rule.accepts(stated[key]):
            raise CheckpointError(
                f"{place}: {key} is {_shown(stated[key])}; expected {rule.expected}: ComfyUI's SDXL U-Net follows no "
                f"other noise schedule. {remedy}"
            )
    return {**SCHEDULER_CONFIG, **stated}


def _shown(value: object) -> str:
    """A value as JSON, cut where it is long; lists and objects, which may be deep, by their kind."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


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


def with_stated_settings(identity: Identity, header: Header) -> Identity:
    """The identity with the settings that the file asks for, where it does.

    Raises CheckpointError where these are no settings.
    """
    if SETTINGS_KEY not in header.metadata:
        return identity
    place = f"{label(header.path)}: the metadata {SETTINGS_KEY}"
    stated = parse_json(header.metadata[SETTINGS_KEY], place)
    for key, rule in SETTINGS_RULES.items():
        if not rule.accepts(stated.get(key)):
            shown = json.dumps(stated.get(key))[:SHOWN]
            raise CheckpointError(f"{place}: {key} is {shown}; expected {rule.expected}. Save the model again.")
    asked: dict[str, Any] = {key: stated[key] for key in SETTINGS_RULES}
    variant = replace(identity.variant, settings=replace(identity.variant.settings, **asked))
    return replace(identity, variant=variant)
