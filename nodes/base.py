"""What all nodes share: their place in the menu, and a short text shown on a node after it ran."""

from __future__ import annotations

from comfy_api.latest import io, ui
from server import PromptServer

CATEGORY = "KOALA"


def noted(node: type[io.ComfyNode], text: str, *outputs: object) -> io.NodeOutput:
    """The node's outputs together with ``text``, which the run's history keeps, too.

    The node must declare ``io.Hidden.unique_id``.
    """
    server = getattr(PromptServer, "instance", None)
    if server is not None and node.hidden and node.hidden.unique_id:
        server.send_progress_text(text, node.hidden.unique_id)
    return io.NodeOutput(*outputs, ui=ui.PreviewText(text))
