"""`dev.py demo` and `dev.py serve`: the packed pack at work in a real ComfyUI server."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from koala_sdxl.koala.files.header import CheckpointError
from koala_sdxl.koala.files.inspect import inspect_checkpoint, inspect_folder
from koala_sdxl.koala.model_info import ModelFacts
from tools import commands
from tools.generate.captions import PROMPTS as SHEET_PROMPTS
from tools.harness import server, testhost
from tools.harness.assets import SHIPPED
from tools.harness.client import Client, GraphError
from tools.harness.contact_sheet import contact_sheet
from tools.harness.errors import UserError
from tools.harness.testhost import ROOT, Host, say
from tools.harness.workflow import ObjectInfo, Workflow, to_prompt, with_widget

WORKFLOW = ROOT / "example_workflows" / "01 KOALA-tiny text to image.json"
DEFAULT_FOLDER = Path("koala-demo")


@dataclass(frozen=True)
class Request:
    """What to draw; ``None`` leaves it to the model or to the demo."""

    prompt: str | None = None
    negative: str = ""
    seed: int = 0
    steps: int | None = None
    model: Path | None = None
    out: Path | None = None


@dataclass(frozen=True)
class Weights:
    """The model of a run: its facts, where in ComfyUI's models folder it is put, and how the loader is set."""

    facts: ModelFacts
    path: Path | None = None
    folder: str = ""
    widgets: tuple[tuple[str, str], ...] = ()


def main(arguments: list[str]) -> int:
    """``dev.py demo``; returns the exit status. Raises UserError."""
    options = commands.parser("demo").parse_args(arguments)
    request = Request(options.prompt, options.negative, options.seed, options.steps, options.model, options.out)
    return run(chosen_host(options.comfyui), request, options.port)


def serve_main(arguments: list[str]) -> int:
    """``dev.py serve``; returns the exit status. Raises UserError."""
    options = commands.parser("serve").parse_args(arguments)
    return serve(chosen_host(options.comfyui), options.port)


def chosen_host(folder: Path | None) -> Host:
    """The user's own ComfyUI, or the tested one. Raises UserError."""
    return testhost.own_host(folder, os.environ.get("COMFYUI_PYTHON")) if folder else testhost.test_host()


def run(host: Host, request: Request, port: int | None = None) -> int:
    """Draw what is asked for, save it and print the path last; returns the exit status. Raises UserError."""
    weights = find_weights(request.model)
    prompts = wanted_prompts(request)
    target = target_for(request.out, sheet=len(prompts) > 1)
    say(f"Starting ComfyUI with {weights.facts.source} ...")
    with server.running(host, port=port) as running:
        if weights.path:
            place(weights.path, running.base / "models" / weights.folder)
        client = Client(running.url)
        info = client.object_info()
        workflow = configured(json.loads(WORKFLOW.read_text("utf-8")), info, weights, request)
        try:
            pictures = list(draw(client, workflow, info, prompts))
        except GraphError as error:
            raise UserError(str(error)) from error
    save(pictures, prompts, target)
    return 0


def serve(host: Host, port: int | None = None) -> int:
    """Leave the server up until Ctrl+C; returns the exit status. Raises UserError."""
    try:
        DEFAULT_FOLDER.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{DEFAULT_FOLDER.absolute()} cannot be made ({error.strerror}); expected to make or use this folder for "
            "pictures. Move what is in its place, or start in another folder."
        ) from error
    say("Starting ComfyUI ...")
    with server.running(host, port=port, arguments=["--output-directory", str(DEFAULT_FOLDER.resolve())]) as running:
        say(f"The canvas: {running.url}")
        say(f"Pictures are saved in {DEFAULT_FOLDER.resolve()}. Ctrl+C stops the server; all else goes with it.")
        running.process.wait()
        raise server.crashed(running, "by itself")


def find_weights(model: Path | None) -> Weights:
    """Look at the model's files, headers only. Raises UserError if it is none that can be drawn with."""
    try:
        if model is None:
            return Weights(inspect_checkpoint(SHIPPED).model.facts("the built-in koala-tiny"))
        path = model.expanduser().resolve()
        if path.is_dir():
            facts = inspect_folder(path).model.facts(path.name)
            return Weights(facts, path, "diffusers", (("source", "diffusers folder"), ("source.folder", path.name)))
        facts = inspect_checkpoint(path).model.facts(path.name)
        return Weights(facts, path, "checkpoints", (("source", "checkpoint"), ("source.ckpt_name", path.name)))
    except (CheckpointError, OSError) as error:
        raise UserError(str(error)) from error


def place(weights: Path, folder: Path) -> None:
    """Link weights into one of the server's model folders, whose list it reads for each graph."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / weights.name).symlink_to(weights, target_is_directory=weights.is_dir())
    except OSError as error:
        raise UserError(f"{weights} cannot be linked into {folder}: {error}") from error


def wanted_prompts(request: Request) -> Sequence[str]:
    """One prompt if it is given; else the contact sheet's for the built-in model, its first for a larger one."""
    if request.prompt is not None:
        return [request.prompt]
    return SHEET_PROMPTS[:1] if request.model else SHEET_PROMPTS


def configured(workflow: Workflow, info: ObjectInfo, weights: Weights, request: Request) -> Workflow:
    """The shipped workflow with this run's model, size, steps and negative prompt."""
    settings = weights.facts.settings
    widgets: list[tuple[str, str, Any]] = [("KoalaCheckpointLoader", *widget) for widget in weights.widgets]
    widgets += [("EmptyLatentImage", side, weights.facts.side) for side in ("width", "height")]
    widgets += [("KoalaPrompt", "negative", request.negative), ("KoalaSampler", "seed", request.seed)]
    if request.steps is not None:
        custom = {"preset": "custom", "preset.steps": request.steps, "preset.cfg": settings.cfg}
        custom["preset.spacing"] = settings.spacing
        widgets += [("KoalaSampler", name, value) for name, value in custom.items()]
    for class_type, name, value in widgets:
        workflow = with_widget(workflow, info, class_type, name, value)
    return workflow


def draw(client: Client, workflow: Workflow, info: ObjectInfo, prompts: Sequence[str]) -> Iterator[bytes]:
    """Run the workflow once for each prompt, with a progress bar; yields the PNGs as the server saved them."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as progress:
        for prompt in prompts:
            changed = with_widget(workflow, info, "KoalaPrompt", "positive", prompt)
            graph = to_prompt(changed, info)
            on_event = follow(progress, prompt, graph)
            result = client.run(graph, changed, on_event)
            yield client.view(result.images()[0])


def follow(progress: Progress, title: str, graph: dict[str, dict[str, Any]]) -> Callable[[str, dict[str, Any]], None]:
    """A listener that moves the bar by the sampler's steps."""
    task = progress.add_task(title, total=None)

    def on_event(kind: str, data: dict[str, Any]) -> None:
        if kind == "progress" and graph[data["node"]]["class_type"] == "KoalaSampler":
            progress.update(task, completed=data["value"], total=data["max"])

    return on_event


def target_for(out: Path | None, sheet: bool) -> Path:
    """The PNG to write: ``out`` itself if it is named as one, else the next free name in that folder.

    Raises UserError rather than write over a file.
    """
    if out is not None and out.suffix.lower() == ".png":
        if out.exists():
            raise UserError(f"{out} exists already, and was not changed. Give another --out, or delete it.")
        target = out
    else:
        folder = out or DEFAULT_FOLDER
        if folder.exists() and not folder.is_dir():
            raise UserError(
                f"{folder} is a file that is not named .png. Give --out a folder, or a name that ends in .png."
            )
        stem = "contact-sheet" if sheet else "koala"
        names = (folder / f"{stem}-{number:04}.png" for number in range(1, 10_000))
        target = next(name for name in names if not name.exists() and not name.with_suffix("").exists())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target.parent}: cannot be made ({error.strerror}). Give another --out.") from error
    return target.resolve()


def save(pictures: Sequence[bytes], prompts: Sequence[str], target: Path) -> None:
    """Write the picture, or the contact sheet and beside it a folder of its pictures; prints where."""
    if len(pictures) == 1:
        target.write_bytes(pictures[0])
    else:
        folder = target.with_suffix("")
        folder.mkdir()
        for number, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True), 1):
            (folder / f"{number:02} {prompt}.png").write_bytes(picture)
        contact_sheet(pictures, prompts).save(target)
        say(f"The pictures by themselves, each with its graph inside: {folder}")
    say(str(target))
