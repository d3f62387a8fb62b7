"""ComfyUI's Python modules and the checkout's pack inside this process: for what is tested without a server."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import torch

from tools import testhost

PACK = "koala_pack"


def activate() -> None:
    """Make ``comfy``, ``nodes``, ``folder_paths`` ... importable, on the CPU, and the checkout as ``koala_pack``.

    ComfyUI imports a pack by its path, so the checkout is no importable package by itself. Here it becomes one, without
    its ``__init__`` being run: ``koala_pack.koala.layout``, ``koala_pack.koala_loader``, ``koala_pack.nodes.load`` and
    so on, relative imports and all. Call it before anything imports ComfyUI; a second call does nothing.
    """
    if PACK in sys.modules:
        return
    # First on the path: the checkout has a folder named nodes, too.
    sys.path.insert(0, str(testhost.test_host().folder))
    from comfy.cli_args import args

    args.cpu = True  # read while comfy.model_management is imported
    pack = types.ModuleType(PACK)
    pack.__path__ = [str(testhost.ROOT)]
    sys.modules[PACK] = pack


def as_nodes_run() -> Iterator[None]:
    """A fixture's body: what ComfyUI runs nodes within. With gradients every picture keeps each layer's output."""
    with torch.inference_mode():
        yield
