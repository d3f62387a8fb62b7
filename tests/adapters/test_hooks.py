"""The same files by KOALA Create Hook LoRA: sampled, they give what the loader's MODEL gives."""

from __future__ import annotations

from pathlib import Path

import comfy.hooks
import folder_paths
import pytest
import torch

from koala_sdxl.host.transfer.lora import apply_lora
from koala_sdxl.koala.architecture.layout import KOALA_700M
from koala_sdxl.nodes.lora import KoalaHookLora
from tools.measure import transfer
from tools.measure.transfer.libraries.compare import written
from tools.measure.transfer.libraries.kinds import KINDS
from tools.measure.transfer.libraries.sdxl import Kind

HOOKED = (
    "peft, rsLoRA",
    "peft, DoRA",
    "diffusers, LoRA with text encoders",
    "lycoris-lora, LoHa, Tucker",
    "lycoris-lora, OFT, rescaled",
    "lycoris-lora, norms",
)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if str(kind) in HOOKED], ids=str)
def test_a_hook_does_what_the_loader_does(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = folder_paths.folder_names_and_paths
    monkeypatch.setitem(known, "loras", ([str(tmp_path)], known["loras"][1]))
    path, _ = written(kind, tmp_path)
    model, layout = transfer.pair(KOALA_700M)[1], transfer.small(KOALA_700M)
    with torch.inference_mode(), transfer.warnings_of_host() as said:
        loaded = apply_lora(model, transfer.clip(), path, 0.7, 1.0)
        hooks, report = KoalaHookLora.execute(model, path.name, 0.7, 1.0, "auto").result
        hooked = comfy.hooks.set_hooks_for_conditioning(transfer.conditioning(layout), hooks)
        found = transfer.sample(model, hooked, steps=2)
        wanted = transfer.sample(loaded.model, transfer.conditioning(layout), steps=2)
        plain = transfer.sample(model, transfer.conditioning(layout), steps=2)
    assert (wanted - plain).abs().max() > 0.01
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert f"{loaded.plan.count('applied')} applied" in report
    assert said == []


def test_every_hooked_kind_is_one_of_the_table() -> None:
    assert set(HOOKED) <= {str(kind) for kind in KINDS}
