"""``dev.py soak``: hundreds of prompts, one after the other, through one real server, and how its memory grows."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psutil

from tools import commands
from tools.harness import server, testhost
from tools.harness.assets import SHIPPED
from tools.harness.client import Client, Prompt
from tools.harness.errors import UserError
from tools.measure import reliability

LORA = "koala-tiny-cyan.safetensors"
WARM_UP = 50
"""Prompts after which every kind of graph has run several times."""
EVERY = 10
"""Prompts from one reading of memory to the next."""
FREED = 25
"""Prompts after which the server is told to let go of all models, and loads them again."""
COLOURS, SHAPES = ("red", "green", "blue", "gray"), ("circle", "square", "star", "ring", "koala")
STEPS = 8


def graph(number: int) -> Prompt:
    """A graph that is another than the one before: prompt, seed and size; every third with KOALA Accelerate, every
    fifth with a LoRA."""
    text = f"a {COLOURS[number % len(COLOURS)]} {SHAPES[number % len(SHAPES)]} on a white background, {number}"
    side = (128, 192, 256)[number % 3]
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "1": ("KoalaCheckpointLoader", {"source": "built-in koala-tiny", "weight_dtype": "default"}),
        "2": (
            "KoalaPrompt",
            {"clip": ["1", 1], "positive": text, "negative": "", "style": "no style", "mode": "reference"},
        ),
        "3": ("EmptyLatentImage", {"width": side, "height": side, "batch_size": 1}),
        "5": ("VAEDecode", {"samples": ["4", 0], "vae": ["1", 2]}),
        "6": ("PreviewImage", {"images": ["5", 0]}),
    }
    model = ["1", 0]
    if number % 5 == 0:
        lora = {"model": model, "clip": ["1", 1], "lora_name": LORA, "strength_model": 1.0, "strength_clip": 1.0}
        nodes["7"] = ("KoalaLoraLoader", {**lora, "trained_on": "auto", "fold_removed": 0.0})
        model = ["7", 0]
    if number % 3 == 0:
        nodes["8"] = ("KoalaAccelerate", {"model": model, "preset": "balanced"})
        model = ["8", 0]
    conditioning = {"positive": ["2", 0], "negative": ["2", 1], "latent_image": ["3", 0]}
    preset = {"preset": "custom", "preset.steps": STEPS, "preset.cfg": 5.0, "preset.spacing": "leading"}
    sampler = {"sampler_name": "euler", "denoise": 1.0, "seed": number}
    nodes["4"] = ("KoalaSampler", {"model": model, **conditioning, **preset, **sampler})
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


def memory(process: psutil.Process) -> float:
    """Megabytes that a process and those that it started have in memory."""
    found = 0
    for one in (process, *process.children(recursive=True)):
        try:
            found += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return found / 1e6


def soak(prompts: int) -> Iterator[float]:
    """Run that many prompts; memory in MB after every ``EVERY`` of them."""
    with server.running(testhost.test_host()) as running:
        loras = running.base / "models" / "loras"
        loras.mkdir(exist_ok=True)
        shutil.copy(SHIPPED.with_name(LORA), loras)
        client, process = Client(running.url), psutil.Process(running.process.pid)
        for number in range(prompts):
            client.run(graph(number))
            if number % FREED == FREED - 1:
                client.free()
            if number % EVERY == EVERY - 1:
                yield memory(process)


def figures(readings: Sequence[float]) -> dict[str, float]:
    """Memory in MB after the warm-up, at the end (medians of five readings), at most, and growth for 100 prompts."""
    warm = readings[WARM_UP // EVERY :]
    line = statistics.linear_regression(range(len(warm)), warm)
    return {
        "prompts": len(readings) * EVERY,
        "warm": round(statistics.median(warm[:5]), 1),
        "end": round(statistics.median(warm[-5:]), 1),
        "most": round(max(readings), 1),
        "growth": round(line.slope * 100 / EVERY, 2),
    }


def main(arguments: list[str]) -> int:
    """Run the soak and print its figures; they go to docs/reliability.md where that is asked for."""
    options = commands.parser("soak").parse_args(arguments)
    if options.prompts < WARM_UP + 10 * EVERY:
        raise UserError(f"--prompts {options.prompts}: expected {WARM_UP + 10 * EVERY} or more, {WARM_UP} to warm up")
    start, readings = time.monotonic(), []
    for reading in soak(options.prompts):
        readings.append(reading)
        print(f"{len(readings) * EVERY} prompts: {reading:.0f} MB", flush=True)
    found = figures(readings) | {"seconds": round(time.monotonic() - start)}
    print(found)
    if options.record:
        reliability.record("soak", {**found, "readings": [round(reading, 1) for reading in readings]})
    return 0
