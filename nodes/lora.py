"""SDXL's and KOALA's LoRAs on a KOALA model: KOALA LoRA Loader and KOALA Create Hook LoRA."""

from __future__ import annotations

from typing import Any

import comfy.hooks
from comfy_api.latest import io

from ..host.protocols import Clip, Hooks, Model
from ..host.transfer.lora import apply_lora, hook_lora
from ..koala.lora.modules import WORDS
from ..koala.lora.origin import TrainedOn
from ..koala.lora.plan import Plan
from ..koala.lora.report import STAGE_NAMES, coverage, report, summary
from ..koala.lora.scale import config_beside
from .base import ADD_ONS, SHOWS, choices, chosen_path, fingerprint, paths_of, shown

STRENGTH = 20.0


def _lora_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "lora_name",
            options=choices("loras"),
            tooltip="A LoRA of any kind, trained on SDXL or on KOALA itself, from models/loras. koala-tiny's is built "
            "in.",
        ),
        io.Float.Input(
            "strength_model",
            default=1.0,
            min=-STRENGTH,
            max=STRENGTH,
            step=0.01,
            tooltip="Strength on the U-Net. KOALA has fewer layers than SDXL, so more than 1 may be needed.",
        ),
        io.Float.Input(
            "strength_clip",
            default=1.0,
            min=-STRENGTH,
            max=STRENGTH,
            step=0.01,
            tooltip="Strength on the text encoders, which are the same as SDXL's.",
        ),
    ]


def _trained_on_input() -> io.Combo.Input:
    return io.Combo.Input(
        "trained_on",
        options=["auto", "SDXL", "KOALA"],
        default="auto",
        advanced=True,
        tooltip="Which model the LoRA was trained on. auto detects it from the LoRA's layers and reports the result.",
    )


class KoalaLoraLoader(io.ComfyNode):
    """A LoRA on a KOALA model, every module on the layer it belongs to."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KoalaLoraLoader",
            display_name="KOALA LoRA Loader",
            category=ADD_ONS,
            essentials_category="Image Generation",
            description="Applies a LoRA made for SDXL to the matching KOALA layers, and reports what was applied. "
            "LoRAs trained on KOALA are applied unchanged. The stock Load LoRA would put a third of an SDXL LoRA on "
            "the wrong layers.",
            search_aliases=["lora", "load lora", "sdxl lora", "koala lora", "lycoris", "locon", "loha", "lokr", "dora"],
            inputs=[
                io.Model.Input("model", tooltip="A KOALA model, with or without other LoRAs."),
                io.Clip.Input("clip", tooltip="Its text encoders, which are SDXL's."),
                *_lora_inputs(),
                _trained_on_input(),
                io.Float.Input(
                    "fold_removed",
                    default=0.0,
                    min=-1.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Experimental: weight for merging changes of removed transformer blocks into the nearest "
                    "kept block. 0 leaves them out.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The KOALA model with the LoRA."),
                io.Clip.Output(display_name="CLIP", tooltip="The text encoders with the LoRA."),
                io.String.Output(display_name="report", tooltip="Applied and skipped modules, with reasons."),
            ],
            **SHOWS,
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str = "", **_: Any) -> str:
        """Changes when the file is replaced on disk under the same name."""
        return _fingerprint(lora_name)

    @classmethod
    def execute(
        cls,
        model: Model,
        clip: Clip,
        lora_name: str,
        strength_model: float,
        strength_clip: float,
        trained_on: TrainedOn,
        fold_removed: float,
    ) -> io.NodeOutput:
        path = chosen_path("loras", lora_name)
        applied = apply_lora(model, clip, path, strength_model, strength_clip, fold_removed, trained_on)
        return _with_coverage(applied.plan, applied.text, applied.model, applied.clip)


class KoalaHookLora(io.ComfyNode):
    """A LoRA for KOALA as core's hooks: scheduled over the steps, or for a part of the image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KoalaHookLora",
            display_name="KOALA Create Hook LoRA",
            category=ADD_ONS,
            description="ComfyUI's Create Hook LoRA for KOALA: every module goes to the matching KOALA layer. For "
            "LoRAs that are scheduled over the steps or limited to one prompt or mask.",
            search_aliases=["hook lora", "scheduled lora", "lora schedule", "masked lora"],
            inputs=[
                io.Model.Input("model", tooltip="The KOALA model that will be sampled; only its layers are read."),
                *_lora_inputs(),
                io.Hooks.Input("prev_hooks", optional=True, tooltip="Hooks to add these to."),
                _trained_on_input(),
            ],
            outputs=[
                io.Hooks.Output(
                    display_name="HOOKS", tooltip="For Set CLIP Hooks, Cond Set Props and Set Hook Keyframes."
                ),
                io.String.Output(
                    display_name="report", tooltip="Modules that will be applied or skipped, with reasons."
                ),
            ],
            **SHOWS,
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str = "", **_: Any) -> str:
        """Changes when the file is replaced on disk under the same name."""
        return _fingerprint(lora_name)

    @classmethod
    def execute(
        cls,
        model: Model,
        lora_name: str,
        strength_model: float,
        strength_clip: float,
        trained_on: TrainedOn,
        prev_hooks: Hooks | None = None,
    ) -> io.NodeOutput:
        path = chosen_path("loras", lora_name)
        hooks, plan, text = hook_lora(model, path, strength_model, strength_clip, trained_on)
        before: Hooks = prev_hooks if prev_hooks is not None else comfy.hooks.HookGroup()
        return _with_coverage(plan, text, before.clone_and_combine(hooks))


def _fingerprint(lora_name: str) -> str:
    """Of a LoRA's file and of the configuration beside it, which says how strong it is."""
    return fingerprint(*(file for path in paths_of("loras", lora_name) for file in (path, config_beside(path)) if file))


def _with_coverage(plan: Plan, text: str, *outputs: object) -> io.NodeOutput:
    """A LoRA node's outputs and its report, with what became of the LoRA's modules drawn on the node."""
    drawing = {"stages": coverage(plan), "names": STAGE_NAMES, "words": WORDS}
    return shown(summary(plan, text), *outputs, report(plan, text), coverage=drawing)
