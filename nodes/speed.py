"""Faster sampling: KOALA Accelerate."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..host.accelerate import cpu_vae, gpu_vae
from ..host.accelerate.patch import Accelerated, accelerate, full_steps_of
from ..host.accelerate.plan import EXACT, FULL_RANGE, PRESETS, REUSE, ROUTINES, Acceleration
from ..host.model import model_facts
from ..host.protocols import Model, Vae
from ..koala.model_info import ModelFacts
from ..koala.schedule import schedule
from ..koala.words import Message, joined, lines, message
from .base import CATEGORY, SHOWS, shown

CUSTOM = "custom"
NO_VAE = "KOALA Accelerate: the VAE output is used but no VAE is connected. Connect the loader's VAE to the vae input."


class KoalaAccelerate(io.ComfyNode):
    """A KOALA model that samples faster."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KoalaAccelerate",
            display_name="KOALA Accelerate",
            category=CATEGORY,
            description="Speeds up sampling. exact: the same image, by faster routines on the CPU, or by compiled code "
            "and CUDA graphs on an NVIDIA GPU. balanced and fast: in addition most steps run only a small part of the "
            "U-Net and reuse cached features, extrapolated from earlier steps; a CPU that is faster in bf16 uses bf16. "
            "Works with any sampler node; connect it last, right before the sampler.",
            search_aliases=[
                "speed",
                "faster",
                "deepcache",
                "easycache",
                "teacache",
                "skip steps",
                "cpu",
                "cfg interval",
            ],
            inputs=[
                io.Model.Input("model", tooltip="A KOALA model. LoRAs and patches are supported."),
                io.DynamicCombo.Input(
                    "preset",
                    tooltip="exact: identical image; on a GPU identical but for rounding. balanced: nearly identical. "
                    "fast: details and occasionally shapes differ. custom: your own settings.",
                    options=[
                        *(io.DynamicCombo.Option(preset, []) for preset in PRESETS),
                        io.DynamicCombo.Option(
                            CUSTOM,
                            [
                                io.Combo.Input(
                                    "reuse",
                                    options=list(REUSE),
                                    default="balanced",
                                    tooltip="How many steps reuse cached features. off: none.",
                                ),
                                _percent_input("guidance_start", FULL_RANGE[0], "Before this point of the schedule"),
                                _percent_input("guidance_end", FULL_RANGE[1], "After this point of the schedule"),
                                io.Combo.Input(
                                    "cpu_routines",
                                    options=list(ROUTINES),
                                    default=EXACT,
                                    tooltip="CPU only. exact: faster routines for the same arithmetic. bf16: "
                                    "computes in bf16 where this processor is faster in it.",
                                ),
                            ],
                        ),
                    ],
                ),
                io.Vae.Input("vae", optional=True, tooltip="Optional. The VAE, to decode faster as well."),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The accelerated model, for any sampler."),
                io.Vae.Output(display_name="VAE", tooltip="The faster VAE, for VAE Decode."),
            ],
            **SHOWS,
        )

    @classmethod
    def execute(cls, model: Model, preset: dict[str, Any], vae: Vae | None = None) -> io.NodeOutput:
        facts = model_facts(model)
        settings = PRESETS.get(preset["preset"]) or _custom(preset)
        made = accelerate(model, settings, _tell_sampler)
        faster_vae, how = (ExecutionBlocker(NO_VAE), "") if vae is None else _faster_vae(vae, settings.routines)
        return shown(_summary(facts, settings, made, how), made.model, faster_vae)


def _percent_input(name: str, default: float, when: str) -> io.Float.Input:
    return io.Float.Input(
        name,
        default=default,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip=f"{when} (0: start, 1: end) the negative prompt is skipped, as with cfg 1.",
    )


def _custom(preset: dict[str, Any]) -> Acceleration:
    start, end = preset["guidance_start"], preset["guidance_end"]
    if start >= end:
        raise ValueError(
            f"guidance_start is {start} and guidance_end {end}; expected an end after the start. For no guidance at "
            f"all, set the sampler's cfg to 1."
        )
    return Acceleration(preset["cpu_routines"], REUSE[preset["reuse"]], (start, end))


def _faster_vae(vae: Vae, routines: str) -> tuple[Vae, str]:
    """The VAE as it is fastest on its device, and how, in words."""
    on_cpu, how = cpu_vae.install(vae, routines)
    return (on_cpu, how) if how else gpu_vae.install(vae)


def _summary(facts: ModelFacts, settings: Acceleration, made: Accelerated, vae: str) -> Message:
    """What the node will do with the model's published number of steps, and on this machine; that it does nothing,
    where that is so."""
    published = facts.settings
    steps = published.steps
    full = len(full_steps_of(settings, schedule(steps, published.spacing, 1.0, facts.scheduler).sigmas))
    said = [
        message("{full} of {steps} steps run the full U-Net", full=full, steps=steps)
        if full == steps
        else message("at least {full} of {steps} steps run the full U-Net", full=full, steps=steps)
    ]
    if settings.guided != FULL_RANGE:
        start, end = (f"{part:g}" for part in settings.guided)
        said.append(message("guidance from {start} to {end}", start=start, end=end))
    skips = len(said) > 1 or full < steps
    how = joined(", ", filter(None, (made.routines, made.execution, vae)))
    if how:
        on_cpu = made.model.load_device.type == "cpu"
        said.append(message("on this CPU: {how}", how=how) if on_cpu else message("on this GPU: {how}", how=how))
    if made.why_eager and (how or skips):
        said.append(message("the U-Net as ComfyUI runs it: {why}", why=made.why_eager))
    elif not how and not skips:
        why = made.why_eager or message("these settings leave everything as it is")
        said.append(message("changes nothing on this machine: {why}", why=why))
    return lines(*said)


def _tell_sampler(text: str) -> None:
    """Show on the node that samples what was skipped, and log it."""
    logging.info("KOALA Accelerate: %s", text)
    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    if context is not None and server is not None:
        server.send_progress_text(text, context.node_id)
