"""What is said of a loaded model."""

from __future__ import annotations

from pathlib import Path

import pytest

from koala_sdxl.koala.architecture.layout import KOALA_1_7B, KOALA_1B, KOALA_700M, KOALA_TINY, Layout
from koala_sdxl.koala.files.inspect import inspect_model
from koala_sdxl.koala.model_info import assumed_facts
from koala_sdxl.koala.model_report import badge, report
from koala_sdxl.koala.releases import BASE, LIGHTNING, SCHEDULER_CONFIG
from tests.unit import files
from tests.unit.translatable import english_only


@pytest.mark.parametrize(("layout", "percent"), [(KOALA_700M, 30), (KOALA_1B, 45), (KOALA_1_7B, 67)])
def test_share_of_sdxl(layout: Layout, percent: int) -> None:
    assert round(assumed_facts(layout, "fp16", 0).percent_of_sdxl) == percent


def test_report_of_a_lightning_file(tmp_path: Path) -> None:
    path = files.write(tmp_path / "koala-lightning-1b.safetensors", files.unet(KOALA_1B))
    facts = inspect_model(path).facts(path.name)
    assert facts.settings == LIGHTNING.settings
    assert facts.scheduler == SCHEDULER_CONFIG
    assert english_only(report(facts, "bf16", 2_000_000)) == english_only(badge(facts)) == []
    assert report(facts, "bf16", 2_000_000).splitlines() == [
        "KOALA-1B from koala-lightning-1b.safetensors",
        "U-Net: 1,161,184,324 parameters, 45 % of SDXL's 2,567,463,684",
        "weights: fp16, 2,322 MB; in memory bf16, 2 MB",
        'variant: lightning. The name "koala-lightning-1b.safetensors" says so.',
        "recommended: 10 steps, cfg 3.5, trailing, sampler euler, 1024 x 1024 px",
    ]


def test_report_of_an_assumed_variant_says_so(tmp_path: Path) -> None:
    path = files.write(tmp_path / "unet.safetensors", files.unet(KOALA_700M), "F32")
    text = report(inspect_model(path).facts("unet.safetensors"), "fp16", 1_565_645_448)
    assert "weights: fp32, 3,131 MB; in memory fp16, 1,566 MB" in text
    assert "variant: base (assumed). Nothing in the file tells" in text
    assert "recommended: 25 steps, cfg 7.5, leading, sampler euler, 1024 x 1024 px" in text


def test_report_of_the_built_in_model(tmp_path: Path) -> None:
    path = files.write(tmp_path / "t.safetensors", files.unet(KOALA_TINY), metadata={"koala.variant": "base"})
    text = report(inspect_model(path).facts("koala-tiny.safetensors"), "fp32", 0)
    assert text.startswith("koala-tiny from koala-tiny.safetensors")
    assert "128 x 128 px" in text
    assert "0.3 % of SDXL" in text
    assert 'variant: base. Its metadata says so: koala.variant is "base".' in text


def test_facts_of_a_model_from_another_loader() -> None:
    facts = assumed_facts(KOALA_1B, "bfloat16", 2_322_368_648)
    assert (facts.layout, facts.identity.variant, facts.identity.certain) == (KOALA_1B, BASE, False)
    text = report(facts, "bfloat16", 2_322_368_648)
    assert "another loader" in text
    assert "(assumed)" in text
    assert english_only(text) == []
    assert "weights: bfloat16, 2,322 MB" in text
