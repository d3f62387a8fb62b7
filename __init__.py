"""KOALA for ComfyUI: compact SDXL models, with the settings and the parity that stock nodes lack."""

from .host.requirements import require_host

require_host()  # first: what follows imports what an older ComfyUI lacks

from comfy_api.latest import ComfyExtension, io  # noqa: E402

from .nodes import NODES  # noqa: E402

WEB_DIRECTORY = "./web"


class KoalaExtension(ComfyExtension):
    """What ComfyUI asks the pack for."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> KoalaExtension:
    return KoalaExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
