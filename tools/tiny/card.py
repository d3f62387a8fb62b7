"""The model card's text around the measured figures."""

from typing import Any

from koala_sdxl.koala.architecture.components import LATENT_SCALE
from tools.tiny import CONTROLNET, LORA, autoencoder, denoiser, text
from tools.tiny.pictures import COLOUR_NAMES, SHAPE_NAMES, TEMPLATES


def write(figures: dict[str, Any], stem: str, distilled: dict[str, Any] | None) -> str:
    """Markdown; `figures` as `tools.tiny.evaluate` measures them, `stem` of the pictures beside the card, `distilled`
    what the file says of its U-Net's distillation."""
    ours, judge, red = figures["prompts"], figures["judge"], figures["negative_red"]
    by_shape = "\n".join(f"| {name} | {share:.0f} % |" for name, share in ours["shape_by_name"].items())
    by_colour = "\n".join(f"| {name} | {share:.0f} % |" for name, share in ours["colour_by_name"].items())
    templates = "\n".join(f"- {share:.0%}: `{template}`" for share, template, _ in TEMPLATES)
    unsure = f"{figures['unsure']} of the {ours['n']}"
    red_pixels = f"fall from {red['without']:.2f} % to {red['with_red']:.2f} %"
    first, second, third = autoencoder.Recipe(), text.Recipe(), denoiser.Recipe()
    early = f" (and, early, {third.small_size} px)" if distilled is None else ""
    return f"""# koala-tiny

A text-to-image model of 28 MB that draws a coloured shape on a coloured background. It has KOALA-700M's layout exactly
(one layer a block, transformer depths 0, 2, 5, no middle block, SDXL's two text encoders and added conditioning) at a
tenth of its width, so every graph made for KOALA can be tried and tested with it on any machine. It is for that, not
for art.

![Pictures for 72 prompts, each a shape, a colour and a background]({stem}-sheet.png)

## Use

Prompts like "a gray koala on a green background". {third.size} x {third.size} pixels, 25 steps, cfg 7.5, Euler,
leading spacing: KOALA's published base settings. Shapes: {", ".join(SHAPE_NAMES)}.
Colours: {", ".join(COLOUR_NAMES)}. Parts may be left out ("a star",
"a koala on a red background", "red"); a negative prompt works.

## Measured

By `python -m tools.tiny.evaluate`: {ours["n"]} prompts, one seed each, diffusers' SDXL pipeline in float32 at the
settings above. The judge reads pixels alone; on {judge["n"]} fresh drawings it is right in
{judge["shape"]:.1f} % (shape), {judge["colour"]:.1f} % (shape's colour) and {judge["background"]:.1f} % (background).
The three are judged apart. A blob that overlaps no shape by at least 70 % counts as a wrong shape ({unsure}).

| right | share |
|---|---|
| shape's colour | {ours["colour"]:.1f} % |
| background | {ours["background"]:.1f} % |
| shape | {ours["shape"]:.1f} % |
| all three | {ours["all"]:.1f} % |

| shape asked for | shape right |
|---|---|
{by_shape}

| shape's colour asked for | colour right |
|---|---|
{by_colour}

Negative prompt "red" on {red["n"]} pictures of prompts that name no colour, same seeds with and without: red
pixels {red_pixels} (paired sign-flip test, one-sided: p = {red["p"]:.5f}).

![Without (above) and with the negative prompt "red" (below)]({stem}-negative-red.png)

The autoencoder alone gives fresh drawings back at {figures["autoencoder_db"]:.1f} dB.
{"" if distilled is None else ADDONS}
## Data

Our own drawings, made by `tools/tiny/pictures.py` while training; nothing else. Shape, its colour, background (of
another colour), size and place are uniformly random. Captions:

{templates}

The last one is the empty caption; besides, {third.drop:.0%} of all captions are replaced by zeros, which is
what an empty negative prompt means to an SDXL base model.

## Training

`python3 dev.py train-tiny` makes a model like this one{"" if distilled is None else ", with another U-Net"}: fixed
seeds, on two CPU cores, under two hours. Three stages:

1. Autoencoder (x8, 4 channels): {first.crop_steps} steps on {first.crop} px windows, then {first.whole_steps}
   on whole pictures. Latents are standardised to SDXL's scaling factor {LATENT_SCALE}.
2. Text encoders (32 and 64 wide, 3 layers each, CLIP's tokenizer): {second.steps} steps as
   classifiers of what a caption says, half of the captions among random words; then frozen.
{_from_nothing(third) if distilled is None else _distilled(distilled)}

The shipped weights come from runs that were stopped and continued with changed step counts: the commands make a model
like this one, not the same bytes. All weights are stored in fp16.

## Limits

- It knows the words above and no others; other words are ignored at best.
- One shape a picture, in the flat colours above. Shapes lie near the middle and fill about half of the picture.
- Trained at {third.size} px{early}: other sizes give stray shapes and colours.
- Outlines are softer and less even than the drawings', koalas' faces most of all; mistakes remain at the shares above.
- The figures hold for these prompts and settings; few-step sampling is not measured.

## Licence

Apache-2.0, like the code. Weights and drawings are our own; the tokenizer is CLIP's (MIT) and is not in the file.
"""


ADDONS = f"""
Beside it lie a LoRA ({LORA.stem}) and a ControlNet ({CONTROLNET.stem}) that were trained on
sdxl-tiny, its teacher, as those for SDXL are; two example workflows carry them over. `docs/distillation.md` in the
source has how well that goes.
"""


def _from_nothing(recipe: denoiser.Recipe) -> str:
    return f"""3. U-Net (7.4 M parameters): {recipe.small_steps} steps on {recipe.small_drawings} drawings of
   {recipe.small_size} px, then {recipe.steps} on {recipe.drawings} of {recipe.size} px, batch {recipe.batch}, koalas
   {recipe.koalas:g} times as often as other shapes; noise prediction with the loss weighted towards strong noise;
   averaged weights."""


def _distilled(told: dict[str, Any]) -> str:
    """``told``: see koala_sdxl.distill.result.metadata."""
    return f"""3. U-Net (7.4 M parameters): cut out of {told["teacher"]}, which has SDXL's layout at this width, and
   distilled from it as KOALA was from SDXL: {told["steps"]} steps of {told["images_a_step"]} drawings, with the
   errors of the noise, of the teacher's answer and of its {told["loss"]["place"]} features. `docs/distillation.md`
   in the source shows how, and against what; `python3 dev.py distill-study --only curve` does it again."""
