"""ComfyUI's Python modules inside this process: for what is tested without a server."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from tools.harness import testhost


def activate() -> None:
    """Make ``comfy``, ``nodes``, ``folder_paths`` and so on importable, on the CPU.

    Call it before anything imports ComfyUI; a second call does nothing.
    """
    if "comfy" in sys.modules:
        return
    # First on the path: the checkout has a folder named nodes, too.
    sys.path.insert(0, str(testhost.test_host().folder))
    from comfy.cli_args import args

    args.cpu = True  # read while comfy.model_management is imported


def as_nodes_run() -> Iterator[None]:
    """A fixture's body: what ComfyUI runs nodes within. With gradients every picture keeps each layer's output."""
    with torch.inference_mode():
        yield
