"""Models that are not KOALA, as tensor names and shapes: ``OTHER_MODELS`` says what each is and what loads it.

The names of the tensors are the real ones. They come from diffusers' and transformers' own classes where these have
them, else from the published files' formats as ComfyUI reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import diffusers
import transformers

from koala_sdxl.koala.architecture.keys import Numbering, Shape
from koala_sdxl.koala.architecture.layout import SDXL, SSD_1B, VEGA, Layout
from tests.unit import files, reference
from tests.unit.reference import Shapes, shapes_of

UNET_PREFIX = "model.diffusion_model."

# --- U-Nets of other families --------------------------------------------------------------------------------------

SD1 = Layout(
    channels=(320, 640, 1280, 1280),
    down=((1, 1), (1, 1), (1, 1), (0, 0)),
    middle=1,
    up=((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    context=768,
)
SD2 = replace(SD1, context=1024)
REFINER = Layout(
    channels=(384, 768, 1536, 1536),
    down=((0, 0), (4, 4), (4, 4), (0, 0)),
    middle=4,
    up=((0, 0, 0), (4, 4, 4), (4, 4, 4), (0, 0, 0)),
    context=1280,
    added=2560,
)
INPAINT = replace(SDXL, in_channels=9)
PIX2PIX = replace(SDXL, in_channels=8)


@cache
def unet(layout: Layout, numbering: Numbering = "diffusers") -> Shapes:
    """A U-Net's tensors. Those before SDXL have no added conditioning, and the first ones convolve into attention."""
    found = files.unet(layout, numbering)
    if layout.context in (768, 1024):
        found = {key: shape for key, shape in found.items() if not key.startswith(("add_embedding.", "label_emb."))}
    if layout.context == 768:
        ends = (".proj_in.weight", ".proj_out.weight")
        found = {key: (*shape, 1, 1) if key.endswith(ends) else shape for key, shape in found.items()}
    return found


def checkpoint(layout: Layout, numbering: Numbering = "comfy") -> Shapes:
    """A single-file checkpoint: the U-Net, its text encoders and its VAE."""
    clip_l = {f"transformer.{key}": shape for key, shape in reference.clip_l().items()}
    clip_g = {f"model.{key}": shape for key, shape in reference.open_clip(reference.clip_g()).items()}
    text = {
        SD1: {"cond_stage_model.": clip_l},
        SD2: {"cond_stage_model.": clip_g},
        REFINER: {"conditioner.embedders.0.": clip_g},
    }.get(layout, {"conditioner.embedders.0.": clip_l, "conditioner.embedders.1.": clip_g})
    vae = reference.original_vae(reference.vae())
    parts = {UNET_PREFIX: unet(layout, numbering), **text, "first_stage_model.": vae}
    return {prefix + key: shape for prefix, found in parts.items() for key, shape in found.items()}


# --- other models --------------------------------------------------------------------------------------------------


def lora(pattern: str, *ends: str, modules: int = 4) -> Callable[[], Shapes]:
    """A LoRA on the attention of SDXL's second stage; ``pattern`` holds the module's name, ``ends`` its tensors."""
    targets = [f"down_blocks.1.attentions.0.transformer_blocks.{i}.attn1.to_q" for i in range(modules)]
    return lambda: {
        pattern.format(flat=target.replace(".", "_"), dotted=target) + end: (8, 640) if end != ".alpha" else ()
        for target in targets
        for end in ends
    }


def named(*names: str, shape: Shape = (64, 64)) -> Callable[[], Shapes]:
    return lambda: dict.fromkeys(names, shape)


def network(make: Callable[[], object]) -> Callable[[], Shapes]:
    return lambda: shapes_of(make)  # type: ignore[arg-type]


CHECKPOINT, UNET = "(CheckpointLoaderSimple), from models/checkpoints", "(UNETLoader), from models/diffusion_models"
SWAP = ", and put KOALA U-Net Swap behind it."
LORA, IN_LORAS = "Load it with KOALA LoRA Loader (", "LoraLoader), from models/loras."
CONTROLNET = "Load it with KOALA ControlNet Loader ("
TEXT, CLIP = '"U-Net + text encoders + VAE", from models/text_encoders.', "(CLIPLoader), from models/text_encoders."
VAE = 'Load it with KOALA Checkpoint Loader, source "U-Net + text encoders + VAE", from models/vae.'
VISION = "(CLIPVisionLoader), from models/clip_vision."
EMBEDDING = "Load it with KOALA Prompt, mode comfy, by embedding:name in the prompt, from models/embeddings."
PUBLISHED = "huggingface.co/etri-vilab/koala-"

OTHER_MODELS: dict[str, tuple[Callable[[], Shapes], str, str]] = {
    "sd1-diffusers": (lambda: unet(SD1), "a Stable Diffusion 1.x model", UNET),
    "sd1-checkpoint": (lambda: checkpoint(SD1), "a Stable Diffusion 1.x model", CHECKPOINT),
    "sd2-diffusers": (lambda: unet(SD2), "a Stable Diffusion 2.x model", UNET),
    "sd2-checkpoint": (lambda: checkpoint(SD2), "a Stable Diffusion 2.x model", CHECKPOINT),
    "sdxl-diffusers": (lambda: unet(SDXL), "an SDXL base model", UNET + SWAP),
    "sdxl-checkpoint": (lambda: checkpoint(SDXL), "an SDXL base model", CHECKPOINT + SWAP),
    "refiner-diffusers": (lambda: unet(REFINER), "the SDXL refiner", UNET),
    "refiner-checkpoint": (lambda: checkpoint(REFINER), "the SDXL refiner", CHECKPOINT),
    "sdxl-inpaint-diffusers": (lambda: unet(INPAINT), "an inpainting U-Net (9 input channels)", UNET),
    "sdxl-inpaint-checkpoint": (lambda: checkpoint(INPAINT), "an inpainting U-Net (9 input channels)", CHECKPOINT),
    "sd1-inpaint": (lambda: unet(replace(SD1, in_channels=9)), "an inpainting U-Net", UNET),
    "pix2pix-diffusers": (lambda: unet(PIX2PIX), "an instruct-pix2pix U-Net (8 input channels)", UNET),
    "pix2pix-checkpoint": (lambda: checkpoint(PIX2PIX), "an instruct-pix2pix U-Net (8 input channels)", CHECKPOINT),
    "ssd-1b-diffusers": (lambda: unet(SSD_1B), "SSD-1B", UNET),
    "ssd-1b-checkpoint": (lambda: checkpoint(SSD_1B), "SSD-1B", CHECKPOINT),
    "vega-diffusers": (lambda: unet(VEGA), "Segmind Vega", UNET),
    "vega-checkpoint": (lambda: checkpoint(VEGA), "Segmind Vega", CHECKPOINT),
    "lora-kohya": (lora("lora_unet_{flat}", ".lora_down.weight", ".lora_up.weight", ".alpha"), "a LoRA", LORA),
    "lora-peft": (lora("unet.{dotted}", ".lora_A.weight", ".lora_B.weight"), "a LoRA", IN_LORAS),
    "lora-diffusers-old": (
        lora("unet.{dotted}", ".lora.down.weight", ".lora.up.weight"),
        "a LoRA",
        IN_LORAS,
    ),
    "lora-attention-processor": (
        named("down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight"),
        "a LoRA",
        IN_LORAS,
    ),
    "lora-text": (named("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"), "a LoRA", IN_LORAS),
    "loha": (
        lora("lycoris_{flat}", ".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".alpha"),
        "a LoRA",
        IN_LORAS,
    ),
    "lokr": (lora("lycoris_{flat}", ".lokr_w1", ".lokr_w2_a", ".lokr_w2_b", ".alpha"), "a LoRA", IN_LORAS),
    "controlnet-diffusers": (
        network(lambda: diffusers.ControlNetModel(layers_per_block=1)),
        "a ControlNet",
        CONTROLNET,
    ),
    "controlnet-original": (
        lambda: (
            {f"control_model.{key}": s for key, s in unet(SD1, "comfy").items() if not key.startswith("out")}
            | named("control_model.zero_convs.0.0.weight", "control_model.input_hint_block.0.weight")()
        ),
        "a ControlNet",
        CONTROLNET,
    ),
    "controlnet-flux": (
        network(lambda: diffusers.FluxControlNetModel(num_layers=1, num_single_layers=1)),
        "a ControlNet",
        CONTROLNET,
    ),
    "controlnet-sd3": (
        network(lambda: diffusers.SD3ControlNetModel(num_layers=1)),
        "a ControlNet",
        CONTROLNET,
    ),
    "controlnet-union": (
        network(lambda: diffusers.ControlNetUnionModel(layers_per_block=1, addition_time_embed_dim=8)),
        "a union ControlNet",
        CONTROLNET,
    ),
    "control-lora": (
        named("lora_controlnet", "input_hint_block.0.weight", "zero_convs.0.0.weight", "input_blocks.0.0.up"),
        "a Control-LoRA",
        CONTROLNET,
    ),
    "t2i-adapter-diffusers": (
        network(lambda: diffusers.T2IAdapter(adapter_type="full_adapter_xl")),
        "a T2I-Adapter",
        CONTROLNET,
    ),
    "t2i-adapter-original": (
        named("conv_in.weight", "body.0.block1.weight", "body.0.block2.weight", "body.2.in_conv.weight"),
        "a T2I-Adapter",
        CONTROLNET,
    ),
    "ip-adapter": (
        named("image_proj.proj.weight", "image_proj.norm.weight", "ip_adapter.1.to_k_ip.weight"),
        "an IP-Adapter",
        "IP-Adapter pack, from models/ipadapter, and put KOALA Attention Patches behind them.",
    ),
    "vae-diffusers": (lambda: reference.vae(), "a VAE", VAE),
    "vae-original": (lambda: reference.original_vae(reference.vae()), "a VAE", VAE),
    "clip-l": (lambda: reference.clip_l(), "a CLIP text encoder", TEXT),
    "clip-l-transformers-5": (
        lambda: {key.removeprefix("text_model."): shape for key, shape in reference.clip_l().items()},
        "a CLIP text encoder",
        TEXT,
    ),
    "clip-g": (lambda: reference.clip_g(), "a CLIP text encoder", TEXT),
    "t5": (
        network(lambda: transformers.T5EncoderModel(transformers.T5Config(num_layers=2))),
        "a T5 text encoder",
        CLIP,
    ),
    "clip-vision": (
        network(lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig())),
        "a CLIP vision model",
        VISION,
    ),
    "clip-whole": (
        named("logit_scale", "text_model.encoder.layers.0.mlp.fc1.bias", "vision_model.post_layernorm.weight"),
        "a CLIP vision model",
        VISION,
    ),
    "language-model": (
        network(lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(num_hidden_layers=1))),
        "a language model",
        CLIP,
    ),
    "flux-diffusers": (
        network(lambda: diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)),
        "a Flux model",
        UNET,
    ),
    "flux-original": (
        named("img_in.weight", "double_blocks.0.img_attn.norm.key_norm.scale", "single_blocks.0.linear1.weight"),
        "a Flux model",
        UNET,
    ),
    "flux-checkpoint": (
        named(
            *(UNET_PREFIX + "img_in.weight", UNET_PREFIX + "double_blocks.0.img_attn.qkv.weight"),
            *(
                "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight",
                "vae.encoder.conv_in.bias",
            ),
        ),
        "a Flux model",
        CHECKPOINT,
    ),
    "chroma": (
        network(lambda: diffusers.ChromaTransformer2DModel(num_layers=1, num_single_layers=1)),
        "a Chroma model",
        UNET,
    ),
    "sd3-diffusers": (
        network(lambda: diffusers.SD3Transformer2DModel(num_layers=2)),
        "a Stable Diffusion 3 model",
        UNET,
    ),
    "sd3-original": (
        named("x_embedder.proj.weight", "joint_blocks.0.context_block.attn.qkv.weight", "pos_embed"),
        "a Stable Diffusion 3 model",
        UNET,
    ),
    "auraflow": (
        network(lambda: diffusers.AuraFlowTransformer2DModel(num_mmdit_layers=1, num_single_dit_layers=1)),
        "an AuraFlow model",
        UNET,
    ),
    "hunyuan-video": (
        network(lambda: diffusers.HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=1)),
        "a HunyuanVideo model",
        UNET,
    ),
    "pixart-diffusers": (network(lambda: diffusers.PixArtTransformer2DModel(num_layers=1)), "a PixArt model", UNET),
    "pixart-original": (named("t_block.1.weight", "blocks.0.cross_attn.kv_linear.weight"), "a PixArt model", UNET),
    "ltx-video": (
        named("patchify_proj.weight", "adaln_single.emb.timestep_embedder.linear_1.bias"),
        "an LTX-Video model",
        UNET,
    ),
    "qwen-image": (network(lambda: diffusers.QwenImageTransformer2DModel(num_layers=1)), "a Qwen-Image model", UNET),
    "z-image": (
        network(lambda: diffusers.ZImageTransformer2DModel(n_layers=1, n_refiner_layers=1)),
        "a Z-Image or Lumina model",
        UNET,
    ),
    "wan": (network(lambda: diffusers.WanTransformer3DModel(num_layers=1)), "a Wan model", UNET),
    "stable-cascade": (
        named("clip_txt_mapper.weight", "down_blocks.0.0.channelwise.0.weight", "down_blocks.0.0.depthwise.weight"),
        "a Stable Cascade model",
        UNET,
    ),
    "stable-video-diffusion": (
        named("conv_in.weight", "down_blocks.0.attentions.0.temporal_transformer_blocks.0.norm_in.weight"),
        "a Stable Video Diffusion model",
        "(ImageOnlyCheckpointLoader), from models/checkpoints.",
    ),
    "animatediff-diffusers": (
        network(lambda: diffusers.MotionAdapter((320,))),
        "a motion module",
        "AnimateDiff pack, from models/animatediff_models.",
    ),
    "animatediff-original": (
        named("down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.norms.0.weight"),
        "a motion module",
        "AnimateDiff pack, from models/animatediff_models.",
    ),
    "textual-inversion": (
        lambda: {"clip_g": (2, 1280), "clip_l": (2, 768)},
        "a textual inversion embedding",
        EMBEDDING,
    ),
    "textual-inversion-sd1": (lambda: {"emb_params": (2, 768)}, "a textual inversion embedding", EMBEDDING),
    "junk": (
        named("some.tensor", "another"),
        "a file of an unknown kind (2 tensors, first: another, some.tensor)",
        PUBLISHED,
    ),
    "no-tensors": (dict, "a file of an unknown kind (0 tensors, first: none)", PUBLISHED),
}
"""Whole and well-formed files of something else: tensors, what it is, what loads it."""
