"""The pack's nodes, one file per place in a graph. Nodes are thin: a schema, one call, one return."""

from comfy_api.latest import io

from .load import KoalaCheckpointLoader, KoalaModelInfo
from .prompt import KoalaPrompt
from .sample import KoalaSampler, KoalaScheduler

NODES: list[type[io.ComfyNode]] = [KoalaCheckpointLoader, KoalaModelInfo, KoalaPrompt, KoalaScheduler, KoalaSampler]
