"""One module of a LoRA file: whether its tensors make a change that ComfyUI can compute, and under which names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from safetensors import safe_open

from ..architecture.keys import Shape
from ..files.header import Header
from ..words import Message, message
from .kinds import (
    ALPHA,
    BIAS,
    BIASES,
    DORA_SCALE,
    RESCALE,
    RESHAPE,
    UP_BIAS,
    IncompleteError,
    Made,
    MalformedError,
    UnsupportedError,
    read,
)
from .names import Groups, bare
from .scale import Config

Outcome = Literal["applied", "folded", "removed", "mismatch", "incomplete", "malformed", "unsupported", "unknown"]
"""``folded``: its layer is one that KOALA lacks, and its change is added to the nearest kept transformer block.
``removed``: the same, and its change is left out. ``mismatch``: the layer is there, in another shape. ``incomplete``:
tensors are missing. ``malformed``: they do not go together, or are not numbers that can be added to weights.
``unsupported``: a kind that ComfyUI does not apply. ``unknown``: no layer of that name."""

WORDS: dict[Outcome, Message] = {
    "applied": message("applied"),
    "folded": message("folded into a neighbour"),
    "removed": message("removed with KOALA's missing layers"),
    "mismatch": message("of another shape"),
    "incomplete": message("incomplete"),
    "malformed": message("malformed"),
    "unsupported": message("of a kind that ComfyUI does not apply"),
    "unknown": message("unknown"),
}
"""Outcome -> words, in the order in which they are listed."""

FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
"""Types of weights, as the safetensors library names them: all others are codes or counts."""

COUNTS = frozenset({"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8"})
"""Types that an alpha or a shape may have besides."""

Values = Mapping[str, tuple[float, ...]]
"""Name of a tensor with few numbers (``alpha``, ``reshape_weight``) -> its numbers."""


@dataclass(frozen=True)
class Module:
    """One module that a LoRA changes, and what became of it."""

    name: str
    """As in the file."""
    stage: str
    """One of ``STAGES``; "text" for one of the text encoders."""
    outcome: Outcome
    reason: str = ""
    """Why it is not applied, where the outcome alone does not say it; or why it changes nothing, though it is."""
    target: str = ""
    """ComfyUI's name of the module of the MODEL or CLIP that it changes."""
    names: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Tensor's name in the file -> the name under which ComfyUI reads it: ``target`` and a suffix of ``kinds``."""
    numbers: Mapping[str, float] = field(default_factory=dict, repr=False)
    """Names of alphas -> their values, from the file or from its configuration."""
    factors: Mapping[str, float] = field(default_factory=dict, repr=False)
    """The same for tensors that are to be multiplied, where ComfyUI has no alpha for their kind."""
    shapes: Mapping[str, Shape] = field(default_factory=dict, repr=False)
    """The same for tensors that ComfyUI wants in another shape than the file has."""
    assumed: bool = False
    """Its strength is not said anywhere: alpha is taken to be its rank."""


@dataclass(frozen=True)
class Contents:
    """What one module's tensors are: the judgement that does not depend on the model that it is applied to."""

    tensors: Mapping[str, str]
    """Suffix -> name in the file; ``DORA_SCALE`` also for PEFT's magnitude."""
    made: Made | None = None
    outcome: Outcome | None = None
    """What is wrong with it, None where nothing is."""
    reason: str = ""
    alpha: float | None = None


@dataclass(frozen=True)
class Layer:
    """A layer of the model that a LoRA is applied to: ComfyUI's name, the shape of its weight (None: not at hand), and
    whether it has a bias."""

    name: str
    weight: Shape | None
    has_bias: bool


@dataclass(frozen=True)
class Tables:
    """What is known of a file's tensors before they are read: shapes, types, and the numbers of the smallest."""

    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]
    values: Values


FEW = 16
"""Elements of the largest tensor that ``tables`` reads: a shape, or a number."""


def tables(header: Header, groups: Groups) -> Tables:
    """What is known of a file's tensors: its header, and the numbers of its alphas and shapes; those of many elements
    or of other types are left out. ``groups``: its tensors, by module and suffix."""
    wanted = [
        name
        for suffixes in groups.values()
        for suffix in (ALPHA, RESHAPE)
        for name in suffixes.get(suffix, ())
        if math.prod(header.shapes[name]) <= FEW and header.dtypes[name] in FLOATS | COUNTS
    ]
    values: Values = {}
    if wanted:
        with safe_open(header.path, framework="pt") as file:
            values = {name: tuple(map(float, file.get_tensor(name).flatten().tolist())) for name in wanted}
    return Tables(header.shapes, header.dtypes, values)


def judge(suffixes: Mapping[str, tuple[str, ...]], file: Tables) -> Contents:
    """Whether a module's tensors make a change: complete, of one kind, ranks and dimensions that agree, floating point.

    ``suffixes``: suffix -> the tensors with it, by their names in the file.
    """
    tensors = {suffix: names[0] for suffix, names in suffixes.items()}
    try:
        if twice := next((suffix for suffix, names in suffixes.items() if len(names) > 1), None):
            both = ", ".join(suffixes[twice])
            raise MalformedError(message("two tensors for {name}: {tensors}", name=twice[1:], tensors=both))
        made = read({suffix: file.shapes[name] for suffix, name in tensors.items()})
        for suffix, name in tensors.items():
            if suffix not in (ALPHA, RESHAPE) and file.dtypes[name] not in FLOATS:
                raise MalformedError(
                    message(
                        "{tensor} is {dtype}, not floating point: codes of a quantised weight",
                        tensor=suffix[1:],
                        dtype=file.dtypes[name],
                    )
                )
        return Contents(tensors, made, alpha=_alpha(tensors, file))
    except UnsupportedError as error:
        return Contents(tensors, None, "unsupported", error.reason)
    except IncompleteError as error:
        return Contents(tensors, None, "incomplete", error.reason)
    except MalformedError as error:
        return Contents(tensors, None, "malformed", error.reason)


def _alpha(tensors: Mapping[str, str], file: Tables) -> float | None:
    if ALPHA not in tensors:
        return None
    found = file.values.get(tensors[ALPHA], ())
    if len(found) != 1:
        dtype, shape = file.dtypes[tensors[ALPHA]], list(file.shapes[tensors[ALPHA]])
        raise MalformedError(message("alpha is {dtype} {shape}, not one number", dtype=dtype, shape=shape))
    if not math.isfinite(found[0]):
        raise MalformedError(message("alpha is {value}", value=found[0]))
    return found[0]


def placed(module: str, stage: str, contents: Contents, layer: Layer, file: Tables, config: Config | None) -> Module:
    """A module on the layer that it changes.

    Args:
        module: its name in the file.
        stage: of the layer.
        contents: what its tensors are.
        layer: the layer.
        file: shapes and numbers of the file's tensors.
        config: of the part of the file that it belongs to.

    Raises MalformedError where its tensors cannot be applied to that layer.
    """
    made, tensors, target = contents.made, contents.tensors, layer.name
    assert made is not None
    weight = layer.weight or made.shape or ((made.rows, made.columns) if made.rows and made.columns else None)
    if weight is not None:
        _check(tensors, weight, layer.has_bias, file)
    names = {
        name: target + (BIAS if suffix in (BIAS, UP_BIAS) else suffix)
        for suffix, name in tensors.items()
        if suffix not in (ALPHA, RESHAPE)
    }
    scale, assumed = _scale(contents, made, config, bare(module))
    numbers, factors = {}, {}
    if made.kind.alpha == "limit":  # 0: no limit
        numbers[target + ALPHA] = (contents.alpha or 0.0) * (made.rows or 0)
    elif made.rank is not None:
        numbers[target + ALPHA] = contents.alpha or scale * made.rank
    elif scale != 1:
        factors[target + ".lokr_w1"] = scale
    if UP_BIAS in tensors and scale != 1:
        factors[target + BIAS] = scale
    shapes = {
        target + suffix: shape
        for suffix in (DORA_SCALE, RESCALE)
        if suffix in tensors
        and weight
        and (shape := scale_shape(tensors[suffix], file.shapes[tensors[suffix]], weight))
    }
    return Module(module, stage, "applied", "", target, names, numbers, factors, shapes, assumed)


def _scale(contents: Contents, made: Made, config: Config | None, module: str) -> tuple[float, bool]:
    """Factor of a module's change, and whether it is assumed."""
    if made.kind.alpha != "scale":
        return 1.0, False
    if contents.alpha is not None:
        # kohya's tools and LyCORIS read an alpha of 0 as the rank; LyCORIS gives two whole factors of a LoKr none
        return (contents.alpha / made.rank if made.rank and contents.alpha else 1.0), False
    if config is not None:
        try:
            return config.scale(module, made.rank), False
        except ValueError as error:
            raise MalformedError(*error.args) from None
    return 1.0, made.rank is not None


def _check(tensors: Mapping[str, str], weight: Shape, has_bias: bool, file: Tables) -> None:
    """Raise MalformedError for tensors beside the change itself that do not go with the layer."""
    if bias := next((suffix for suffix in BIASES if suffix in tensors), None):
        found = file.shapes[tensors[bias]]
        if not has_bias:
            raise MalformedError(message("it has {tensor}, and the layer has no bias", tensor=bias[1:]))
        if found != weight[:1]:
            raise MalformedError(
                message("{tensor} is {shape}, not {own}", tensor=bias[1:], shape=list(found), own=list(weight[:1]))
            )
    if RESHAPE in tensors and (wanted := file.values.get(tensors[RESHAPE], ())) != weight:
        said = [int(value) if value.is_integer() else value for value in wanted]
        raise MalformedError(_of_another_layer(RESHAPE, said or message("no shape"), weight))
    for suffix in (DORA_SCALE, RESCALE):
        if suffix in tensors and scale_shape(tensors[suffix], file.shapes[tensors[suffix]], weight) is None:
            found = file.shapes[tensors[suffix]]
            raise MalformedError(_of_another_layer(suffix, list(found), weight))


def _of_another_layer(suffix: str, shape: object, weight: Shape) -> Message:
    return message("{tensor} is {shape}, and the layer is {layer}", tensor=suffix[1:], shape=shape, layer=list(weight))


def scale_shape(name: str, shape: Shape, weight: Shape) -> Shape | None:
    """The shape with which a DoRA's magnitudes, or a rescale, multiply a weight: one for each row, or one for each
    input channel. None where they are made for another weight. PEFT's magnitudes, and a rescale, are for rows."""
    rows = (weight[0], *[1] * (len(weight) - 1))
    if math.prod(shape) == weight[0] and ("magnitude" in name or len(shape) == 1 or shape[0] == weight[0]):
        return rows
    columns = (1, weight[1], *[1] * (len(weight) - 2)) if len(weight) > 1 else None
    fits = columns and shape[:2] == columns[:2] and math.prod(shape) == weight[1] and not name.endswith(RESCALE)
    return columns if fits else None
