"""Engines that are measured only where they are installed: their names, and what they need."""

from __future__ import annotations

from importlib.util import find_spec

OPENVINO = "OpenVINO"
NEEDED = {OPENVINO: "openvino"}
"""Peers on the CPU, and the package that each needs; tools/requirements-peers.txt has them."""


def why_not(name: str, device: str) -> str:
    """Why a peer is not measured, in words; empty where it can be."""
    if device != "cpu":
        return f"{name}: not measured, as it computes on the CPU"
    if find_spec(NEEDED[name]) is None:
        return f"{name}: not measured, as {NEEDED[name]} is not installed (tools/requirements-peers.txt)"
    return ""
