"""The pack's nodes, one file per place in a graph. Nodes are thin: a schema, one call, one return."""

from comfy_api.latest import io

from .adapt import KoalaAttentionPatches, KoalaControlNet, KoalaControlNetLoader
from .learn import KoalaLoraFromSdxl
from .load import KoalaCheckpointLoader, KoalaModelInfo
from .lora import KoalaHookLora, KoalaLoraLoader
from .prompt import KoalaPrompt
from .sample import KoalaSampler, KoalaScheduler
from .save import KoalaCheckpointSave
from .speed import KoalaAccelerate
from .swap import KoalaUNetSwap

NODES: list[type[io.ComfyNode]] = [
    KoalaCheckpointLoader,
    KoalaModelInfo,
    KoalaPrompt,
    KoalaScheduler,
    KoalaSampler,
    KoalaAccelerate,
    KoalaUNetSwap,
    KoalaLoraLoader,
    KoalaHookLora,
    KoalaLoraFromSdxl,
    KoalaControlNet,
    KoalaControlNetLoader,
    KoalaAttentionPatches,
    KoalaCheckpointSave,
]
