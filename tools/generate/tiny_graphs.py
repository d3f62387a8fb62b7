"""The graphs that run on the built-in koala-tiny, without a download."""

from __future__ import annotations

from koala_sdxl.koala.architecture.layout import KOALA_TINY
from koala_sdxl.koala.releases import SIZES
from tools.generate.canvas import Columns, Node
from tools.generate.notes import BUILT_IN, note
from tools.generate.parts import decoded, empty_latent, prompt, sampler, text_to_image

SIDE = SIZES[KOALA_TINY]
PINK, NEARLY_WHITE = 0xFF73BF, 0xF2F2F2
DRAWINGS = 16


def tiny_text_to_image() -> Columns:
    loader = Node("KoalaCheckpointLoader")
    about = note(
        "koala-tiny",
        "Runs at once. koala-tiny draws one of six shapes (circle, square, triangle, ring, star, koala) in one of nine "
        "colours on a background of another.",
        "It is made for 128 x 128 pixels and for prompts such as *a gray koala on a green background*: to try graphs, "
        "not for art. For real images take KOALA-Lightning or KOALA-700M.",
        BUILT_IN,
    )
    text = prompt(loader, "a gray koala on a green background")
    return text_to_image(loader, text, SIDE, "koala-tiny", [about])


def tiny_image_to_image() -> Columns:
    loader = Node("KoalaCheckpointLoader")
    about = note(
        "Image to image",
        "The first half draws an image, the second changes it: the second sampler starts from its latent, and denoise "
        "0.6 runs the last 15 of 25 steps on it, as diffusers' strength does.",
        "To start from your own image, replace the first half with Load Image. Lower denoise keeps more of it.",
        BUILT_IN,
    )
    texts = [prompt(loader, f"a {colour} circle on a white background") for colour in ("red", "blue")]
    latent = empty_latent(SIDE)
    first = sampler(loader["MODEL"], texts[0], latent["LATENT"])
    start, start_saved = decoded(loader, first["LATENT"], "koala-tiny-start")
    encode = Node("VAEEncode", {"pixels": start["IMAGE"], "vae": loader["VAE"]})
    second = sampler(loader["MODEL"], texts[1], encode["LATENT"], denoise=0.6)
    end, end_saved = decoded(loader, second["LATENT"], "koala-tiny-changed")
    return [[about], [loader, latent], texts, [first, start], [start_saved, encode], [second, end], [end_saved]]


def tiny_lora() -> Columns:
    loader = Node("KoalaCheckpointLoader")
    inputs = {"model": loader["MODEL"], "clip": loader["CLIP"], "lora_name": "built-in koala-tiny-cyan"}
    lora = Node("KoalaLoraLoader", {**inputs, "strength_model": 1.5})
    about = note(
        "A LoRA made for the larger model",
        "koala-tiny was distilled from a model of SDXL's layout, as KOALA was from SDXL. The LoRA was trained on that "
        "larger model and knows a colour that koala-tiny does not: cyan. **KOALA LoRA Loader** applies its changes to "
        "the layers that came from those it was trained on. Seven in ten are for layers that koala-tiny lacks, so it "
        "needs a strength of 1.5 and works on some prompts only. Bypass it (Ctrl+B) to compare.",
        BUILT_IN,
    )
    text = Node("KoalaPrompt", {"clip": lora["CLIP"], "positive": "a cyan triangle on a yellow background"})
    latent = empty_latent(SIDE)
    sampling = sampler(lora["MODEL"], text, latent["LATENT"])
    decode, save = decoded(loader, sampling["LATENT"], "koala-tiny-lora")
    return [[about], [loader, lora], [text, latent], [sampling, decode], [save]]


def tiny_controlnet() -> Columns:
    loader = Node("KoalaCheckpointLoader")
    control = Node("KoalaControlNetLoader", {"control_net_name": "built-in koala-tiny-outline"})
    about = note(
        "A ControlNet made for the larger model",
        "The ControlNet was trained on the model of SDXL's layout that koala-tiny was distilled from: it draws a shape "
        "where an outline is. **KOALA ControlNet Loader** moves its residuals to koala-tiny's skip connections.",
        "The first half draws a shape, Canny takes its edges, and the second half fills them, with a prompt that "
        "names no shape. To use your own outline, replace the first half with Load Image.",
        BUILT_IN,
    )
    texts = [prompt(loader, text) for text in ("a white star on a black background", "a blue background")]
    latent = empty_latent(SIDE)
    first = sampler(loader["MODEL"], texts[0], latent["LATENT"])
    start, start_saved = decoded(loader, first["LATENT"], "koala-tiny-outline")
    edges = Node("Canny", {"image": start["IMAGE"]})
    links = {"positive": texts[1]["positive"], "negative": texts[1]["negative"], "image": edges["IMAGE"]}
    applied = Node("ControlNetApplyAdvanced", {**links, "control_net": control["CONTROL_NET"]})
    second = sampler(loader["MODEL"], applied, latent["LATENT"])
    end, end_saved = decoded(loader, second["LATENT"], "koala-tiny-controlled")
    return [
        [about],
        [loader, control, latent],
        texts,
        [first, start],
        [start_saved, edges],
        [applied],
        [second, end],
        [end_saved],
    ]


def tiny_training() -> Columns:
    loader = Node("KoalaCheckpointLoader")
    about = note(
        "Train a LoRA on the canvas",
        "koala-tiny does not know pink. This graph draws white koalas, paints them pink, trains a LoRA on them with "
        "ComfyUI's own **Train LoRA**, and draws the same prompt without and with it. The training takes about a "
        "minute on two CPU cores; a second run keeps it.",
        "**Save LoRA Weights** puts the file into output/loras, where ComfyUI looks for LoRAs, too. Press R, and "
        "**KOALA LoRA Loader** offers it for other graphs; *trained_on: auto* knows that it was trained on KOALA.",
        "For KOALA-700M choose it in the loader, put your own images and captions in place of the painted koalas, and "
        "turn *training_dtype* to bf16.",
        BUILT_IN,
    )
    batch = Node("EmptyLatentImage", {"width": SIDE, "height": SIDE, "batch_size": DRAWINGS})
    drawn = prompt(loader, "a white koala on a black background")
    caption = prompt(loader, "a pink koala on a white background")
    drawing = sampler(loader["MODEL"], drawn, batch["LATENT"])
    drawing.after_run = "fixed"
    shapes = Node("VAEDecode", {"samples": drawing["LATENT"], "vae": loader["VAE"]})
    mask = Node("ImageToMask", {"image": shapes["IMAGE"]})
    pink = Node("EmptyImage", {"width": SIDE, "height": SIDE, "color": PINK})
    paper = Node("EmptyImage", {"width": SIDE, "height": SIDE, "batch_size": DRAWINGS, "color": NEARLY_WHITE})
    layers = {"destination": paper["IMAGE"], "source": pink["IMAGE"], "mask": mask["MASK"]}
    painted = Node("ImageCompositeMasked", layers)
    seen = Node("PreviewImage", {"images": painted["IMAGE"]})
    latents = Node("VAEEncode", {"pixels": painted["IMAGE"], "vae": loader["VAE"]})
    training = Node(
        "TrainLoraNode",
        {
            "model": loader["MODEL"],
            "latents": latents["LATENT"],
            "positive": caption["positive"],
            "batch_size": 4,
            "steps": 80,
            "learning_rate": 0.002,
            "training_dtype": "fp32",
            "lora_dtype": "fp32",
        },
        after_run="fixed",
    )
    curve = Node("LossGraphNode", {"loss": training["loss_map"]})
    kept = Node("SaveLoRA", {"lora": training["lora"], "prefix": "loras/koala-tiny-pink", "steps": training["steps"]})
    trained = Node("LoraModelLoader", {"model": loader["MODEL"], "lora": training["lora"]})
    latent = empty_latent(SIDE)
    before, after = (sampler(model, caption, latent["LATENT"], seed=1) for model in (loader["MODEL"], trained["model"]))
    before_decoded, before_saved = decoded(loader, before["LATENT"], "koala-tiny-before")
    after_decoded, after_saved = decoded(loader, after["LATENT"], "koala-tiny-after")
    return [
        [about],
        [loader, batch],
        [drawn, caption],
        [drawing, shapes, mask],
        [pink, paper],
        [painted, latents],
        [seen],
        [training, latent],
        [curve, kept, trained],
        [before, before_decoded],
        [after, after_decoded],
        [before_saved, after_saved],
    ]
