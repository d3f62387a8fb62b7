"""Noise into latents: KOALA Scheduler and KOALA Sampler."""

from __future__ import annotations

from typing import Any, Final, Literal

import comfy.model_sampling
import comfy.samplers
import torch
from comfy_api.latest import io
from comfy_extras.nodes_custom_sampler import SamplerCustom

from ..host.model import attached_facts, is_koala, model_facts
from ..host.protocols import Conditioning, Latent, Model
from ..host.transfer.compatibility import incompatible_patches
from ..host.transfer.guard import guarded
from ..koala.architecture.layout import name
from ..koala.releases import SCHEDULER_CONFIG, SPACINGS, VARIANTS, Settings, Spacing
from ..koala.schedule import Schedule, schedule
from ..koala.words import joined, lines, message
from .base import CATEGORY, SHOWS, shown

AUTO: Final = "auto"
CUSTOM: Final = "custom"
PRESETS = {f"{variant.name} ({variant.settings})": variant.settings for variant in VARIANTS.values()}
BASE = next(iter(PRESETS.values()))
STEPS = "Steps of the full schedule. With denoise below 1, only steps x denoise of them run, as in diffusers."


def _steps_input(tooltip: str = STEPS) -> io.Int.Input:
    return io.Int.Input(
        "steps",
        default=BASE.steps,
        min=1,
        max=1000,
        tooltip=tooltip,
    )


def preset_input(tooltip: str, steps: str = STEPS) -> io.DynamicCombo.Input:
    """The choice of steps, guidance and spacing, with two tooltips; ``settings_of`` reads it."""
    return io.DynamicCombo.Input(
        "preset",
        tooltip=tooltip,
        options=[
            io.DynamicCombo.Option(AUTO, []),
            *(io.DynamicCombo.Option(preset, []) for preset in PRESETS),
            io.DynamicCombo.Option(
                CUSTOM,
                [
                    _steps_input(steps),
                    io.Float.Input(
                        "cfg",
                        default=BASE.cfg,
                        min=0.0,
                        max=100.0,
                        step=0.1,
                        round=0.01,
                        tooltip="Guidance scale: how closely the image follows the prompt. 1 ignores "
                        "the negative prompt.",
                    ),
                    io.Combo.Input(
                        "spacing",
                        options=list(SPACINGS),
                        default=BASE.spacing,
                        tooltip="How the steps are spaced: leading for base, trailing for Lightning.",
                    ),
                ],
            ),
        ],
    )


def _denoise_input() -> io.Float.Input:
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.01,
        max=1.0,
        step=0.01,
        tooltip="1 starts from pure noise; lower values keep more of the input latent (image to image).",
    )


class KoalaScheduler(io.ComfyNode):
    """Sigmas of a KOALA's published schedule, for SamplerCustom graphs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KoalaScheduler",
            display_name="KOALA Scheduler",
            category=CATEGORY,
            description="The sigmas that diffusers uses for KOALA, for any number of steps. For SamplerCustom and "
            "SamplerCustomAdvanced.",
            search_aliases=["koala sigmas", "25 steps", "leading", "trailing", "koala schedule", "diffusers scheduler"],
            inputs=[
                io.Model.Input("model", tooltip="A KOALA model; its own scheduler settings are used."),
                _steps_input(),
                io.Combo.Input(
                    "spacing",
                    options=[AUTO, *SPACINGS],
                    default=AUTO,
                    tooltip="How the steps are spaced. auto: as published (base leading, Lightning trailing).",
                ),
                _denoise_input(),
            ],
            outputs=[io.Sigmas.Output(display_name="SIGMAS", tooltip="The noise levels: steps + 1 of them.")],
            **SHOWS,
        )

    @classmethod
    def execute(cls, model: Model, steps: int, spacing: Spacing | Literal["auto"], denoise: float) -> io.NodeOutput:
        chosen: Spacing = model_facts(model).settings.spacing if spacing == AUTO else spacing
        sigmas = schedule_of(model, steps, chosen, denoise).sigmas
        title = message("{steps} steps, {spacing}", steps=len(sigmas) - 1, spacing=chosen)
        return shown(None, sigmas, curve=_curve(model, sigmas, title))


def _curve(model: Model, sigmas: torch.Tensor, title: str) -> dict[str, Any]:
    """A schedule to be drawn in front of the published one, or of SDXL's for a model that is not a KOALA."""
    facts = attached_facts(model)
    published = facts.settings if facts is not None else BASE
    reference = schedule_of(model, published.steps, published.spacing, 1.0).sigmas
    return {"title": title, "sigmas": sigmas.tolist(), "published": published.words, "reference": reference.tolist()}


class KoalaSampler(io.ComfyNode):
    """Samples with the settings that the KOALA model was published with."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KoalaSampler",
            display_name="KOALA Sampler",
            category=CATEGORY,
            essentials_category="Image Generation",
            description="Samples with the steps, guidance and schedule that the model was published with, and shows "
            "them. From the same noise, the result matches diffusers.",
            search_aliases=["koala ksampler", "25 steps", "10 steps", "sdxl lite", "fast sdxl", "lightning"],
            inputs=[
                io.Model.Input("model", tooltip="A KOALA model. LoRAs and patches are supported."),
                io.Conditioning.Input("positive", tooltip="What the image should show."),
                io.Conditioning.Input("negative", tooltip="What the image should not show."),
                io.Latent.Input("latent_image", tooltip="An empty latent, or one to start from."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The same seed gives the same image.",
                ),
                preset_input("auto follows the model. base and lightning: their published settings. custom: your own."),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.SAMPLER_NAMES,
                    default="euler",
                    advanced=True,
                    tooltip="KOALA was published with euler.",
                ),
                _denoise_input(),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="The denoised latent, for VAE Decode.")],
            **SHOWS,
        )

    @classmethod
    def execute(
        cls,
        model: Model,
        positive: Conditioning,
        negative: Conditioning,
        latent_image: Latent,
        seed: int,
        preset: dict[str, Any],
        sampler_name: str,
        denoise: float,
    ) -> io.NodeOutput:
        incompatible = incompatible_patches(model) if is_koala(model) else ()
        settings, why = settings_of(model, preset)
        made = schedule_of(model, settings.steps, settings.spacing, denoise)
        sampler = comfy.samplers.sampler_object(sampler_name)
        # core's two ways of scaling the first noise are diffusers' two ways; core chooses by sigma_max, diffusers by
        # spacing, so tell this one sampler object which
        sampler.max_denoise = lambda *_: made.full_variance
        output = SamplerCustom.execute(
            guarded(model), True, seed, settings.cfg, positive, negative, sampler, made.sigmas, latent_image
        )
        run, said = len(made.sigmas) - 1, settings.words
        if run < settings.steps:
            said = message("{settings}, the last {count} of them run", settings=said, count=run)
        return shown(lines(joined(", ", (said, sampler_name)), why, *incompatible), output.result[0])


def settings_of(model: Model, preset: dict[str, Any]) -> tuple[Settings, str]:
    """The settings that a preset stands for, and where they come from."""
    chosen = preset["preset"]
    if chosen == CUSTOM:
        return Settings(preset["steps"], preset["cfg"], preset["spacing"]), message("custom settings")
    if chosen == AUTO:
        facts = model_facts(model)
        return facts.settings, message(
            "These are the published settings of {model} {variant}. {evidence}",
            model=name(facts.layout),
            variant=facts.identity.words,
            evidence=facts.identity.evidence,
        )
    return PRESETS[chosen], message("preset {preset}", preset=chosen)


def schedule_of(model: Model, steps: int, spacing: Spacing, denoise: float) -> Schedule:
    """The schedule under the model's own scheduler config, or SDXL's where the MODEL has none.

    Raises ValueError for a MODEL that is sampled by flow matching, where these noise levels mean nothing.
    """
    if isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST):
        raise ValueError(
            "this MODEL is sampled as a flow-matching model, with noise levels from 0 to 1; expected one with SDXL's "
            "noise levels, as KOALA's schedule has them. Remove the node that changed the sampling (ModelSamplingSD3 "
            "or similar), or take KSampler for a model that was trained so."
        )
    facts = attached_facts(model)
    config = facts.scheduler if facts is not None else SCHEDULER_CONFIG
    return schedule(steps, spacing, denoise, config)
