"""Models that KOALA LoRA from SDXL learns from in tests: koala-tiny, and an SDXL that it might have been cut out of."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sd
import torch

from koala_sdxl.host.learning.network import Network, weights
from koala_sdxl.host.learning.samples import Samples, encoded, predictions
from koala_sdxl.koala.architecture.keys import renaming
from koala_sdxl.koala.architecture.layout import KOALA_TINY
from koala_sdxl.koala.architecture.lineage import lineage
from tools.measure import parity, reference, transfer
from tools.synthetic import adapters
from tools.tiny import SHIPPED
from tools.tiny.grow import SDXL_TINY, grown

LINE = lineage(KOALA_TINY)
LITTLE = 0.1
"""What the layers that koala-tiny lacks add, as a share of what they would with PyTorch's initial weights."""
PROMPTS = [f"a star on a {colour} background" for colour in ("red", "green", "blue", "yellow")]
PROMPTS.insert(1, "a koala, " * 40)  # longer than 77 tokens
PRESET = {"preset": "custom", "steps": 10, "cfg": 5.0, "spacing": "leading"}
FEW: dict[str, Any] = {"prompts": "\n".join(PROMPTS), "preset": PRESET, "rank": 4, "samples": 20, "size": 64, "seed": 3}


class Given(NamedTuple):
    """The models of a run."""

    sdxl: Any
    sdxl_changed: Any
    koala: Any
    clip: Any
    clip_changed: Any


def change() -> adapters.State:
    """A LoRA whose effect is not mostly that of layers which koala-tiny lacks."""
    kept = {adapters.NAMINGS["kohya, LDM blocks"].module(whole) for _, whole in LINE.tensors}
    texts = adapters.text_lora(2, 32, 128, "lora_te1") | adapters.text_lora(2, 64, 256, "lora_te2")
    made = adapters.lora(SDXL_TINY, "LoRA", "kohya, LDM blocks", only=adapters.in_attention) | texts

    def strength(name: str) -> float:
        weak = name.startswith("lora_te") or name.partition(".")[0] in kept
        return 1.0 if "lora_up" not in name else 0.3 if weak else 1.5

    return {name: value * strength(name) for name, value in made.items()}


def models(folder: Path) -> Given:
    """An SDXL, which is written to a folder, without a LoRA and with it, and koala-tiny."""
    koala, clip, _ = parity.tiny_models()
    names = renaming(SDXL_TINY, "diffusers", "comfy")
    state = grown(reference.pipeline(SHIPPED).unet.state_dict(), LITTLE)
    unet = {names[name]: weight.contiguous() for name, weight in state.items()}
    sdxl = transfer.model(SDXL_TINY, unet, folder)
    model, text = comfy.sd.load_lora_for_models(sdxl, clip, change(), 1.0, 1.0)
    return Given(sdxl, model, koala, clip, text)


class unchanged:  # noqa: N801
    """Nothing of the models is another one behind this than before: weights, patches, options; nor PyTorch's modes."""

    def __init__(self, given: Given) -> None:
        self.given = given

    def __enter__(self) -> None:
        comfy.model_management.unload_all_models()
        self.before = self._state()

    def __exit__(self, *_: object) -> None:
        comfy.model_management.unload_all_models()
        now = self._state()
        for old, new in zip(self.before, now, strict=True):
            assert old.keys() == new.keys()
            assert [name for name in old if not _equal(old[name], new[name])] == []

    def _state(self) -> list[dict[str, Any]]:
        modes = {
            "inference": torch.is_inference_mode_enabled(),
            "grad": torch.is_grad_enabled(),
            "tf32": torch.backends.cudnn.allow_tf32,
        }
        return [modes, *map(_of_model, self.given[:3])]


def _of_model(model: Any) -> dict[str, Any]:
    weights = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    network = model.model.diffusion_model
    return {
        **weights,
        "patches": {name: len(patches) for name, patches in model.patches.items()},
        "uuid": model.patches_uuid,
        "options": repr(model.model_options),
        "wrappers": repr(model.wrappers),
        "grad": any(weight.requires_grad for weight in network.parameters()),
        "hooks": sum(len(module._forward_hooks) for module in network.modules()),
    }


def _equal(old: Any, new: Any) -> bool:
    return torch.equal(old, new) if isinstance(old, torch.Tensor) else bool(old == new)


def samples(texts: list[Any]) -> Samples:
    """Four noisy latents, each with one of the texts."""
    generator = torch.Generator().manual_seed(1)
    sigma = torch.tensor([0.3, 1.0, 3.0, 10.0])
    noisy = torch.randn(4, 4, 8, 8, generator=generator) * (1 + sigma.square()).sqrt().view(-1, 1, 1, 1)
    return Samples(noisy, sigma, torch.tensor([0, 1, len(texts) - 1, 2]))


def require_fitted_as_sampled(koala: Any, clip: Any) -> None:
    """The network that is fitted predicts what the MODEL that is sampled predicts."""
    texts = encoded(clip, PROMPTS)
    seen = samples(texts)
    with torch.no_grad():
        clean = predictions(koala, texts, seen, lambda images: None)
    wanted = (seen.noisy - clean) / seen.sigma.view(-1, 1, 1, 1) * weights(seen.sigma)
    with torch.inference_mode(False), torch.no_grad():
        network = Network(koala)
        found = network.output(seen, network.conditions(texts, seen))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in network.unet.parameters())
