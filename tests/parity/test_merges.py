"""Weights of another model on a KOALA: merges with an SDXL and SDXL's LoRAs are named, and not sampled or saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.sd
import folder_paths
import pytest
import torch
from comfy_extras.nodes_hooks import CreateHookLora, SetHookKeyframes
from comfy_extras.nodes_model_merging import ModelAdd, ModelMergeBlocks, ModelMergeSimple, ModelSubtract
from safetensors.torch import save_file

from koala_sdxl.host.model import ATTACHMENT
from koala_sdxl.koala.architecture.layout import KOALA_1B, KOALA_700M, KOALA_TINY, SSD_1B
from koala_sdxl.koala.architecture.lineage import lineage
from koala_sdxl.nodes.load import KoalaModelInfo
from koala_sdxl.nodes.lora import KoalaHookLora
from koala_sdxl.nodes.sample import KoalaSampler
from koala_sdxl.nodes.save import KoalaCheckpointSave
from tools.measure import parity, transfer
from tools.synthetic import adapters
from tools.synthetic.adapters import SMALL_SDXL

CUSTOM = {"preset": "custom", "steps": 1, "cfg": 1.0, "spacing": "leading"}
REFUSED = r"^this MODEL has a merge with a model of another layout: \d+ of its \d+ weights have another shape than "
EXTRACT = "Extract and Save Lora"


def merge(model: Any, other: Any, strength: float = 0.5, own: float = 0.5, only: str = "") -> Any:
    """What core's merging nodes leave, all weights at once: one after another they take 20 seconds."""
    merged = model.clone()
    merged.add_patches(other.get_key_patches(f"diffusion_model.{only}"), strength, own)
    return merged


def sampled(model: Any, conditioning: Any = None) -> torch.Tensor:
    positive = conditioning or transfer.conditioning(KOALA_TINY)
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    found = KoalaSampler.execute(model, positive, positive, latent, 0, CUSTOM, "euler", 1.0).result[0]["samples"]
    return torch.as_tensor(found)


def named(model: Any) -> list[str]:
    """What KOALA Model Info says beyond the facts that it says of every model."""
    plain = KoalaModelInfo.execute(parity.tiny_models()[0]).result[0].splitlines()
    return list(KoalaModelInfo.execute(model).result[0].splitlines()[len(plain) :])


def save(model: Any) -> None:
    KoalaCheckpointSave.execute(
        model, {"format": "checkpoint", "filename_prefix": "diffusion_models/merged"}, "default"
    )


def sdxl() -> Any:
    return transfer.pair(KOALA_700M)[0]


def from_a_stock_loader() -> Any:
    """An SDXL MODEL that our loader attached nothing to."""
    plain = sdxl().clone()
    plain.remove_attachments(ATTACHMENT)
    return plain


def koala() -> Any:
    return transfer.pair(KOALA_700M)[1]


MERGES: dict[str, Callable[[], Any]] = {
    "simple": lambda: merge(koala(), sdxl()),
    "subtract": lambda: merge(koala(), sdxl(), -1.0, 1.0),
    "add the difference of two": lambda: merge(koala(), merge(sdxl(), sdxl(), -0.3, 0.3), 1.0, 1.0),
    "the output blocks alone": lambda: merge(koala(), sdxl(), only="output_blocks."),
    "SDXL with KOALA in it": lambda: merge(from_a_stock_loader(), koala()),
}


@pytest.mark.parametrize("kind", MERGES)
def test_a_merge_with_an_sdxl_is_refused(kind: str) -> None:
    merged = MERGES[kind]()
    with pytest.raises(ValueError, match=REFUSED) as caught:
        sampled(merged)
    assert EXTRACT in str(caught.value)
    assert "KOALA LoRA Loader" in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in MERGES if kind != "SDXL with KOALA in it"])
def test_such_a_merge_is_named_and_not_saved(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    merged = MERGES[kind]()
    (line,) = named(merged)
    assert line.startswith("a merge with a model of another layout: ")
    assert EXTRACT in line
    with pytest.raises(ValueError, match=REFUSED):
        save(merged)
    assert list(tmp_path.rglob("*.safetensors")) == []


@pytest.mark.parametrize("node", [ModelMergeSimple, ModelSubtract, ModelAdd, ModelMergeBlocks])
def test_cores_nodes_themselves(node: Any) -> None:
    """On as many weights as are needed to see it: each takes a copy of all names."""
    few = [key for key in sdxl().get_key_patches("diffusion_model.") if ".transformer_blocks.0.attn1.to_q." in key]

    class Few:
        """An SDXL MODEL that has a few of its weights to give."""

        def get_key_patches(self, prefix: str) -> dict[str, Any]:
            return {key: patch for key, patch in sdxl().get_key_patches(prefix).items() if key in few}

    arguments: dict[Any, Any] = {ModelAdd: {}, ModelSubtract: {"multiplier": 0.5}, ModelMergeSimple: {"ratio": 0.5}}
    ratios = {"input": 0.5, "middle": 0.5, "out": 0.5}
    merged = node().merge(koala(), Few(), **arguments.get(node, ratios))[0]
    assert merged.patches
    with pytest.raises(ValueError, match=REFUSED):
        sampled(merged)


def test_a_merge_with_another_compact_model_is_refused(tmp_path: Path) -> None:
    ssd = transfer.model(transfer.small(SSD_1B), adapters.unet(transfer.small(SSD_1B)), tmp_path)
    with pytest.raises(ValueError, match=REFUSED):
        sampled(merge(koala(), ssd))


def test_koalas_can_be_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One KOALA-700M with another, and with a 1B, whose blocks of the same name have the same origin."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    weights = lineage(transfer.small(KOALA_700M)).cut(adapters.unet(SMALL_SDXL, seed=7), "comfy")
    other = transfer.model(transfer.small(KOALA_700M), weights, tmp_path)
    for merged in (merge(koala(), other), merge(koala(), transfer.pair(KOALA_1B)[1])):
        assert named(merged) == []
        assert not sampled(merged).isnan().any()
    save(merge(koala(), other))
    assert list(tmp_path.rglob("merged*.safetensors"))
    whole = merge(from_a_stock_loader(), sdxl())
    assert sampled(whole).shape == (1, 4, 16, 16)


# --- LoRAs --------------------------------------------------------------------------------------------------------


def test_sdxls_lora_from_the_stock_loader_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    stock, _ = comfy.sd.load_lora_for_models(koala(), None, adapters.lora(SMALL_SDXL), 1.0, 0.0)
    for use in (sampled, save):
        with pytest.raises(
            ValueError, match=r"^this MODEL has a LoRA with \d+ modules of another shape than koala-tiny"
        ):
            use(stock)
    own, _ = comfy.sd.load_lora_for_models(koala(), None, adapters.lora(KOALA_TINY), 1.0, 0.0)
    assert named(own) == []
    assert not torch.equal(sampled(own), sampled(koala()))


def test_other_models_loras_are_not_ours_to_judge() -> None:
    """KOALA Sampler samples any model with custom settings; ComfyUI warns of what does not match."""
    odd, _ = comfy.sd.load_lora_for_models(from_a_stock_loader(), None, adapters.lora(KOALA_TINY), 1.0, 0.0)
    assert sampled(odd).shape == (1, 4, 16, 16)


@pytest.mark.parametrize("kind", ["LoCon with mid", "LoHa", "LoKr", "LoKr, low rank", "DoRA", "whole differences"])
def test_of_any_kind(kind: str) -> None:
    stock, _ = comfy.sd.load_lora_for_models(koala(), None, adapters.lora(SMALL_SDXL, kind), 1.0, 0.0)
    with pytest.raises(ValueError, match=r"modules of another shape than koala-tiny"):
        sampled(stock)
    own, _ = comfy.sd.load_lora_for_models(koala(), None, adapters.lora(KOALA_TINY, kind), 1.0, 0.0)
    assert named(own) == []


def hooked(hooks: Any) -> Any:
    (text, entry), *_ = transfer.conditioning(KOALA_TINY)
    return [[text, {**entry, "hooks": hooks}]]


def stock_hook(state: dict[str, torch.Tensor], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors"}))
    save_file(state, folder / "some.safetensors")
    (hooks,) = CreateHookLora().create_hook("some.safetensors", 1.0, 0.0)
    return hooks


@pytest.mark.parametrize("naming", ["kohya, LDM blocks", "kohya, diffusers blocks", "SGM", "diffusers, PEFT"])
def test_sdxls_lora_by_cores_hook_is_refused(naming: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = stock_hook(adapters.lora(SMALL_SDXL, "LoRA", naming), tmp_path, monkeypatch)
    with pytest.raises(
        ValueError, match=r"^the conditioning has a hook with a LoRA of another model than koala-tiny: "
    ):
        sampled(koala(), hooked(hooks))
    with pytest.raises(ValueError, match=r"Put KOALA Create Hook LoRA in place of Create Hook LoRA"):
        sampled(koala(), hooked(SetHookKeyframes().set_hook_keyframes(hooks, None)[0]))


def test_part_of_sdxl_by_cores_hook_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All shapes match, and some of the names have no layer: the others are other layers'."""
    whole = adapters.lora(SMALL_SDXL)
    part = {key: value for key, value in whole.items() if "output_blocks_0_1_" in key or "output_blocks_1_1_" in key}
    hooks = stock_hook(part, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"hook with a LoRA of another model .*layers that it lacks"):
        sampled(koala(), hooked(hooks))


def test_koalas_lora_by_cores_hook_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = stock_hook(adapters.lora(KOALA_TINY), tmp_path, monkeypatch)
    assert not torch.equal(sampled(koala(), hooked(hooks)), sampled(koala()))


def test_sdxls_lora_by_our_hook_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    save_file(adapters.lora(SMALL_SDXL), tmp_path / "some.safetensors")
    hooks = KoalaHookLora.execute(koala(), "some.safetensors", 1.0, 0.0, "auto").result[0]
    assert not torch.equal(sampled(koala(), hooked(hooks)), sampled(koala()))


def test_another_models_weights_as_a_hook_are_refused(tmp_path: Path) -> None:
    """As Create Hook Model as LoRA makes it of a checkpoint."""
    weights = {key: patch[0][0] for key, patch in sdxl().get_key_patches("diffusion_model.").items()}
    hooks = comfy.hooks.create_hook_model_as_lora(
        weights_model=weights, weights_clip={}, strength_model=0.5, strength_clip=0
    )
    with pytest.raises(ValueError, match=r"^the conditioning has a hook with weights of another model than koala-tiny"):
        sampled(koala(), hooked(hooks))
