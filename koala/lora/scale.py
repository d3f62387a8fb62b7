"""How strong an adapter of PEFT or diffusers is: its configuration, in the file's header or beside the file.

PEFT's files hold no alpha. Their scale is alpha / rank, or alpha / sqrt(rank) for rsLoRA, with a pattern of module
names for modules of their own; diffusers from 0.35 on writes that configuration into the header
(``lora_adapter_metadata``, diffusers/loaders/lora_base.py), PEFT into ``adapter_config.json``. An alpha tensor in the
file counts before either; diffusers itself refuses a file that has both.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.conventions import PEFT_WEIGHTS, label
from ..files.header import CheckpointError, Header
from ..words import message

METADATA_KEY = "lora_adapter_metadata"
CONFIG_NAME = "adapter_config.json"
PARTS = ("unet", "text_encoder", "text_encoder_2")
"""What the entries of diffusers' metadata begin with."""
DEFAULT = 8
"""PEFT's own rank and alpha, where a configuration has none (``LoraConfig``, ``LoHaConfig``, ``LoKrConfig``)."""

_BASE_ALTERED = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA"}
_VARIANTS = {
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "use_bdlora": "BD-LoRA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "layer replication",
}


@dataclass(frozen=True)
class Config:
    """What PEFT's configuration says of an adapter's strength; ``source``: where it stands."""

    source: str
    alpha: float
    rank: int
    rslora: bool
    alphas: Mapping[str, float]
    ranks: Mapping[str, float]
    """Patterns of module names, as PEFT matches them -> what these modules have instead."""
    base: str
    """The model that it was trained on, as its trainer called it; may be empty."""

    def scale(self, module: str, rank: int | None) -> float:
        """Factor of a module's change. ``module``: its name within the U-Net or text encoder; ``rank``: its tensors',
        None for kinds without.

        Raises ValueError where its tensors have another rank than the configuration says.
        """
        said = int(_matching(self.ranks, module, self.rank))
        if rank is not None and rank != said:
            raise ValueError(
                message("its rank is {rank}, {source} says {said}", rank=rank, source=self.source, said=said)
            )
        return _matching(self.alphas, module, self.alpha) / (math.sqrt(said) if self.rslora else said)


def configs(header: Header) -> dict[str, Config]:
    """PEFT's configuration of each part of a LoRA file (see ``PARTS``); empty where there is none.

    Raises CheckpointError for a configuration that cannot be read, or of a method that changes more than its tensors
    say.
    """
    file = label(header.path)
    if text := header.metadata.get(METADATA_KEY):
        stated = _object(file, f"its metadata {METADATA_KEY}", text)
        parts: dict[str, dict[str, Any]] = {}
        for key, value in stated.items():
            part, _, name = key.partition(".")
            if part not in PARTS:  # the U-Net's own function writes no part
                part, name = "unet", key
            parts.setdefault(part, {})[name] = value
        return {part: _config(file, message("its metadata"), own) for part, own in parts.items()}
    beside = config_beside(header.path)
    if beside is None:
        return {}
    stated = _object(file, f"the {CONFIG_NAME} beside it", beside.read_text("utf-8", "replace"))
    return dict.fromkeys(PARTS, _config(file, CONFIG_NAME, stated))


def config_beside(path: Path) -> Path | None:
    """The configuration that belongs to a file as PEFT saves it: beside ``PEFT_WEIGHTS``, or beside the
    only .safetensors file of a folder. None where there is none, or where it could be another file's."""
    config = path.with_name(CONFIG_NAME)
    if not config.is_file():
        return None
    alone = path.name == PEFT_WEIGHTS or not any(other != path for other in path.parent.glob("*.safetensors"))
    return config if alone else None


def _object(file: str, source: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{file}: {source} is not a JSON object ({text[:40]!r}); expected PEFT's configuration, which says how "
            f"strong the LoRA is. Save the LoRA again, or remove that entry to use it at alpha = rank."
        )
    return found


def _config(file: str, source: str, stated: Mapping[str, Any]) -> Config:
    def wrong(key: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{file}: {source} says {key}: {str(stated[key])[:60]}; expected {expected}.")

    def number(key: str, default: float) -> float:
        value = stated.get(key, default)
        if not _is_number(value):
            raise wrong(key, "a finite number")
        return float(value)

    def patterns(key: str) -> dict[str, float]:
        found = stated.get(key) or {}
        if not isinstance(found, dict) or not all(_is_number(value) for value in found.values()):
            raise wrong(key, "module names with a finite number for each")
        if bad := next((name for name in found if not _is_safe(name)), None):
            raise CheckpointError(
                f"{file}: {source} has {bad[:60]!r} in {key}; expected a module's name, or a simple pattern of names."
            )
        return {str(name): float(value) for name, value in found.items()}

    _refuse_methods(file, source, stated)
    alpha = number("lora_alpha" if "lora_alpha" in stated else "alpha", DEFAULT)
    rank, ranks = number("r", DEFAULT), patterns("rank_pattern")
    if any(value < 1 or value != int(value) for value in (rank, *ranks.values())):
        raise wrong("r" if rank < 1 or rank != int(rank) else "rank_pattern", "ranks from 1 on")
    base = stated.get("base_model_name_or_path")
    return Config(
        source,
        alpha,
        int(rank),
        bool(stated.get("use_rslora")),
        patterns("alpha_pattern"),
        ranks,
        base if isinstance(base, str) else "",
    )


def _refuse_methods(file: str, source: str, stated: Mapping[str, Any]) -> None:
    start = str(stated.get("init_lora_weights", "")).lower()
    for prefix, method in _BASE_ALTERED.items():
        if start.startswith(prefix):
            raise CheckpointError(
                f"{file} is {_a(method)} adapter ({source} says init_lora_weights: {start}), which belongs to weights "
                f"that {method} itself altered; expected a LoRA for SDXL's own weights. Convert it with PEFT "
                f"(save_pretrained with path_initial_model_for_weight_conversion)."
            )
    for key, method in _VARIANTS.items():
        if stated.get(key):
            raise CheckpointError(
                f"{file} is {_a(method)} adapter ({source} says {key}), which ComfyUI cannot apply; expected a LoRA, "
                f"LoCon, LoHa, LoKr or DoRA. Leave it out, or convert it."
            )


def _a(method: str) -> str:
    """A method's name with its article."""
    return f"{'an' if method[0] in 'AOa' else 'a'} {method}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _matching(patterns: Mapping[str, float], module: str, otherwise: float) -> float:
    """As PEFT's ``get_pattern_key`` (peft/utils/other.py): the first pattern that matches the end of the name."""
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(found, otherwise)


def _is_safe(pattern: object) -> bool:
    """Whether a pattern is a regular expression that cannot take long: at most two repetitions, none of a group."""
    if not isinstance(pattern, str) or len(pattern) > 500 or len(re.findall(r"(?<!\\)[*+{]", pattern)) > 2:
        return False
    if re.search(r"\)[*+{]|\(\?(?!:)|\\[1-9]", pattern):
        return False
    try:
        re.compile(pattern)
    except (re.error, OverflowError):
        return False
    return True
