"""Every shipped workflow of koala-tiny on a GPU, with dynamic VRAM.

Those of full-size models are in tests/host, whose server is on the GPU, too, where there is one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("comfy_cli")  # which makes prompts of workflows

from tests.host.test_example_workflows import TRAINING, WORKFLOWS, named, read, require_run
from tools.harness.client import Client
from tools.harness.server import Server
from tools.harness.testhost import Host


@named(path for path in WORKFLOWS if "tiny" in path.stem and path != TRAINING)
def test_a_shipped_workflow_runs(path: Path, server: Server, client: Client, host: Host) -> None:
    require_run(read(path), server, client, host)
