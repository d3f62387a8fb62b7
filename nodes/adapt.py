"""What was made for SDXL, on a KOALA: U-Net swap, LoRAs, ControlNets, attention patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.hooks
import folder_paths
from comfy_api.latest import io

from .. import koala_loader
from ..host.model import model_facts
from ..host.transfer import attention
from ..host.transfer.control import adapt
from ..host.transfer.lora import apply_lora, hook_lora
from ..host.transfer.swap import swap
from ..koala.architecture.layout import name
from ..koala.files.inspect import inspect_model
from ..koala.lora.plan import Plan
from ..koala.lora.report import WORDS, coverage, report, summary
from ..koala.model_report import badge
from ..koala.releases import STOCK_SCHEDULERS, identify
from .base import CATEGORY, SHOWS, fingerprint, shown, unet_input, weight_dtype_input

ADAPT = f"{CATEGORY}/SDXL add-ons"
LORA_STRENGTH = 20.0


class KoalaUNetSwap(io.ComfyNode):
    """KOALA in SDXL's place in a graph that is there already."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        files = folder_paths.get_filename_list("diffusion_models")
        return io.Schema(
            node_id="KoalaUNetSwap",
            display_name="KOALA U-Net Swap",
            category=ADAPT,
            description="Puts a KOALA U-Net in the place of SDXL's in a graph that you have: put it on the MODEL wire, "
            "behind the SDXL loader or behind its LoRAs and patches. What the SDXL model bears goes along, each change "
            "to the layer that it belongs to; CLIP, VAE and samplers stay as they are. ControlNets need KOALA "
            "ControlNet.",
            search_aliases=["swap sdxl", "replace unet", "sdxl to koala", "fast sdxl", "sdxl lite", "koala unet"],
            inputs=[
                io.Model.Input("model", tooltip="An SDXL model from any loader, with LoRAs and patches as you like."),
                unet_input(extra_dict={"koala_published": {file: _published(file) for file in files}}),
                weight_dtype_input(),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The KOALA model, bearing what the SDXL model bore."),
                io.String.Output(display_name="report", tooltip="What was carried over and what was not, and why."),
            ],
            **SHOWS,
        )

    @classmethod
    def fingerprint_inputs(cls, unet_name: str = "", **_: Any) -> str:
        """Changes when the file is replaced on disk under the same name."""
        return fingerprint(*_found("diffusion_models", unet_name))

    @classmethod
    def execute(cls, model: Any, unet_name: str, weight_dtype: str) -> io.NodeOutput:
        path = Path(folder_paths.get_full_path_or_raise("diffusion_models", unet_name))
        koala = koala_loader.load_unet(inspect_model(path), path.name, weight_dtype)
        swapped = swap(model, koala)
        return shown(swapped.report, swapped.model, swapped.report, badge=badge(model_facts(koala)))


def _published(file: str) -> dict[str, Any]:
    """KSampler's widgets as a U-Net of that file's name was published: what the canvas sets when it swaps one in."""
    settings = identify({}, {}, "", file).variant.settings
    scheduler = STOCK_SCHEDULERS[settings.spacing]
    return {"steps": settings.steps, "cfg": settings.cfg, "sampler_name": "euler", "scheduler": scheduler}


def _found(folder: str, file: str) -> list[Path]:
    path = folder_paths.get_full_path(folder, file) if file else None
    return [Path(path)] if path else []


def _lora_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "lora_name",
            options=folder_paths.get_filename_list("loras"),
            tooltip="A LoRA that was trained on SDXL or on KOALA itself, of any kind, from models/loras.",
        ),
        io.Float.Input(
            "strength_model",
            default=1.0,
            min=-LORA_STRENGTH,
            max=LORA_STRENGTH,
            step=0.01,
            tooltip="How strongly the U-Net is changed. KOALA has fewer layers than SDXL: more than 1 may be needed.",
        ),
        io.Float.Input(
            "strength_clip",
            default=1.0,
            min=-LORA_STRENGTH,
            max=LORA_STRENGTH,
            step=0.01,
            tooltip="How strongly the text encoders are changed; they are SDXL's, and so is this part of the LoRA.",
        ),
    ]


def _trained_on_input() -> io.Combo.Input:
    return io.Combo.Input(
        "trained_on",
        options=["auto", "SDXL", "KOALA"],
        default="auto",
        advanced=True,
        tooltip="Which model the LoRA was trained on. auto tells by its layers and says so in the report.",
    )


class KoalaLoraLoader(io.ComfyNode):
    """A LoRA on a KOALA, every module on the layer it belongs to."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KoalaLoraLoader",
            display_name="KOALA LoRA Loader",
            category=ADAPT,
            essentials_category="Image Generation",
            description="Applies a LoRA that was made for SDXL to the KOALA layers that came from those it changes, "
            "and says what was applied. LoRAs trained on KOALA go on as they are. The stock Load LoRA would put a "
            "third of an SDXL LoRA on the wrong layers.",
            search_aliases=["lora", "load lora", "sdxl lora", "koala lora", "lycoris", "locon", "loha", "lokr", "dora"],
            inputs=[
                io.Model.Input("model", tooltip="A KOALA model, with other LoRAs as you like."),
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
                    tooltip="Experimental: with which weight the changes of transformer layers that KOALA lacks are "
                    "added to the nearest layer that it kept. 0 leaves them out.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The KOALA model with the LoRA."),
                io.Clip.Output(display_name="CLIP", tooltip="The text encoders with the LoRA."),
                io.String.Output(display_name="report", tooltip="How many modules were applied and how many not, why."),
            ],
            **SHOWS,
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str = "", **_: Any) -> str:
        """Changes when the file is replaced on disk under the same name."""
        return fingerprint(*_found("loras", lora_name))

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        lora_name: str,
        strength_model: float,
        strength_clip: float,
        trained_on: Any,
        fold_removed: float,
    ) -> io.NodeOutput:
        path = Path(folder_paths.get_full_path_or_raise("loras", lora_name))
        applied = apply_lora(model, clip, path, strength_model, strength_clip, fold_removed, trained_on)
        return _covered(applied.plan, applied.text, applied.model, applied.clip)


def _covered(plan: Plan, text: str, *outputs: Any) -> io.NodeOutput:
    """A LoRA node's outputs and its report, with what became of the LoRA's modules shown on the node."""
    drawing = {"stages": coverage(plan), "words": WORDS}
    return shown(summary(plan, text), *outputs, report(plan, text), coverage=drawing)


class KoalaHookLora(io.ComfyNode):
    """A LoRA for KOALA as core's hooks: scheduled over the steps, or for a part of the picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KoalaHookLora",
            display_name="KOALA Create Hook LoRA",
            category=ADAPT,
            description="As ComfyUI's Create Hook LoRA, with every module on the KOALA layer that it belongs to: for "
            "LoRAs that are scheduled over the steps or set on one prompt or mask.",
            search_aliases=["hook lora", "scheduled lora", "lora schedule", "masked lora"],
            inputs=[
                io.Model.Input("model", tooltip="The KOALA model that will be sampled; only its layers are looked at."),
                *_lora_inputs(),
                io.Hooks.Input("prev_hooks", optional=True, tooltip="Hooks that these are added to."),
                _trained_on_input(),
            ],
            outputs=[
                io.Hooks.Output(
                    display_name="HOOKS", tooltip="For Set CLIP Hooks, Cond Set Props and Set Hook Keyframes."
                ),
                io.String.Output(display_name="report", tooltip="How many modules will be applied and how many not."),
            ],
            **SHOWS,
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str = "", **_: Any) -> str:
        """Changes when the file is replaced on disk under the same name."""
        return fingerprint(*_found("loras", lora_name))

    @classmethod
    def execute(
        cls,
        model: Any,
        lora_name: str,
        strength_model: float,
        strength_clip: float,
        trained_on: Any,
        prev_hooks: Any | None = None,
    ) -> io.NodeOutput:
        path = Path(folder_paths.get_full_path_or_raise("loras", lora_name))
        hooks, plan, text = hook_lora(model, path, strength_model, strength_clip, trained_on)
        before = prev_hooks if prev_hooks is not None else comfy.hooks.HookGroup()
        return _covered(plan, text, before.clone_and_combine(hooks))


class KoalaControlNet(io.ComfyNode):
    """An SDXL ControlNet for KOALA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KoalaControlNet",
            display_name="KOALA ControlNet",
            category=ADAPT,
            description="Makes an SDXL ControlNet, union ControlNet or T2I-Adapter fit KOALA's fewer layers. Put it "
            "between the ControlNet's loader and Apply ControlNet; on SDXL it changes nothing.",
            search_aliases=["controlnet", "sdxl controlnet", "koala controlnet", "t2i adapter", "union controlnet"],
            inputs=[
                io.ControlNet.Input("control_net", tooltip="An SDXL ControlNet or T2I-Adapter from any loader."),
            ],
            outputs=[
                io.ControlNet.Output(display_name="CONTROL_NET", tooltip="For Apply ControlNet, and every other node."),
            ],
        )

    @classmethod
    def execute(cls, control_net: Any) -> io.NodeOutput:
        return io.NodeOutput(adapt(control_net))


class KoalaAttentionPatches(io.ComfyNode):
    """Attention patches with SDXL's numbers, bound to KOALA's blocks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KoalaAttentionPatches",
            display_name="KOALA Attention Patches",
            category=ADAPT,
            description="Binds what IP-Adapter, ControlNet-LLLite, Deep Shrink and the like have set on a KOALA model "
            "by SDXL's block numbers to the KOALA blocks that came from those. Put it behind the last of these nodes.",
            search_aliases=["ip-adapter", "ipadapter", "koala ipadapter", "lllite", "deep shrink", "attention patch"],
            inputs=[io.Model.Input("model", tooltip="A KOALA model with patches that were made for SDXL.")],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The same model, its patches on the right blocks."),
                io.String.Output(display_name="report", tooltip="What was bound, and what has no block in KOALA."),
            ],
            **SHOWS,
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        facts, remapped = model_facts(model), model.clone()
        koala = name(facts.layout)
        count, dropped = attention.remap(remapped.model_options["transformer_options"], facts.lineage)
        text = f"{count} patches remapped to {koala}'s blocks"
        if dropped:
            text += f"; {len(dropped)} dropped, as {koala} lacks their blocks ({attention.places(dropped)})"
        return shown(text, remapped, text)
