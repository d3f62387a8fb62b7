"""What a job is: the table's rows with their ids, in the order in which they are drawn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from batch import columns
from batch.columns import Place
from batch.comfy import candidates
from batch.table import Table, Value
from batch.workflow import Graph, Workflow
from tools.harness.errors import UserError
from tools.harness.workflow import ObjectInfo, to_prompt, with_values

ID_LENGTH = 24  # hexadecimal digits: two of 10**9 rows are the same by chance once in 10**11 jobs
MOST_FAULTS = 10  # that are shown
OWN_NODES = "Koala"
"""How the names of the pack's nodes begin: its version counts for graphs that have one."""


@dataclass(frozen=True)
class Row:
    """One row of the table. Its id is a hash of all that decides the picture, so it is the same in the next run."""

    number: int  # in the table, from 1
    id: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Recipe:
    """What turns a row into a graph: all that a worker needs to know of a job."""

    workflow: Workflow
    columns: tuple[str, ...]
    places: Mapping[str, tuple[Place, ...]]
    source: str
    object_info: ObjectInfo
    """Of the graph's nodes."""
    files: Mapping[str, str]
    """SHA-256 by name of the models and input pictures that the rows use."""

    def inputs(self, values: tuple[Value, ...]) -> str:
        """A row as the manifest tells it: JSON, value by column."""
        told = json.dumps(dict(zip(self.columns, values, strict=True)), ensure_ascii=False)
        return told.encode("utf-8", "replace").decode()  # half an emoji is no text that Parquet takes

    def graph(self, number: int, values: tuple[Value, ...]) -> Graph:
        """A row's graph. Raises UserError for a value that does not fit."""
        where = f"{self.source}, row {number}"
        return columns.apply(self.workflow.graph, self.places, self.columns, values, where)

    def canvas(self, graph: Graph) -> dict[str, Any] | None:
        """A row's graph as the canvas shows it, for its PNG; None where that form of it is not known.

        ComfyUI then lays out the graph itself.
        """
        if self.workflow.canvas is None:
            return None
        targets = [place for found in self.places.values() for place in found]
        values = {place: graph[place.node]["inputs"][place.input] for place in targets}
        changes = [(int(at.node) if at.node.isdigit() else at.node, at.input, value) for at, value in values.items()]
        try:
            canvas = with_values(self.workflow.canvas, self.object_info, changes)
            shown = to_prompt(canvas, self.object_info)
        except UserError:
            return None
        same = all(shown[at.node]["inputs"].get(at.input) == value for at, value in values.items() if at.node in shown)
        return canvas if same else None


@dataclass(frozen=True)
class Plan:
    """A recipe and its rows; those that would give the same picture are one row."""

    recipe: Recipe
    rows: tuple[Row, ...]
    repeated: int
    """How many rows of the table repeat another."""


def make(
    workflow: Workflow,
    table: Table,
    object_info: ObjectInfo,
    hashes: Callable[[Iterable[str]], dict[str, str]],
    pack_version: str,
) -> Plan:
    """Find the columns' places, check every value, name every row. Raises UserError with all that is wrong.

    ``hashes`` gives the SHA-256 of those of some names that are names of models or input pictures.
    """
    places = columns.places(workflow.graph, table.columns, table.source)
    classes = {node["class_type"] for node in workflow.graph.values()}
    unknown = sorted(classes - object_info.keys())
    if unknown:
        raise UserError(
            f"{workflow.source}: this ComfyUI has no node of class {', '.join(unknown)}. Install the pack that brings "
            "it, or give the ComfyUI that has it with --comfyui."
        )
    files = hashes(candidates(_literals(workflow.graph)) | candidates(value for row in table.rows for value in row))
    own = {name: object_info[name] for name in classes}
    recipe = Recipe(workflow, table.columns, places, table.source, own, files)
    own_pack = pack_version if any(name.startswith(OWN_NODES) for name in classes) else ""
    faults: list[str] = []
    all_used: dict[str, str] = {}
    rows: dict[str, tuple[tuple[Any, ...], Row]] = {}
    for number, values in enumerate(table.rows, 1):
        try:
            graph = recipe.graph(number, values)
            _check(graph, places, object_info, f"{table.source}, row {number}")
        except UserError as error:
            faults.append(str(error))
            continue
        used = {name: files[name] for name in candidates(_literals(graph)) & files.keys()}
        all_used |= used
        row = Row(number, _identity(graph, used, own_pack), values)
        rows.setdefault(row.id, ((sorted(used), _pixels(graph), number), row))
    if faults:
        more = [f"... and {len(faults) - MOST_FAULTS} more"] if len(faults) > MOST_FAULTS else []
        raise UserError("\n".join([*faults[:MOST_FAULTS], *more]))
    ordered = tuple(row for _, row in sorted(rows.values(), key=lambda entry: entry[0]))
    return Plan(replace(recipe, files=dict(sorted(all_used.items()))), ordered, len(table.rows) - len(ordered))


def _literals(graph: Graph) -> Iterator[Any]:
    return (value for node in graph.values() for value in node["inputs"].values() if not isinstance(value, list))


def _identity(graph: Graph, files: Mapping[str, str], pack_version: str) -> str:
    """A hash of all that decides the picture; titles do not, and 7.0 is 7."""
    bare = {
        name: [node["class_type"], {key: _plain(value) for key, value in node["inputs"].items()}]
        for name, node in graph.items()
    }
    told = json.dumps([bare, files, pack_version], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()[:ID_LENGTH]


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _pixels(graph: Graph) -> int:
    """Of the largest picture that a node is asked for."""
    sizes = [(node["inputs"].get("width"), node["inputs"].get("height")) for node in graph.values()]
    return max((w * h for w, h in sizes if isinstance(w, int) and isinstance(h, int)), default=0)


def _check(graph: Graph, places: Mapping[str, tuple[Place, ...]], object_info: ObjectInfo, where: str) -> None:
    """Raise UserError for a number that the host would round, or refuse."""
    for column, targets in places.items():
        for place in targets:
            node = graph[place.node]
            value = node["inputs"][place.input]
            inputs = object_info[node["class_type"]]["input"]
            kind, *more = {**inputs.get("optional", {}), **inputs.get("required", {})}.get(place.input) or ("",)
            if kind not in ("INT", "FLOAT") or isinstance(value, (str, bool)):
                continue
            limits = more[0] if more else {}
            least, most = limits.get("min"), limits.get("max")
            if kind == "INT" and value != int(value):
                raise UserError(f"{where}: column {column} is {value}, expected a whole number.")
            if (least is not None and value < least) or (most is not None and value > most):
                raise UserError(f"{where}: column {column} is {value}, expected a number from {least} to {most}.")
