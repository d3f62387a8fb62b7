"""Prompts to the real server, as people run it: with dynamic VRAM where the host has it."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tools.harness import server, testhost
from tools.harness.client import Client, GraphError
from tools.harness.testhost import ROOT, Host
from tools.measure.bench import graphs, nvml
from tools.measure.bench.graphs import Image
from tools.measure.bench.process import ends_with_the_others
from tools.synthetic import random_weights

PACK_FOLDER = "koala-sdxl"
OUT_OF_MEMORY = ("out of memory", "OutOfMemory", "allocation on device")
MOST = 600.0
"""Seconds that a prompt may take without a word from the server."""
NOTED = ("DynamicVRAM", "Total VRAM", "Set vram state")
"""Lines of the server's log that say how it treats memory."""


class Served:
    """A running server, and the prompts that it is sent. ``left``: tells how many seconds are left to them."""

    def __init__(self, running: server.Server, left: Callable[[], float] = lambda: math.inf) -> None:
        self.running, self._left = running, left
        self._client = Client(running.url)
        self.pid = _child(running.process.pid)
        self._seeds = itertools.count(1)
        ends_with_the_others(self)

    @property
    def client(self) -> Client:
        """The connection, which waits no longer than time is left."""
        self._client.timeout = min(MOST, max(1.0, self._left()))
        return self._client

    def kill(self) -> None:
        """End the server, whatever it is at: whoever waits for it is told that it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def draw(self, way: str, image: Image) -> dict[str, Any]:
        """Seconds of a prompt, from its start to its end as the server notes them, and the most memory that the server
        held on the GPU; or ``error``: the server's own words. ``fits`` is False where memory ran out."""
        with nvml.Watch(self.pid) as watch:
            try:
                result = self.client.run(graphs.graph(way, image, next(self._seeds)))
            except GraphError as error:
                words = f"{error}: {error.errors}"
                return {"error": words[:1000], "fits": not any(part in words for part in OUT_OF_MEMORY)}
        messages = self.client.history(result.prompt_id)["status"]["messages"]
        at = {kind: content["timestamp"] for kind, content in messages if "timestamp" in content}
        return {"seconds": (at["execution_success"] - at["execution_start"]) / 1000, "nvml": watch.peak, "fits": True}

    def forget(self) -> None:
        """Have the server let go of all models."""
        self.client.free()
        self.client.run(graphs.idle())  # which waits until it has

    @property
    def notes(self) -> list[str]:
        """What its log says of how it treats memory."""
        return [line for line in self.running.last_lines(10**6).splitlines() if any(word in line for word in NOTED)]


@contextlib.contextmanager
def serving(models: tuple[str, ...], left: Callable[[], float] = lambda: math.inf) -> Iterator[Served]:
    """A server with this checkout as its only custom node, and models of random weights (``BUILT_IN`` needs none).
    ``left``: as of ``Served``."""
    with TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        for kind in ("diffusion_models", "text_encoders", "vae"):
            (folder / kind).mkdir()
        for model in models:
            if model != graphs.BUILT_IN:
                _link(random_weights.folder(model), model, folder)
        places = {kind: [folder / kind] for kind in ("diffusion_models", "text_encoders", "vae")}
        with with_checkout(testhost.test_host(), places) as running:
            yield Served(running, left)


@contextlib.contextmanager
def with_checkout(host: Host, model_folders: Mapping[str, Sequence[Path]] | None = None) -> Iterator[server.Server]:
    """A server with this checkout as its only custom node, and without the canvas: what it takes to pack the one and to
    show the other, a machine for measuring need not have. ``model_folders``: as of ``server.running``."""
    with TemporaryDirectory(prefix="page-") as page:
        (Path(page) / "index.html").write_text("No canvas here.", "utf-8")
        arguments = ("--front-end-root", page)
        with server.running(host, model_folders=model_folders, arguments=arguments, install=_link_pack) as running:
            yield running


def _link(made: Path, model: str, folder: Path) -> None:
    files = {
        f"diffusion_models/{graphs.FILES['unet_name'].format(model)}": "unet/diffusion_pytorch_model.fp16.safetensors",
        f"text_encoders/{graphs.FILES['clip_name1']}": "text_encoder/model.fp16.safetensors",
        f"text_encoders/{graphs.FILES['clip_name2']}": "text_encoder_2/model.fp16.safetensors",
        f"vae/{graphs.VAE_FILE}": "vae/diffusion_pytorch_model.safetensors",
    }
    for name, file in files.items():
        if not (folder / name).exists():
            (folder / name).symlink_to((made / file).resolve())


def _link_pack(custom_nodes: Path) -> None:
    """This checkout itself."""
    (custom_nodes / PACK_FOLDER).symlink_to(ROOT, target_is_directory=True)


def _child(keeper: int) -> int:
    """The server's own process, which its keeper has started."""
    return int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()[0])
