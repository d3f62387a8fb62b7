"""Kinds of adapters, as one table: the tensors of each, their shapes, and what can be done with it.

"LoRA" stands for every kind of adapter file. All of them are a module's name and a suffix. Recognising a suffix,
telling what is missing from a module, whether its tensors go together, and which weight they are made for, all follow
from this table; its shapes are those that ComfyUI's weight adapters (``comfy/weight_adapter``) can combine.

The kinds of other methods that no weight adapter of ComfyUI combines are listed by name, to be refused by it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Literal

from ..architecture.keys import Shape
from ..words import message

ALPHA = ".alpha"
DORA_SCALE = ".dora_scale"
RESHAPE = ".reshape_weight"
RESCALE = ".rescale"
BIAS = ".diff_b"
UP_BIAS = ".lora_up.bias"
NORM_BIAS = ".b_norm"
ROTATION, WHOLE = ".oft_blocks", ".set_weight"
UP, DOWN, MID = ".lora_up.weight", ".lora_down.weight", ".lora_mid.weight"

_ADAPTER = r"(?:\.[^.]+)?"  # the name of a PEFT adapter, in files that were not written by PEFT's own save_pretrained

SPELLINGS: tuple[tuple[str, str], ...] = (
    (UP_BIAS, rf"\.lora_B{_ADAPTER}\.bias|[._]lora\.up\.bias|\.lora_linear_layer\.up\.bias"),
    (UP, rf"\.lora_up\.weight|\.lora_B{_ADAPTER}?(?:\.weight)?|[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight"),
    (DOWN, rf"\.lora_down\.weight|\.lora_A{_ADAPTER}?(?:\.weight)?|[._]lora\.down\.weight"
     r"|\.lora_linear_layer\.down\.weight"),
    (MID, r"\.lora_mid\.weight"),
    (DORA_SCALE, rf"\.dora_scale|\.lora_magnitude_vector{_ADAPTER}?(?:\.weight)?"),
    *((suffix, re.escape(suffix)) for suffix in (ALPHA, RESHAPE, RESCALE, BIAS, NORM_BIAS)),
    *((suffix, re.escape(suffix)) for suffix in (".diff", WHOLE, ".w_norm", ROTATION)),
    *((f".{path}.weight", rf"\.{path}\.weight") for path in ("a1", "a2", "b1", "b2")),
    *((f".hada_{part}", rf"\.hada_{part}{_ADAPTER}") for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *((f".lokr_{part}", rf"\.lokr_{part}{_ADAPTER}") for part in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")),
)  # fmt: skip
"""Our suffix of a tensor (kohya's and LyCORIS's, which ComfyUI reads) -> how tools write it, a regular expression."""

_PEFT_METHODS = {
    "ia3": "IA3", "vera": "VeRA", "pvera": "PVeRA", "hra": "HRA", "boft": "PEFT's BOFT", "oft": "PEFT's OFT",
    "bone": "Bone", "miss": "MiSS", "fourierft": "FourierFT", "ln_tuning": "LN Tuning", "randlora": "RandLora",
    "road": "RoAd", "c3a": "C3A", "shira": "SHiRA", "vblora": "VB-LoRA", "xlora": "X-LoRA", "poly": "Poly",
    "delora": "DeLoRA", "waveft": "WaveFT", "gralora": "GraLoRA", "adamss": "AdaMSS", "beft": "BEFT", "deft": "DEFT",
    "frod": "FRoD", "glora": "PEFT's GLoRA", "hira": "HiRA", "lily": "Lily", "osf": "OSF", "peanut": "PEANuT",
    "psoft": "PSOFT", "tinylora": "TinyLoRA", "unilora": "Uni-LoRA", "supertuning": "SuperTuning",
    "shadow": "Shadow", "trainable_tokens": message("trainable tokens"),
}  # fmt: skip
"""What the tensors of PEFT's methods begin with -> the method. Sources: ``prefix`` and ``adapter_layer_names`` in
peft/tuners."""

OTHER_KINDS: tuple[tuple[str, str], ...] = (
    (r"\.(?:lora_E|ranknum)", "AdaLoRA"),
    (r"\.lora_embedding_[AB]", message("a LoRA of an embedding")),
    (r"\.lora_diag", "KaSA"),
    (r"\.lora_monteclora_sampler", "MonteCLoRA"),
    (r"\.base_layer\.(?:weight|bias)", message("a trained weight or bias of the model itself")),
    (r"\.on_input", "LyCORIS's IA3"),
    (r"\.(?:q_layer|p_layer)\.weight|\.lambda_layer", "T-LoRA"),
    (r"\.bm\.weight", message("GLoRA with a Tucker core")),
    (r"\.oft_diag", message("an early OFT")),
    *((rf"\.{prefix}_\w+", name) for prefix, name in _PEFT_METHODS.items()),
)
"""Suffixes of kinds that ComfyUI does not apply, and what such an adapter is called."""

_WHOLE = message("a whole weight or bias, as PEFT's modules_to_save are")

_SUFFIX = re.compile("|".join(f"(?P<s{n}>{spelling})$" for n, (_, spelling) in enumerate(SPELLINGS)))
_OTHER = re.compile(
    "|".join(f"(?P<s{n}>{spelling})(?:\\.[^.]+){{0,2}}$" for n, (spelling, _) in enumerate(OTHER_KINDS))
)


def split(key: str) -> tuple[str, str]:
    """Module and suffix of an adapter's tensor, the suffix as in ``SPELLINGS``, or as it is for one of ``OTHER_KINDS``;
    empty for a tensor of any other kind."""
    if (found := _SUFFIX.search(key)) and found.lastgroup:
        return key[: found.start()], SPELLINGS[int(found.lastgroup[1:])][0]
    if found := _OTHER.search(key):
        return key[: found.start()], key[found.start() :]
    return key, ""


def other_kind(suffix: str) -> str:
    """What an adapter with such a tensor is called, of those in ``OTHER_KINDS``; empty for any other."""
    found = _OTHER.fullmatch(suffix)
    return OTHER_KINDS[int(found.lastgroup[1:])][1] if found and found.lastgroup else ""


@dataclass(frozen=True)
class Form:
    """Tensors that together make a change of a weight.

    ``tensors``: suffix -> its dimensions, a letter each; the same letter is the same number in all of them, and a dot
    behind the last letter says that it stands for all further dimensions, flattened. ``rows`` and ``columns`` of the
    weight, seen as a matrix, are products of those letters; no columns: any number. ``exact``: the tensors have the
    weight's own shape, which is then not flattened.
    """

    tensors: Mapping[str, str]
    rows: str = "o"
    columns: str = "i"
    exact: bool = False


@dataclass(frozen=True)
class Kind:
    """A kind of adapter: the forms that its tensors may have, what may stand beside them, and how it acts.

    ``is_sum``: its change is added to the weight, so that one made for another layer can be added, too. ``rank``: the
    letter of its rank, by which an alpha is divided; empty for kinds without. ``alpha``: what its alpha means, the
    strength of the change ("scale") or the largest rotation, as a share of the rows ("limit"); empty for kinds without.
    """

    name: str
    forms: tuple[Form, ...]
    beside: frozenset[str] = frozenset()
    is_sum: bool = True
    rank: str = ""
    alpha: Literal["scale", "limit", ""] = ""


_LOKR_FIRST = ({".lokr_w1": "ab"}, {".lokr_w1_a": "ar", ".lokr_w1_b": "rb"})
_LOKR_SECOND = (
    ({".lokr_w2": "pq"}, "bq"),
    ({".lokr_w2": "pqkl"}, "bqkl"),
    ({".lokr_w2_a": "pr", ".lokr_w2_b": "rq"}, "bq"),
    ({".lokr_t2": "rrkl", ".lokr_w2_a": "rp", ".lokr_w2_b": "rq"}, "bqkl"),
)

KINDS: tuple[Kind, ...] = (
    Kind(
        "LoRA",
        (Form({UP: "or.", DOWN: "ri."}), Form({UP: "or.", MID: "rrkl", DOWN: "rc."}, columns="ckl")),
        frozenset({ALPHA, DORA_SCALE, RESHAPE, UP_BIAS}),
        rank="r",
        alpha="scale",
    ),
    Kind(
        "LoHa",
        (
            Form({".hada_w1_a": "or", ".hada_w1_b": "ri", ".hada_w2_a": "or", ".hada_w2_b": "ri"}),
            Form(
                {".hada_t1": "rrkl", ".hada_w1_a": "ro", ".hada_w1_b": "rc"}
                | {".hada_t2": "rrkl", ".hada_w2_a": "ro", ".hada_w2_b": "rc"},
                columns="ckl",
            ),
        ),
        frozenset({ALPHA, DORA_SCALE}),
        rank="r",
        alpha="scale",
    ),
    Kind(
        "LoKr",
        tuple(Form(first | second, "ap", columns) for first, (second, columns) in product(_LOKR_FIRST, _LOKR_SECOND)),
        frozenset({ALPHA, DORA_SCALE}),
        rank="r",
        alpha="scale",
    ),
    Kind(
        "GLoRA",
        (Form({".a1.weight": "cr.", ".a2.weight": "rc.", ".b1.weight": "or.", ".b2.weight": "ri."}),),
        frozenset({ALPHA}),
        is_sum=False,
        rank="r",
        alpha="scale",
    ),
    Kind("OFT", (Form({ROTATION: "nss"}, "ns", ""),), frozenset({ALPHA, RESCALE}), is_sum=False, alpha="limit"),
    Kind("BOFT", (Form({ROTATION: "mnbb"}, "nb", ""),), frozenset({ALPHA, RESCALE}), is_sum=False, alpha="limit"),
    Kind(message("weight difference"), (Form({".diff": "oi."}, exact=True),)),
    Kind(message("norm difference"), (Form({".w_norm": "o"}, columns="", exact=True),), frozenset({NORM_BIAS})),
    Kind(message("whole weight"), (Form({WHOLE: "oi."}, exact=True),), is_sum=False),
    Kind(message("bias difference"), (Form({}, "", ""),)),
)
BIASES = (BIAS, UP_BIAS, NORM_BIAS)
"""Differences of a bias: they may stand beside any kind, or alone."""
_KNOWN = {suffix for suffix, _ in SPELLINGS}
_TENSORS = {suffix for kind in KINDS for form in kind.forms for suffix in form.tensors}
FACTORS = frozenset(suffix for kind in KINDS if kind.is_sum for form in kind.forms for suffix in form.tensors)
"""Tensors of changes that are products, or one tensor alone: where one of them is zero, so is the change."""


@dataclass(frozen=True)
class Made:
    """What a module's tensors make: their kind, the rows and columns of the weight that they are made for (None: they
    do not show it), its exact shape where they have it, and their rank."""

    kind: Kind
    rows: int | None
    columns: int | None
    shape: Shape | None
    rank: int | None

    def fits(self, weight: Shape) -> bool:
        """Whether they are made for a weight of this shape."""
        if self.shape is not None:
            return self.shape == weight
        return self.rows in (None, weight[0]) and self.columns in (None, prod(weight[1:]))


class ModuleError(ValueError):
    """A module's tensors make no change that can be computed."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class IncompleteError(ModuleError):
    """A module lacks tensors; the message says which."""


class MalformedError(ModuleError):
    """A module's tensors do not go together; the message says which."""


class UnsupportedError(ModuleError):
    """A module's tensors are of a kind that ComfyUI does not apply; the message names it."""


def read(module: Mapping[str, Shape]) -> Made:
    """What a module's tensors make. ``module``: suffix -> shape.

    Raises UnsupportedError, IncompleteError or MalformedError.
    """
    if strange := sorted(suffix for suffix in module if suffix not in _KNOWN):
        known = other_kind(strange[0]) or {".weight": _WHOLE, ".bias": _WHOLE}.get(strange[0], "")
        tensor = strange[0][1:]
        raise UnsupportedError(
            message("{kind} ({tensor})", kind=known, tensor=tensor)
            if known
            else message("unknown tensor {tensor}", tensor=tensor)
        )
    main = frozenset(module) & _TENSORS
    kind = _kind(main, alone=BIAS in module)
    if kind is None:
        if main:
            raise MalformedError(message("tensors of several kinds ({tensors})", tensors=_names(main)))
        raise IncompleteError(message("it has {tensors} only", tensors=_names(set(module))))
    form = min((form for form in kind.forms if main <= form.tensors.keys()), key=lambda form: len(form.tensors))
    if missing := form.tensors.keys() - main:
        raise IncompleteError(message("it lacks {tensors}", tensors=_names(missing)))
    if beside := module.keys() - form.tensors.keys() - kind.beside - {BIAS}:
        raise MalformedError(message("{tensors} beside a {kind}", tensors=_names(beside), kind=kind.name))
    if sum(bias in module for bias in BIASES) > 1:
        raise MalformedError(message("two differences of the bias"))
    if empty := next((suffix for suffix, shape in module.items() if 0 in shape), None):
        raise MalformedError(message("{tensor} is empty: {shape}", tensor=empty[1:], shape=list(module[empty])))
    return _bound(module, main)


def _kind(main: frozenset[str], alone: bool) -> Kind | None:
    """The first kind that has all these tensors. Where there are none, ``alone`` says that a bias is changed alone."""
    if not main:
        return KINDS[-1] if alone else None
    return next((kind for kind in KINDS if any(main <= form.tensors.keys() for form in kind.forms)), None)


def _bound(module: Mapping[str, Shape], main: frozenset[str]) -> Made:
    """The first kind and form with these tensors whose dimensions agree. Raises MalformedError where there is none."""
    for kind in KINDS:
        for form in kind.forms:
            if form.tensors.keys() == main and (sizes := _sizes(form, module)) is not None:
                if kind.name == "BOFT" and (sizes["b"] % 2 or sizes["n"] % 2 ** (sizes["m"] - 1)):
                    continue  # its factors swap halves of blocks, twice as far apart each time
                rows = prod(sizes[letter] for letter in form.rows) if form.rows else None
                columns = prod(sizes[letter] for letter in form.columns) if form.columns else None
                shape = module[next(iter(form.tensors))] if form.exact else None
                return Made(kind, rows, columns, shape, sizes.get(kind.rank))
    shapes = ", ".join(f"{suffix[1:]} {list(module[suffix])}" for suffix in sorted(main))
    raise MalformedError(message("its tensors do not go together: {shapes}", shapes=shapes))


def _sizes(form: Form, module: Mapping[str, Shape]) -> dict[str, int] | None:
    """The number behind each letter of a form; None where the shapes do not agree."""
    sizes: dict[str, int] = {}
    for suffix, letters in form.tensors.items():
        shape = module[suffix]
        if letters.endswith("."):
            letters = letters[:-1]
            if form.exact and len(shape) == 1:
                letters = letters[:1]  # a norm's weight is a vector
            if len(shape) < len(letters):
                return None
            shape = (*shape[: len(letters) - 1], prod(shape[len(letters) - 1 :]))
        if len(shape) != len(letters):
            return None
        if any(sizes.setdefault(letter, size) != size for letter, size in zip(letters, shape, strict=True)):
            return None
    if form.exact:
        sizes.setdefault("i", 1)
    return sizes


def _names(suffixes: Iterable[str]) -> str:
    return ", ".join(suffix[1:] for suffix in sorted(suffixes))
