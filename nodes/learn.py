"""What changes an SDXL, learned anew for a KOALA: KOALA LoRA from SDXL."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host.learning.learn import Models, learn
from ..host.learning.samples import Sampling
from ..host.protocols import Clip, Model
from .base import ADD_ONS, SHOWS, shown
from .sample import preset_input, schedule_of, settings_of


class KoalaLoraFromSdxl(io.ComfyNode):
    """A LoRA that changes a KOALA's output as an SDXL's is changed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KoalaLoraFromSdxl",
            display_name="KOALA LoRA from SDXL",
            category=ADD_ONS,
            description="Makes a LoRA that changes a KOALA as LoRAs or a fine-tune change SDXL, without images: least "
            "squares on what both models meet while they draw your prompts. More of the effect than KOALA LoRA Loader "
            "gives, but it takes as long as a training. SDXL needs what sampling needs, then KOALA in fp32 with "
            "gradients: about 7 GB for KOALA-700M at 1024 px.",
            search_aliases=[
                "convert lora",
                "sdxl lora to koala",
                "transfer lora",
                "distill lora",
                "extract lora",
                "train lora",
                "fine-tune to lora",
            ],
            is_experimental=True,
            inputs=[
                io.Model.Input("sdxl", tooltip="SDXL without the change."),
                io.Model.Input(
                    "sdxl_changed",
                    tooltip="The same SDXL with LoRAs, from any loader, or a checkpoint that was fine-tuned from it.",
                ),
                io.Model.Input("koala", tooltip="The KOALA model that the LoRA will be used on."),
                io.Clip.Input("clip", tooltip="SDXL's text encoders, which are KOALA's, too."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    tooltip="Prompts as you will use the LoRA, one a line, with its trigger words: at least 5, better "
                    "two dozen. Every fifth is held out, to measure.",
                ),
                preset_input(
                    "How both models draw. auto: as the KOALA model was published. custom: for LoRAs that draw in a "
                    "few steps, such as 4 steps at cfg 1, trailing.",
                    "Steps in which an image is drawn.",
                ),
                io.Int.Input(
                    "rank",
                    default=32,
                    min=1,
                    max=1024,
                    tooltip="Rank of the new LoRA: twice that of an SDXL LoRA, 64 for a fine-tuned checkpoint.",
                ),
                io.Int.Input(
                    "samples",
                    default=128,
                    min=10,
                    max=65536,
                    tooltip="Noisy latents to learn from; a fifth of them measures. The time grows with them.",
                ),
                io.Int.Input(
                    "size",
                    default=1024,
                    min=64,
                    max=2048,
                    step=64,
                    tooltip="Side in pixels of the images that are drawn. 512 takes a quarter of the time.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,  # else the canvas would have it learned anew each time
                    tooltip="The same seed gives the same samples.",
                ),
                io.Clip.Input(
                    "clip_changed",
                    optional=True,
                    tooltip="The text encoders with the change, where it has a part for them: Load LoRA's CLIP, or the "
                    "fine-tuned checkpoint's. Use this CLIP with the new LoRA, too.",
                ),
                io.String.Input(
                    "keep",
                    optional=True,
                    multiline=True,
                    tooltip="Prompts that the LoRA must leave as they are, one a line, such as prompts without its "
                    "trigger words: none, or at least 5. About half of the images drawn are then of these.",
                ),
            ],
            outputs=[
                io.LoraModel.Output(
                    display_name="LORA_MODEL",
                    tooltip="For Load LoRA Model, behind the KOALA model; or Save LoRA Weights.",
                ),
                io.String.Output(
                    display_name="report", tooltip="How much of the change is reached on samples that were held out."
                ),
            ],
            **SHOWS,
        )

    @classmethod
    def execute(
        cls,
        sdxl: Model,
        sdxl_changed: Model,
        koala: Model,
        clip: Clip,
        prompts: str,
        preset: dict[str, Any],
        rank: int,
        samples: int,
        size: int,
        seed: int,
        clip_changed: Clip | None = None,
        keep: str = "",
    ) -> io.NodeOutput:
        settings, _ = settings_of(koala, preset)
        sampling = Sampling(schedule_of(koala, settings.steps, settings.spacing, 1.0), settings.cfg, size)
        models = Models(sdxl, sdxl_changed, koala, clip, clip_changed)
        learned = learn(models, prompts, keep, sampling, rank, samples, seed)
        return shown(learned.report, learned.lora, learned.report)
