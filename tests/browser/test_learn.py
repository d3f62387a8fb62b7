"""KOALA LoRA from SDXL, on the server that has a small SDXL."""

from __future__ import annotations

from tests.learn_graph import require_learned
from tools.harness.client import Client


def test_a_lora_is_made_applied_and_saved(client: Client, files: None) -> None:
    require_learned(client)
