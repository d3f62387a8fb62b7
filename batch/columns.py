"""Where the columns of a table go in a graph, and a row put there.

A column is, in this order: ``id.input`` or ``Title.input``; ``prompt`` or ``negative``, the text that reaches the
samplers' conditioning; the name of an input that only one node has.
"""

from __future__ import annotations

import copy
import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from batch.table import Value
from batch.workflow import Graph, is_link, title
from tools.harness.errors import UserError

Item = TypeVar("Item")
Role = Literal["positive", "negative"]

ROLES: dict[str, Role] = {
    "prompt": "positive",
    "positive": "positive",
    "positive_prompt": "positive",
    "negative": "negative",
    "negative_prompt": "negative",
}
"""Columns, and inputs of nodes that have both, that mean a text by what it does."""
NEGATIVE = {name for name, role in ROLES.items() if role == "negative"}
ALIASES = {"seed": ("seed", "noise_seed")}
SIZES = ("width", "height", "batch_size")
"""Inputs that several nodes may have: those of the latent that is sampled are meant."""
TEXTS = (
    *("text", "prompt", "user_prompt", "string", "value"),
    *("text_g", "text_l", "clip_g", "clip_l", "t5xxl", "bert", "mt5xl", "llama", "qwen25_7b"),
)
"""Inputs with the prompt, of core's text encoders and of its nodes for text. A node with several has it once for each
encoder."""
PIECES = ("string_a", "string_b")
"""Inputs with a piece of the prompt."""
GUIDED = ("conditioning", "cond1", "cond2")
"""Further inputs of guiders that are positive."""
OTHERWISE = re.compile("(model|clip|vae|image|latent|samples|pixels|mask|control_net|style_model|hooks|audio|video)")
"""Beginnings of inputs that bring no text: past an image, for one, lies another sampler."""
EMPTYING = ("ConditioningZeroOut",)
"""Nodes behind which it does not matter what the text was."""
SIMILAR = 0.7
"""How alike two names are that one is taken for a slip of the other."""
MOST = 12
"""Names in an error."""
EXACT = 2**53
"""Beyond it a float is not every whole number."""


@dataclass(frozen=True, order=True)
class Place:
    """A value in a graph: an input of a node, not linked."""

    node: str
    input: str


def places(graph: Graph, columns: Sequence[str], source: str) -> dict[str, tuple[Place, ...]]:
    """Where each column goes: one place, or several that hold the same prompt.

    Raises UserError for columns that fit nothing, or more than one place, or the same one: a line for each, all that
    there are, each complete in itself. ``source`` is how they name the table.
    """
    found: dict[str, tuple[Place, ...]] = {}
    faults = []
    for column in columns:
        try:
            found[column] = _find(graph, column)
        except UserError as error:
            faults.append(f"{source}: {error}")
    users: dict[Place, list[str]] = {}
    for column, targets in found.items():
        for target in targets:
            users.setdefault(target, []).append(column)
    for columns_there, target in {tuple(names): target for target, names in users.items() if len(names) > 1}.items():
        both = " and ".join(map(repr, columns_there))
        faults.append(f"{source}: columns {both} both set {_words(graph, target)}; leave out one of them")
    if faults:
        raise UserError("\n".join(faults))
    return found


def apply(
    graph: Graph, places: Mapping[str, Sequence[Place]], columns: Sequence[str], row: Sequence[Value], where: str
) -> Graph:
    """The graph with a row's values, of the kind that the workflow has at each place. The given graph stays as it is.

    None keeps the workflow's own value, and so does an empty cell for a number or true/false. ``where`` names the row
    in errors. Raises UserError, a line for each value that cannot be what its place needs.
    """
    changed = copy.deepcopy(graph)
    faults = []
    for column, value in zip(columns, row, strict=True):
        if value is None:
            continue
        for place in places[column]:
            inputs = changed[place.node]["inputs"]
            try:
                inputs[place.input] = _converted(value, inputs[place.input])
            except ValueError as error:
                needs = f"expected {error} for {_words(graph, place)}"
                faults.append(f"{where}: column {column} is {value!r}, {needs}; mend the cell, or leave it empty")
    if faults:
        raise UserError("\n".join(faults))
    return changed


def describe(graph: Graph, places: Mapping[str, Sequence[Place]]) -> list[tuple[str, str]]:
    """Each column with its places in words, and why this one where others have an input of the name."""
    return [
        (column, ", ".join(_words(graph, target) for target in targets) + _reason(graph, column, targets))
        for column, targets in places.items()
    ]


def _find(graph: Graph, column: str) -> tuple[Place, ...]:
    """The place of one column. Raises UserError without the table's name."""
    spelled = _spelled(graph, column)
    if len(spelled) == 1:
        return spelled
    if spelled:
        raise UserError(f"column {column!r} fits more than one node: take {_choices(graph, spelled)}")
    role = ROLES.get(column.lower())
    if role and (texts := _prompt(graph, column, role)):
        return texts
    named = _sampled(graph, column, _named(graph, column))
    if not named or (role and _has_samplers(graph)):  # an input of the name may be one that no sampler sees
        raise UserError(_nowhere(graph, column, role))
    if len(named) > 1:
        raise UserError(f"column {column!r} fits more than one place: take {_choices(graph, named)}")
    return named


# --- by name ---------------------------------------------------------------------------------------------------------


def _settable(graph: Graph) -> dict[Place, Place]:
    """Each input that a column can name -> where its value is: there, or in the primitive node that it is linked to.

    Text, numbers and true/false can be set.
    """
    found = {}
    for node, key, value in _inputs(graph):
        place = Place(node, key)
        if is_link(value) and graph[value[0]]["class_type"].startswith("Primitive"):
            place, value = Place(value[0], "value"), graph[value[0]]["inputs"].get("value")
        if isinstance(value, str | int | float):  # True and False are ints
            found[Place(node, key)] = place
    return found


def _inputs(graph: Graph) -> Iterator[tuple[str, str, Any]]:
    return ((name, key, value) for name, node in graph.items() for key, value in node["inputs"].items())


def _spelled(graph: Graph, column: str) -> tuple[Place, ...]:
    """Places that a column names with their node: exactly, else but for upper and lower case; by id, else by title."""
    ids, titles = {node: node for node in graph}, {node: title(graph[node]) for node in graph}
    for key in (_whole, _last):
        for normal in (str, str.casefold):
            for names in (ids, titles):
                wanted = normal(column)
                found = [place for place in _settable(graph) if normal(f"{names[place.node]}.{key(place)}") == wanted]
                if found:
                    return _targets(graph, found)
    return ()


def _named(graph: Graph, column: str) -> tuple[Place, ...]:
    """Places whose input has a column's name, whatever their node."""
    names = {name.casefold() for name in ALIASES.get(column.lower(), (column,))}
    found = [place for place in _settable(graph) if {_whole(place).casefold(), _last(place).casefold()} & names]
    return _targets(graph, found)


def _targets(graph: Graph, found: Iterable[Place]) -> tuple[Place, ...]:
    settable = _settable(graph)
    return tuple(dict.fromkeys(settable[place] for place in found))


def _whole(place: Place) -> str:
    return place.input


def _last(place: Place) -> str:
    """An input's name without the dynamic combo that brings it."""
    return place.input.rpartition(".")[2]


def _sampled(graph: Graph, column: str, found: tuple[Place, ...]) -> tuple[Place, ...]:
    """Of several places for a size the one of the latent that samplers start from, if there is just one."""
    if column.lower() not in SIZES:
        return found
    latents = {value[0] for _, key, value in _inputs(graph) if key == "latent_image" and is_link(value)}
    sizes = _targets(graph, (place for place in _settable(graph) if place.node in latents))
    best = tuple(place for place in found if place in sizes)
    return best if len(best) == 1 else found


# --- by what the text does -------------------------------------------------------------------------------------------


def _prompt(graph: Graph, column: str, role: Role) -> tuple[Place, ...]:
    """Places of the text that reaches the samplers as ``role``; none, if no text does.

    Several encoders count as one if they have the same text, as those of a base model and a refiner do. Raises
    UserError if they have different ones, if pieces of text are joined, or if the text has the other role as well.
    """
    groups = _role_texts(graph, role)
    found = _distinct(place for group in groups for place in group)
    texts = {graph[place.node]["inputs"][place.input] for place in found}
    joined = any(place.input in PIECES for place in found)
    if len(groups) > 1 and (len(texts) > 1 or joined):
        raise UserError(f"column {column!r} fits more than one text: take {_choices(graph, found)}")
    if both := set(found) & set(_other_role(graph, role)):
        same = _words(graph, min(both))
        raise UserError(
            f"column {column!r} is not clear: {same} is prompt and negative prompt in one; name the column "
            f"{_choices(graph, found)} to set it"
        )
    return found


def _other_role(graph: Graph, role: Role) -> tuple[Place, ...]:
    other: Role = "negative" if role == "positive" else "positive"
    return _distinct(place for group in _role_texts(graph, other) for place in group)


def _role_texts(graph: Graph, role: Role) -> tuple[tuple[Place, ...], ...]:
    """For each text encoder that a sampler or guider has as ``role``, or each node whose text it takes, its places."""
    seen: set[tuple[str, Role]] = set()
    return _distinct(group for link in _conditioning(graph, role) for group in _upstream(graph, link, role, seen))


def _has_samplers(graph: Graph) -> bool:
    return any(_conditioning(graph, role) for role in ROLES.values())


def _conditioning(graph: Graph, role: Role) -> list[list[Any]]:
    """The links by which samplers and guiders get a role's conditioning; not those of nodes that only pass it on."""
    guiders = {value[0] for _, key, value in _inputs(graph) if key == "guider" and is_link(value)}
    passing = {value[0] for _, key, value in _inputs(graph) if is_link(value) and (key in ROLES or "cond" in key)}
    return [
        value
        for node, key, value in _inputs(graph)
        if is_link(value)
        and node not in passing
        and (key == role or (role == "positive" and node in guiders and key in GUIDED))
    ]


def _upstream(graph: Graph, link: list[Any], role: Role, seen: set[tuple[str, Role]]) -> list[tuple[Place, ...]]:
    """Places of text at the node where a link begins and above it, node by node."""
    node, slot = link
    inputs = graph[node]["inputs"]
    names = list(inputs)
    if not NEGATIVE.isdisjoint(inputs) or "positive" in inputs:  # one output for each role, positive first
        role = "positive" if slot == 0 else role
        names = [name for name in names if ROLES.get(name) == role]
    if (node, role) in seen or graph[node]["class_type"] in EMPTYING:
        return []
    seen.add((node, role))
    written = {name for name in names if isinstance(inputs[name], str)}
    encoder = tuple(Place(node, name) for name in names if name in written and name in (*TEXTS, *ROLES))
    groups: list[tuple[Place, ...]] = [encoder] if encoder else []
    groups += [(Place(node, name),) for name in names if name in written and name in PIECES]
    for name in names:
        if is_link(inputs[name]) and (name in TEXTS or not OTHERWISE.match(name)):
            groups += _upstream(graph, inputs[name], role, seen)
    return groups


# --- in words --------------------------------------------------------------------------------------------------------


def _words(graph: Graph, place: Place) -> str:
    return f"{title(graph[place.node])} · {place.input} (node {place.node})"


def _call(graph: Graph, place: Place) -> str:
    """The column that names a place: by title if only one node has it."""
    titles = Counter(title(node).casefold() for node in graph.values())
    name = title(graph[place.node])
    return f"{name if titles[name.casefold()] == 1 else place.node}.{place.input}"


def _choices(graph: Graph, found: Iterable[Place]) -> str:
    """The columns to choose from."""
    return _listed((repr(_call(graph, place)) for place in found), " or ")


def _listed(names: Iterable[str], separator: str) -> str:
    """Names in a row, as many as a line has room for."""
    every = list(names)
    more = [f"{len(every) - MOST} more"] if len(every) > MOST else []
    return separator.join([*every[:MOST], *more])


def _reason(graph: Graph, column: str, targets: Sequence[Place]) -> str:
    """Why these places and not others, as an addition to their words; "" where there was no choice."""
    if column.lower() not in SIZES:
        return ""
    others = [_words(graph, place) for place in _named(graph, column) if place not in targets]
    return f": the latent that is sampled, not {', '.join(others)}" if others else ""


def _nowhere(graph: Graph, column: str, role: Role | None) -> str:
    """That a column has no place, with what comes close to it."""
    settable = _settable(graph)
    if role:
        others = _other_role(graph, role)
        texts = [place for place, to in settable.items() if place == to and to not in others and _is_text(graph, to)]
        advice = f"name its input: {_choices(graph, texts)}" if texts else "leave it out"
        return f"column {column!r} fits nothing: no text of the workflow reaches a sampler as {role}; {advice}"
    for node, key, value in _inputs(graph):
        spellings = (f"{node}.{key}", f"{title(graph[node])}.{key}", key)
        if is_link(value) and column.casefold() in map(str.casefold, spellings):
            origin = f"{title(graph[value[0]])} (node {value[0]})"
            return f"column {column!r} is a link, not a value: it comes from {origin}; name an input of that node"
    names = sorted({key(place) for place in settable for key in (_whole, _last)})
    known = {name.casefold(): name for name in (*names, *(_call(graph, place) for place in settable))}
    close = [known[name] for name in difflib.get_close_matches(column.casefold(), known, n=3, cutoff=SIMILAR)]
    advice = f"did you mean {_listed(map(repr, close), ' or ')}?" if close else f"there are {_listed(names, ', ')}"
    return f"column {column!r} fits nothing: no node has such an input; {advice}"


def _is_text(graph: Graph, place: Place) -> bool:
    return place.input in (*TEXTS, *PIECES, *ROLES) and isinstance(graph[place.node]["inputs"][place.input], str)


def _distinct(items: Iterable[Item]) -> tuple[Item, ...]:
    return tuple(dict.fromkeys(items))


# --- values ----------------------------------------------------------------------------------------------------------


def _converted(value: str | int | float, present: object) -> str | int | float:
    """A cell as the kind of value that is there now. Raises ValueError with what was expected."""
    empty = isinstance(value, str) and not value.strip()
    if isinstance(present, bool):
        return present if empty else _truth(value)
    if isinstance(present, int | float):
        return present if empty else _number(value, whole=isinstance(present, int))
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _truth(value: str | int | float) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    word = str(value).strip().lower()
    if word not in words:
        raise ValueError("true or false")
    return words[word]


def _number(value: str | int | float, whole: bool) -> int | float:
    """``whole``: the workflow has a whole number here, and 7.0 is written as 7."""
    if isinstance(value, bool):
        raise ValueError("a number")
    if isinstance(value, str):
        if "_" in value:  # Python's own spelling
            raise ValueError("a number")
        parsed: int | float | None = None
        for kind in (int, float):
            try:
                parsed = kind(value)
                break
            except ValueError:
                continue
        if parsed is None:
            raise ValueError("a number")
        value = parsed
    if not math.isfinite(value):
        raise ValueError("a finite number")
    if whole and isinstance(value, float) and value.is_integer():
        if abs(value) > EXACT:
            raise ValueError("a whole number of this size without decimals, to be exact,")
        return int(value)
    return value
