"""Published settings, releases, variants and styles."""

from __future__ import annotations

import pytest

from koala_sdxl.koala.architecture.layout import KOALA_1_7B, KOALA_1B, KOALA_700M, KOALA_TINY, Layout, compact
from koala_sdxl.koala.releases import (
    BASE,
    LIGHTNING,
    RELEASES,
    SCHEDULER_CONFIG,
    VARIANTS,
    Variant,
    identify,
    release_for,
)
from koala_sdxl.koala.styles import STYLES


@pytest.mark.parametrize(
    ("variant", "text"), [(BASE, "25 steps, cfg 7.5, leading"), (LIGHTNING, "10 steps, cfg 3.5, trailing")]
)
def test_published_settings(variant: Variant, text: str) -> None:
    assert str(variant.settings) == text
    assert variant.settings.size == 1024
    assert VARIANTS[variant.name] is variant


@pytest.mark.parametrize(
    ("name", "layout", "variant"),
    [
        ("koala-700m", KOALA_700M, BASE),
        ("koala-700m-llava-cap", KOALA_700M, BASE),
        ("koala-1b", KOALA_1B, BASE),
        ("koala-1b-llava-cap", KOALA_1B, BASE),
        ("koala-lightning-700m", KOALA_700M, LIGHTNING),
        ("koala-lightning-1b", KOALA_1B, LIGHTNING),
        ("koala-lightning-1.7b", KOALA_1_7B, LIGHTNING),
    ],
)
def test_a_release_is_found_by_its_name(name: str, layout: Layout, variant: Variant) -> None:
    for written in (name, name.upper(), f"my-{name}-fp16.safetensors"):
        release = release_for(KOALA_700M, written)
        assert (release.name, release.layout, release.variant) == (name, layout, variant)


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (KOALA_700M, "koala-700m"),
        (KOALA_1B, "koala-1b"),
        (KOALA_1_7B, "koala-lightning-1.7b"),
        (KOALA_TINY, "koala-700m"),
        (compact(3, middle=False), "koala-700m"),
    ],
)
def test_a_release_is_found_by_its_layout(layout: Layout, name: str) -> None:
    assert release_for(layout, "unet.safetensors").name == name


def test_addresses() -> None:
    release = release_for(KOALA_1B)
    assert release.url() == "https://huggingface.co/etri-vilab/koala-1b"
    assert release.url("vae/config.json") == "https://huggingface.co/etri-vilab/koala-1b/resolve/main/vae/config.json"
    assert len({release.name for release in RELEASES}) == len(RELEASES) == 7


@pytest.mark.parametrize(
    ("metadata", "scheduler", "origin", "file", "variant", "certain"),
    [
        ({"koala.variant": "base"}, {"timestep_spacing": "trailing"}, "lightning", "lightning", BASE, True),
        ({}, {"timestep_spacing": "trailing"}, "", "koala-700m", LIGHTNING, True),
        ({}, {"timestep_spacing": "leading"}, "", "koala-lightning-1b", LIGHTNING, True),
        ({}, {}, "./pt_SDXL_Lightning/x", "koala-700m", LIGHTNING, True),
        ({}, {}, "", "KOALA-Lightning-700M.safetensors", LIGHTNING, True),
        ({}, {}, "./pt_koala/x", "koala-1b.safetensors", BASE, True),
        ({}, {"timestep_spacing": "leading"}, "", "unet.safetensors", BASE, False),
        ({"koala.variant": "turbo"}, {}, "", "unet.safetensors", BASE, False),
    ],
)
def test_order_of_evidence(
    metadata: dict[str, str], scheduler: dict[str, object], origin: str, file: str, variant: Variant, certain: bool
) -> None:
    identity = identify(metadata, scheduler, origin, file)
    assert (identity.variant, identity.certain) == (variant, certain)
    assert identity.evidence


def test_scheduler_config_is_sdxls() -> None:
    assert SCHEDULER_CONFIG["prediction_type"] == "epsilon"
    assert (SCHEDULER_CONFIG["timestep_spacing"], SCHEDULER_CONFIG["steps_offset"]) == ("leading", 1)
    assert (SCHEDULER_CONFIG["beta_start"], SCHEDULER_CONFIG["beta_end"]) == (0.00085, 0.012)


def test_the_demos_ten_styles() -> None:
    assert list(STYLES) == [
        *("no style", "Cinematic", "Photographic", "Anime", "Manga"),
        *("Digital Art", "Pixel art", "Fantasy art", "Neonpunk", "3D Model"),
    ]
    assert all(style.positive.count("{prompt}") == 1 for style in STYLES.values())
    assert all("{" not in style.negative for style in STYLES.values())


def test_no_style_changes_nothing() -> None:
    assert STYLES["no style"].apply("a {koala}", "worst quality") == ("a {koala}", "worst quality")
    assert STYLES["no style"].apply("", "") == ("", "")


@pytest.mark.parametrize("style", list(STYLES)[1:])
def test_a_style_keeps_the_persons_words(style: str) -> None:
    positive, negative = STYLES[style].apply("a koala {with} braces", "  red ")
    assert "a koala {with} braces" in positive
    assert "{prompt}" not in positive
    assert len(positive) > len("a koala {with} braces")
    assert negative == f"{STYLES[style].negative},   red "  # diffusers, too, encodes a prompt as it was written
    assert STYLES[style].apply("x", " ")[1] == STYLES[style].negative
