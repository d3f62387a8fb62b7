"""Stage 2: the two text encoders, trained on their own to represent the content of a caption.

Both have CLIP's architecture at a fraction of its width, with CLIP's own tokenizer. They are trained as classifiers
(shape, colours, "not mentioned") through temporary linear heads, then frozen, so that the U-Net's training uses
precomputed embeddings.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from koala_sdxl.distill.single_file import tokenizers as tokenizers
from tools.tiny import checkpoints
from tools.tiny.pictures import COLOUR_NAMES, SHAPE_NAMES, Caption, random_captions, random_drawings

STAGE = 2
LENGTH = 77
END = 49407
FIELDS = {"colour": len(COLOUR_NAMES), "background": len(COLOUR_NAMES), "shape": len(SHAPE_NAMES)}
FIELDS["anywhere"] = len(COLOUR_NAMES)


@dataclass(frozen=True)
class Recipe:
    """filler: share of captions surrounded by up to max_filler random words on each side, so that unknown words (those
    of a style, for example) do not drown out the known ones."""

    steps: int = 400
    batch: int = 64
    learning_rate: float = 3e-3
    filler: float = 0.5
    max_filler: int = 12


def _config(hidden: int, activation: str, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        projection_dim=projection,
        num_hidden_layers=3,
        num_attention_heads=max(1, hidden // 64),  # the rule by which loaders derive the number of heads from shapes
        max_position_embeddings=LENGTH,
        hidden_act=activation,
        bos_token_id=49406,
        eos_token_id=END,
        pad_token_id=END,
    )


class Encoders(nn.Module):
    """SDXL's pair: CLIP-L-like (32 wide) and CLIP-G-like (64 wide, with projection)."""

    def __init__(self, first: CLIPTextModel | None = None, second: CLIPTextModelWithProjection | None = None) -> None:
        """With the given models, or new ones with random weights."""
        super().__init__()
        self.l = first or CLIPTextModel(_config(32, "quick_gelu", 32))
        self.g = second or CLIPTextModelWithProjection(_config(64, "gelu", 64))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens: int64 [n, 77], padded with the end token -> context [n, 77, 96], pooled [n, 64], as SDXL's pipeline
        in diffusers computes them: each encoder's last layer but one, and the projection of G's end token."""
        context_l = self.l(tokens, output_hidden_states=True).hidden_states[-2]
        g = self.g(pad_with_zeros(tokens), output_hidden_states=True)
        return torch.cat([context_l, g.hidden_states[-2]], dim=-1), g.text_embeds


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """int64 [n, 77]: start, words, end, then the end token as padding."""
    return tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


def pad_with_zeros(tokens: torch.Tensor) -> torch.Tensor:
    """The same tokens with everything after the first end token zero, as SDXL pads CLIP-G."""
    ended = (tokens == END).cumsum(1)
    return tokens.masked_fill(ended > 1, 0)


def add_filler(tokens: torch.Tensor, most: int, generator: torch.Generator) -> torch.Tensor:
    """Each row of tokens [n, 77] with 0 to `most` random words before it and as many after it."""
    rows = []
    for row in tokens:
        words = row[1 : int((row == END).nonzero()[0])]
        before, after = torch.randint(most + 1, (2,), generator=generator).tolist()
        filler = torch.randint(256, 49406, (before + after,), generator=generator)
        words = torch.cat([filler[:before], words, filler[before:]])[: LENGTH - 2]
        padding = torch.full((LENGTH - 1 - len(words),), END)
        rows.append(torch.cat([row[:1], words, padding]))
    return torch.stack(rows)


def _answers(captions: list[Caption]) -> dict[str, torch.Tensor]:
    """The class of each field of each caption; the last class is "not mentioned"."""
    return {
        field: torch.tensor([count if (value := getattr(c, field)) is None else value for c in captions])
        for field, count in FIELDS.items()
    }


def train(recipe: Recipe, tokenizer: CLIPTokenizer, seed: int, path: Path, log: Callable[[str], None]) -> Encoders:
    """Train, or resume from the checkpoint at `path`; returns the encoders in eval mode with weights exact in fp16."""
    torch.manual_seed(seed)
    model = Encoders()
    classes = sum(count + 1 for count in FIELDS.values())
    heads = nn.ModuleDict({"context": nn.Linear(96, classes), "pooled": nn.Linear(64, classes)})
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    start = 0
    if path.exists():
        state = checkpoints.load(path)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    for step in range(start, recipe.steps):
        generator = checkpoints.step_generator(seed, STAGE, step)
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 50)
            group["lr"] = recipe.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / recipe.steps))
        captions = random_captions(random_drawings(recipe.batch, generator), generator)
        tokens = tokenize(tokenizer, [c.text for c in captions])
        noisy = int(recipe.batch * recipe.filler)
        tokens = torch.cat([tokens[noisy:], add_filler(tokens[:noisy], recipe.max_filler, generator)])
        captions = captions[noisy:] + captions[:noisy]
        loss, right = _loss(model, heads, tokens, _answers(captions))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            log(f"text {step + 1}/{recipe.steps} loss={float(loss.detach()):.4f} right={right:.3f}")
        if (step + 1) % 200 == 0 or step + 1 == recipe.steps:
            state = {"model": model.state_dict(), "heads": heads.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoints.save({**state, "step": step + 1}, path)
    # ComfyUI keeps text encoders in fp16, which must not change them.
    return model.half().float().eval()


def _loss(
    model: Encoders, heads: nn.ModuleDict, tokens: torch.Tensor, answers: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, float]:
    context, pooled = model(tokens)
    # Attention is causal: every position from the end token on has seen the whole caption.
    complete = (tokens == END).cumsum(1) > 0
    row = complete.nonzero()[:, 0]
    loss = torch.zeros(())
    right = torch.ones(len(tokens), dtype=torch.bool)
    sizes = [count + 1 for count in FIELDS.values()]
    logits_context = heads["context"](context[complete]).split(sizes, dim=-1)
    logits_pooled = heads["pooled"](pooled).split(sizes, dim=-1)
    for of_context, of_pooled, answer in zip(logits_context, logits_pooled, answers.values(), strict=True):
        loss = loss + functional.cross_entropy(of_context, answer[row]) + functional.cross_entropy(of_pooled, answer)
        right &= of_pooled.argmax(1) == answer
    # The U-Net expects inputs of about unit spread.
    for part in (context[..., :32], context[..., 32:], pooled):
        loss = loss + 0.1 * part.std().log() ** 2
    return loss, float(right.float().mean())


@torch.no_grad()
def encode(model: Encoders, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Context [n, 77, 96] and pooled [n, 64] of tokens [n, 77]."""
    parts = [model(part.to(model.g.device)) for part in tokens.split(128)]
    return torch.cat([c.cpu() for c, _ in parts]), torch.cat([p.cpu() for _, p in parts])
