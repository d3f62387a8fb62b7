"""Workflows as the canvas saves them: change a widget, and turn them into the graph that the server runs.

Both are comfy-cli's, the same that `comfy run` does. It goes on past a node that it cannot convert, and so would run
another graph than the one on the canvas; here, whatever it complains of is an error.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from typing import Any

from comfy_cli import workflow_ops, workflow_to_api
from comfy_cli.cql.engine import Graph

from tools.harness.client import Prompt
from tools.harness.errors import UserError

Workflow = dict[str, Any]  # UI format, version 0.4
ObjectInfo = dict[str, Any]  # what GET /object_info answers


def to_prompt(workflow: Workflow, object_info: ObjectInfo) -> Prompt:
    """The graph that POST /prompt takes. Raises UserError if a node is unknown to the server or cannot be converted."""
    complaints = _Complaints(level=logging.WARNING)
    workflow_to_api.logger.addHandler(complaints)
    try:
        prompt: Prompt = workflow_to_api.convert_ui_to_api(workflow, object_info)
    except workflow_to_api.WorkflowConversionError as error:
        raise UserError(f"The workflow cannot be converted: {error}") from error
    finally:
        workflow_to_api.logger.removeHandler(complaints)
    unknown = sorted({node["class_type"] for node in prompt.values()} - object_info.keys())
    if unknown:
        raise UserError(f"The server has no node of class {', '.join(unknown)}: is the pack that brings it loaded?")
    if complaints.said:
        raise UserError("The workflow cannot be converted:\n" + "\n".join(complaints.said))
    set_primitives(workflow, prompt)
    return prompt


def set_primitives(workflow: Workflow, prompt: Prompt) -> None:
    """Give each input that a PrimitiveNode is linked to that node's value, as the canvas does when it queues a graph.

    comfy-cli leaves the value that was last saved with the input itself.
    """
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for _, source, _, target, slot, _ in workflow["links"]:
        if nodes[source]["type"] == "PrimitiveNode" and str(target) in prompt:
            prompt[str(target)]["inputs"][nodes[target]["inputs"][slot]["name"]] = nodes[source]["widgets_values"][0]


def with_widget(workflow: Workflow, object_info: ObjectInfo, class_type: str, widget: str, value: Any) -> Workflow:
    """The workflow with a widget changed in every node of a class.

    An input of a dynamic combo goes by ``<combo>.<input>``, and is there once the combo has the option that brings it.
    Raises UserError if there is no such node, no such widget, or it does not take the value.
    """
    nodes = [node["id"] for node in workflow["nodes"] if node["type"] == class_type]
    if not nodes:
        present = ", ".join(sorted({node["type"] for node in workflow["nodes"]}))
        raise UserError(f"The workflow has no {class_type}; it has {present}.")
    return with_values(workflow, object_info, [(node, widget, value) for node in nodes])


def with_values(workflow: Workflow, object_info: ObjectInfo, values: Iterable[tuple[int | str, str, Any]]) -> Workflow:
    """The workflow with some nodes' widgets changed: (id, widget, value). Raises UserError if one cannot be."""
    graph = Graph.from_object_info(object_info)
    workflow = copy.deepcopy(workflow)  # comfy-cli writes into what it is given, and stamps it against later changes
    for node, widget, value in values:
        try:
            workflow, _ = workflow_ops.set_widget(workflow, graph, node, widget, value)
        except ValueError as error:
            raise UserError(f"Node {node}, {widget} = {value!r}: {error}") from error
    return {key: part for key, part in workflow.items() if not key.startswith("_")}  # without comfy-cli's journal


class _Complaints(logging.Handler):
    """Keeps what the converter logs.

    Left out: values on a node without widgets. A node's preview text is saved so; unknown nodes are reported apart.
    """

    def __init__(self, level: int):
        super().__init__(level)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("Could not map widget_values for unknown node type"):
            return
        self.said.append(self.format(record))
