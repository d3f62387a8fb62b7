"""`dev.py carry` with a ControlNet: its last convolutions learned anew for a KOALA, and what cannot be used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from koala_sdxl.distill.carry import control, hints, run, source
from koala_sdxl.distill.carry.job import Job
from koala_sdxl.distill.carry.samples import drawn
from koala_sdxl.distill.carry.settings import digest
from koala_sdxl.distill.errors import UserError
from koala_sdxl.koala.architecture.control_keys import control_tensors
from koala_sdxl.koala.architecture.layout import KOALA_TINY
from koala_sdxl.koala.architecture.lineage import lineage
from koala_sdxl.koala.files.control_weights import open_control
from koala_sdxl.koala.files.conventions import CARRY_KEY
from koala_sdxl.koala.files.header import CheckpointError
from tests.dev import carry_runs
from tests.dev.carry_runs import carried, outlines_in, settings
from tools.harness import assets, inprocess
from tools.synthetic import adapters
from tools.tiny import denoiser
from tools.tiny.grow import SDXL_TINY

CONTROL = adapters.shallow(adapters.SMALL_SDXL)
SKIPS = (0, 2, 3, 5, 6, 8)
LEARNED = {f"zero_convs.{skip}.0.{part}" for skip in SKIPS for part in ("weight", "bias")}
LACKED = ("zero_convs.1.", "zero_convs.4.", "zero_convs.7.", "middle_block_out.")
"""The residuals that koala-tiny has no place for."""
STRONGER = 8.0
"""Those do little in an SDXL that was grown out of koala-tiny: so many times more, and there is something to learn."""
SHORT = {"samples": 8, "batch": 8, "steps": 10}
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of ``carry_runs.place`` with a ControlNet that follows outlines, and outlines for it."""
    made = carry_runs.place(tmp_path_factory)
    folder = next(made)
    state = load_file(assets.CONTROLNET)
    stronger = {name: STRONGER * tensor for name, tensor in state.items() if name.startswith(LACKED)}
    save_file(state | stronger, folder / "control.safetensors", {"author": "someone"})
    outlines_in(folder / "outlines", 8)
    yield folder
    next(made, None)


def given(place: Path, **changes: Any) -> dict[str, Any]:
    """The settings of a small run; a test names only what it changes."""
    return {"lora": place / "control.safetensors", "hints": place / "outlines", "rank": None, **changes}


@pytest.fixture(scope="module")
def told(place: Path) -> list[str]:
    """What a whole run says; its file is ``new.safetensors``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "ROUNDS", 2)
        return carried(place, "new", **given(place, **SHORT))


def test_each_way_reaches_more_of_the_wanted_change_than_lineage(told: list[str]) -> None:
    (line,) = [line for line in told if line.startswith("share of the wanted change")]
    found = {way: float(share) for way, share in re.findall(r"(lineage|fit|refit) (-?[\d.]+) %", line)}
    assert list(found) == ["lineage", "fit", "refit"]
    assert 50 < found["lineage"] < min(found["fit"], found["refit"])
    assert max(found.values()) < 100


def test_the_file_is_the_same_controlnet_with_other_last_convolutions(place: Path, told: list[str]) -> None:
    old, new = (load_file(place / f"{name}.safetensors") for name in ("control", "new"))
    assert new.keys() == old.keys()
    assert {tensor.dtype for tensor in new.values()} == {torch.float16}
    assert {name for name in old if not torch.equal(old[name], new[name])} == LEARNED
    with safe_open(place / "new.safetensors", framework="pt") as file:
        metadata = file.metadata()
    said = json.loads(metadata[CARRY_KEY])
    assert metadata["author"] == "someone"
    assert said["controlnet"] == {"name": "control.safetensors", "sha256": digest(place / "control.safetensors")}
    assert said["hints"]["name"] == "outlines"
    assert said["shares"]["lineage"] < said["shares"]["fit"]
    assert not (place / "new.carry").exists()


@pytest.mark.nightly
def test_an_interrupted_run_ends_with_the_same_file(place: Path, told: list[str]) -> None:
    """Interrupted in its second round of least squares."""
    fit, turns = Job.fit, []

    def interrupted(job: Job, start: State) -> State:
        turns.append(start)
        if len(turns) == 2:
            raise KeyboardInterrupt
        return fit(job, start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "ROUNDS", 2)
        with pytest.MonkeyPatch.context() as broken:
            broken.setattr(Job, "fit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                carried(place, "broken", **given(place, **SHORT))
        with pytest.raises(UserError, match=r"broken.carry holds an unfinished run with other hints"):
            carried(place, "broken", **given(place, **SHORT, hints=outlines_in(place / "others", 5)))
        carried(place, "broken", **given(place, **SHORT))
    one, other = (load_file(place / f"{name}.safetensors") for name in ("new", "broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def opened(place: Path, **changes: Any) -> control.Control:
    change = source.open_source(settings(place, "x", **given(place, **changes))).change
    assert isinstance(change, control.Control)
    return change


@torch.no_grad()
@pytest.mark.parametrize(
    ("network", "dtype", "bound"), [("SDXL", "fp32", 1e-3), ("koala-tiny", "fp32", 1e-3), ("koala-tiny", "bf16", 0.2)]
)
def test_the_residuals_are_those_of_koala_controlnet_loader(
    place: Path, network: str, dtype: str, bound: float
) -> None:
    """Of the file that a run begins with, and so of the one that it ends with: both are read by the same code."""
    inprocess.activate()
    from koala_sdxl.host.transfer.control import remapped
    from koala_sdxl.host.transfer.control_file import load_control

    koala, change = network == "koala-tiny", opened(place, dtype=dtype)
    unet = denoiser.new_unet(KOALA_TINY if koala else SDXL_TINY)
    random = torch.Generator().manual_seed(2)
    noisy, context = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 77, 96, generator=random)
    pooled, sizes = torch.randn(2, 64, generator=random), torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(2, 6)
    added, time = {"text_embeds": pooled, "time_ids": sizes}, torch.tensor([400, 400])
    seen: list[dict[str, Any]] = []
    numbers = torch.tensor([1])

    with change.on_teacher(unet, change.file) as on_sdxl, ExitStack() as acting:
        acting.enter_context((change.on_student(unet, change.file) if koala else on_sdxl)(numbers))
        unet.register_forward_pre_hook(lambda _, __, named: seen.append(named), with_kwargs=True)
        unet(noisy, time, encoder_hidden_states=context, added_cond_kwargs=added)
    vector = torch.cat([pooled, unet.add_time_proj(sizes.flatten()).reshape(2, -1)], dim=1)
    core = load_control(place / "control.safetensors").control_model.float()  # type: ignore[attr-defined]
    hint = change.hints.images[numbers].float().div(255).expand(2, -1, -1, -1)
    theirs = core(x=noisy, hint=hint, timesteps=time, context=context, y=vector)
    wanted = remapped(theirs, lineage(KOALA_TINY)) if koala else theirs
    ours = seen[0]["down_block_additional_residuals"]
    assert len(ours) == len(wanted["output"]) == (6 if koala else 9)
    for one, other in zip(ours, wanted["output"], strict=True):
        torch.testing.assert_close(one, other, rtol=bound, atol=bound)
    middle = seen[0]["mid_block_additional_residual"]
    torch.testing.assert_close(middle, torch.zeros(()) if koala else wanted["middle"][0], rtol=bound, atol=bound)


def test_koala_controlnet_loader_reads_the_new_file(place: Path, told: list[str]) -> None:
    inprocess.activate()
    from koala_sdxl.host.transfer.control_file import load_control

    loaded = load_control(place / "new.safetensors").control_model.state_dict()  # type: ignore[attr-defined]
    new = load_file(place / "new.safetensors")
    assert loaded.keys() == new.keys()
    assert all(torch.equal(loaded[name].float(), new[name].float()) for name in LEARNED)


def test_a_control_image_is_cut_and_scaled_as_comfyui_does(place: Path, tmp_path: Path) -> None:
    inprocess.activate()
    import comfy.utils

    pixels = torch.randint(0, 256, (70, 131, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    for number in range(4):
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")
    found = hints.open_hints(settings(place, "x", hints=tmp_path, size=96)).images[0]
    theirs = comfy.utils.common_upscale(pixels.permute(2, 0, 1)[None].float(), 96, 96, "nearest-exact", "center")
    assert torch.equal(found.float(), theirs[0])


def test_held_out_control_images_are_learned_from_by_neither_network(place: Path, tmp_path: Path) -> None:
    """They go along with the prompts, where there are as many."""
    few, many = settings(place, "x", samples=256), settings(place, "x", samples=32)
    found = hints.open_hints(replace(few, hints=outlines_in(tmp_path / "nine", 9)))
    assert found.turns == drawn(few, 9, 0)
    assert not set(found.turns[0]) & set(found.turns[1])
    assert len(found.images) == 9
    others = hints.open_hints(replace(many, hints=outlines_in(tmp_path / "many", 20)))
    assert (len(others.images), others.turns) == (3, ([0, 2], [1]))
    assert found.digest != others.digest


@pytest.mark.parametrize("form", ["diffusers", "folder", "control_model."])
def test_every_form_of_file_is_read(place: Path, tmp_path: Path, form: str) -> None:
    own, by_comfy = load_file(place / "control.safetensors"), open_control(place / "control.safetensors")
    names = {tensor.comfy: tensor.diffusers for tensor in control_tensors(CONTROL)}
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    prefixed = form == "control_model."
    save_file({form + name if prefixed else names[name]: tensor for name, tensor in own.items()}, path)
    found = opened(place, lora=tmp_path if form == "folder" else path).file
    assert found.layout == by_comfy.layout
    assert all(torch.equal(found.tensor(name), by_comfy.tensor(name)) for name in by_comfy.names)
    assert all(name.startswith(form) for name in found.names.values()) is prefixed


def test_a_check_tells_what_is_learned_and_leaves_nothing(place: Path) -> None:
    before = sorted(place.iterdir())
    said = "\n".join(carried(place, "checked", **given(place, check=True)))
    assert sorted(place.iterdir()) == before
    assert (
        "koala-tiny takes its residuals 0, 2, 3, 5, 6, 8 (counted from 0), lacks the skip connections for 1, 4, 7"
        in said
    )
    assert "new ControlNet: 6 convolutions learned anew, 0.0 million numbers" in said


def random_named(*names: str) -> State:
    return {name: torch.zeros(1) for name in names}


def without(name: str) -> State:
    return {key: tensor for key, tensor in adapters.controlnet(CONTROL).items() if key != name}


FILES: dict[str, Callable[[], State]] = {
    "union": lambda: adapters.controlnet(CONTROL) | random_named("control_add_embedding.linear_1.weight"),
    "lora": lambda: random_named("lora_controlnet", "zero_convs.0.0.weight"),
    "t2i": lambda: random_named("body.0.block1.weight"),
    "lllite": lambda: random_named("lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.up.0.weight"),
    "koalas": lambda: adapters.controlnet(KOALA_TINY),
    "wide": lambda: adapters.controlnet(replace(CONTROL, context=64)),
    "less": lambda: without("zero_convs.8.0.bias"),
    "more": lambda: adapters.controlnet(CONTROL) | random_named("difference"),
    "sd1": lambda: without("label_emb.0.0.weight"),
}
"""What is no SDXL ControlNet of its own."""


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("union", r"union.safetensors is a union ControlNet; expected an SDXL ControlNet"),
        ("lora", r"lora.safetensors is a Control-LoRA; expected an SDXL ControlNet"),
        ("t2i", r"t2i.safetensors is a T2I-Adapter; expected an SDXL ControlNet"),
        ("lllite", r"lllite.safetensors is a ControlNet-LLLite; expected an SDXL ControlNet"),
        ("koalas", r"koalas.safetensors was made for koala-tiny itself"),
        ("wide", r"wide.safetensors is a ControlNet for a .*, of other widths or layers than the teacher"),
        ("less", r"less.safetensors is a ControlNet with other tensors .*: 1 missing \(first: zero_convs.8.0.bias\)"),
        ("more", r"more.safetensors is a ControlNet with other tensors .*: 1 extra \(first: difference\)"),
        ("sd1", r"sd1.safetensors is a ControlNet of another family of models; expected an SDXL ControlNet"),
    ],
)
def test_another_kind_of_file_is_named(place: Path, tmp_path: Path, name: str, says: str) -> None:
    save_file(FILES[name](), tmp_path / f"{name}.safetensors")
    refused(place, says, lora=tmp_path / f"{name}.safetensors")


def test_what_does_not_go_together_is_named(place: Path, tmp_path: Path) -> None:
    for option in ({"keep": place / "prompts.txt"}, {"rank": 8}):
        refused(place, rf"--{next(iter(option))} goes with a LoRA, and .*control.safetensors is a ControlNet", **option)
    refused(place, r"--hints goes with a ControlNet, and .*lora.safetensors is none", lora=place / "lora.safetensors")
    refused(place, r"--hints is missing; expected a folder of control images", hints=None)


def test_a_folder_without_usable_images_is_named(place: Path, tmp_path: Path) -> None:
    refused(place, r"--hints: .*nowhere cannot be read \(No such file or directory\)", hints=place / "nowhere")
    refused(place, r"--hints: .*prompts.txt cannot be read \(Not a directory\)", hints=place / "prompts.txt")
    (tmp_path / "notes.txt").write_text("none")
    refused(place, r"--hints: .* has 0 images \(.png, .jpg, .jpeg, .webp\); expected at least 4", hints=tmp_path)
    folder = outlines_in(tmp_path / "outlines", 4)
    image = (folder / "02.webp").read_bytes()
    (folder / "02.webp").write_bytes(image[: len(image) // 2])
    few = {"hints": folder, "samples": 64}
    refused(place, r"--hints: .*02.webp: the image cannot be decoded .*; expected a PNG, JPEG or WebP image", **few)
    (folder / "02.webp").write_text("an outline")
    refused(place, r"--hints: .*02.webp: this is not an image.*; expected a PNG, JPEG or WebP image", **few)


def refused(place: Path, says: str, **changes: Any) -> None:
    with pytest.raises((UserError, CheckpointError), match=says) as problem:
        carried(place, "none", **given(place, **changes))
    assert len(str(problem.value).splitlines()) == 1
    assert not (place / "none.carry").exists()
