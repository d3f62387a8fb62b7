"""What loading costs: nothing a second time, no second copy in memory, and tiles where a picture is too large."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from koala_sdxl import koala_loader
from koala_sdxl.host import reader as koala_reader
from koala_sdxl.host import saver as koala_saver
from koala_sdxl.host.vae import decode_tile
from koala_sdxl.koala.files import header
from koala_sdxl.koala.files.conventions import CLIP_PREFIXES, VAE_PREFIX
from koala_sdxl.koala.files.dtypes import STORED_DTYPES
from koala_sdxl.koala.files.header import CheckpointError, Source, read_header
from koala_sdxl.koala.files.inspect import inspect_model
from koala_sdxl.koala.files.stamp import stamp
from koala_sdxl.koala_loader import BUILT_IN
from koala_sdxl.nodes.load import load_parts
from tools.harness import testhost
from tools.measure import parity
from tools.synthetic import random_weights


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A koala-tiny that no other test has loaded."""
    return Path(shutil.copyfile(BUILT_IN, tmp_path / "koala.safetensors"))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Source]:
    """What is read from files."""
    found: list[Source] = []

    def watched(source: Source, *arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
        found.append(source)
        return koala_reader.read(source, *arguments, **options)

    monkeypatch.setattr(koala_loader, "read", watched)
    return found


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """How many times each file was opened for its header."""
    found = Counter[Path]()

    def counted(path: Path, **options: Any) -> Any:
        found[path] += 1
        return safe_open(path, **options)

    monkeypatch.setattr(header, "safe_open", counted)
    return found


def networks(loaded: koala_loader.Loaded) -> tuple[Any, ...]:
    model, clip, vae = loaded
    return model.model.diffusion_model, clip.cond_stage_model, vae.first_stage_model


# Headers


def test_one_load_of_a_single_file_reads_its_header_once(file: Path, opened: Counter[Path]) -> None:
    first = koala_loader.load_checkpoint(file)
    assert opened == {file: 1}
    again = koala_loader.load_checkpoint(file)
    assert opened == {file: 2}
    del first, again


def test_one_load_of_four_files_reads_each_header_once(tmp_path: Path, opened: Counter[Path]) -> None:
    folder = tmp_path / "koala"
    koala_saver.save_folder(folder, *parity.tiny_models())
    unet, vae = (folder / part / "diffusion_pytorch_model.safetensors" for part in ("unet", "vae"))
    encoders = [folder / part / "model.safetensors" for part in ("text_encoder", "text_encoder_2")]
    opened.clear()
    koala_loader.load_folder(folder)
    assert opened == dict.fromkeys((unet, vae, *encoders), 1)
    opened.clear()
    model = inspect_model(unet)
    load_parts(model.unet.layout, encoders[0], encoders[1], vae)
    koala_loader.load_unet(model, "it")
    assert opened == dict.fromkeys((unet, vae, *encoders), 1)


# A second time


def test_a_second_load_reads_nothing_and_shares_the_weights(file: Path, read: list[Source]) -> None:
    first = koala_loader.load_checkpoint(file)
    assert len(read) == 4
    second = koala_loader.load_checkpoint(file)
    assert len(read) == 4
    assert all(one is other for one, other in zip(networks(first), networks(second), strict=True))
    assert all(one is not other for one, other in zip(first, second, strict=True))


def test_what_is_done_to_one_load_is_not_done_to_another(file: Path) -> None:
    first, second = koala_loader.load_checkpoint(file), koala_loader.load_checkpoint(file)
    latent = torch.randn(1, 4, 8, 8)
    wanted = [
        parity.KoalaPrompt.execute(second[1], "a red circle", "", "no style", "reference"),
        second[2].decode(latent),
    ]
    name = "diffusion_model.out.2.weight"
    first[0].add_patches({name: (torch.ones_like(networks(first)[0].out[2].weight),)})
    first[1].clip_layer(-1)
    first[2].patcher.add_patches({"decoder.conv_out.weight": (torch.ones(3, 32, 3, 3),)})
    first[2].process_output = lambda picture: picture * 0
    assert (list(first[0].patches), list(second[0].patches), list(second[2].patcher.patches)) == ([name], [], [])
    found = [
        parity.KoalaPrompt.execute(second[1], "a red circle", "", "no style", "reference"),
        second[2].decode(latent),
    ]
    assert torch.equal(found[0].result[0][0][0], wanted[0].result[0][0][0])
    assert torch.equal(found[1], wanted[1])


def test_another_type_of_weights_is_another_model(file: Path) -> None:
    first = koala_loader.load_checkpoint(file)[0]
    kept = koala_loader.load_checkpoint(file, "fp16")[0]
    assert kept.model is not first.model
    assert {weights.dtype for weights in kept.model.diffusion_model.parameters()} == {torch.float16}


def test_weights_of_inference_mode_are_not_shared_outside_it(file: Path) -> None:
    kept = koala_loader.load_checkpoint(file)
    again = koala_loader.load_checkpoint(file)
    with torch.inference_mode(False):
        outside = koala_loader.load_checkpoint(file)
    for inside, other, own in zip(networks(kept), networks(again), networks(outside), strict=True):
        assert inside is other
        assert not any(weight.is_inference() for weight in own.parameters())


def _replaced(file: Path, data: bytes) -> None:
    other = file.with_name("other")
    other.write_bytes(data)
    other.replace(file)


def _overwritten(file: Path, data: bytes) -> None:
    """In place, with the time of before: as rsync and some unpackers do."""
    before = file.stat()
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [_replaced, _overwritten])
def test_a_changed_file_is_read_again(change: Callable[[Path, bytes], None], file: Path, read: list[Source]) -> None:
    first = koala_loader.load_checkpoint(file)
    change(file, file.read_bytes()[:-4000] + bytes(4000))
    second = koala_loader.load_checkpoint(file)
    assert len(read) == 8
    assert any(
        not torch.equal(tensor, other.state_dict()[name])
        for one, other in zip(networks(first), networks(second), strict=True)
        for name, tensor in one.state_dict().items()
    )


@pytest.mark.parametrize("part", range(3), ids=["MODEL", "CLIP", "VAE"])
def test_what_nobody_has_any_more_is_let_go(part: int, file: Path, read: list[Source]) -> None:
    loaded = koala_loader.load_checkpoint(file)
    loaded[2].decode(torch.randn(1, 4, 8, 8))
    alive = weakref.ref(networks(loaded)[part])
    of_it = [loaded[part], loaded[part].clone() if part < 2 else loaded[part]]
    del loaded
    of_it.pop()
    comfy.model_management.unload_all_models()
    gc.collect()
    assert alive() is not None
    of_it.pop()
    gc.collect()
    comfy.model_management.cleanup_models()
    gc.collect()
    assert alive() is None
    koala_loader.load_checkpoint(file)
    assert len(read) == 8


@pytest.mark.parametrize("flag", [False, True])
def test_the_order_in_memory_that_a_flag_of_comfyuis_asks_for(flag: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """--force-channels-last"""
    monkeypatch.setattr(comfy.model_management.args, "force_channels_last", flag)
    build, arguments = koala_loader.load_checkpoint(BUILT_IN)[0].cached_patcher_init
    found = build(*arguments)
    kernels = [weights for weights in found.model.diffusion_model.parameters() if weights.shape[2:] == (3, 3)]
    assert {weights.is_contiguous(memory_format=torch.channels_last) for weights in kernels} == {flag}


# Reading


def whole_file() -> dict[str, torch.Tensor]:
    return comfy.utils.load_torch_file(str(BUILT_IN))


@pytest.mark.parametrize("prefix", [*CLIP_PREFIXES, VAE_PREFIX, "", "nothing of this name"])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32])
def test_tensors_are_the_files(prefix: str, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(koala_reader, "PIECE", 1000)
    wanted = {name[len(prefix) :]: tensor for name, tensor in whole_file().items() if name.startswith(prefix)}
    found = koala_reader.read(Source(read_header(BUILT_IN), prefix), dtype)
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == (dtype or tensor.dtype)
        assert torch.equal(found[name], tensor.to(dtype))


def test_tensors_of_every_type_shape_and_place(tmp_path: Path) -> None:
    values = torch.arange(-3, 9).view(3, 4)
    wanted = {str(dtype): values.to(dtype) for dtype in STORED_DTYPES.values()}
    wanted |= {"one": torch.tensor(2.5), "none": torch.empty(0, 3), "odd": torch.ones(3, dtype=torch.uint8)}
    save_file(wanted, tmp_path / "a")
    found = koala_reader.read(Source(read_header(tmp_path / "a")))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].view(-1).view(torch.uint8).tolist() == tensor.view(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("inference", [False, True])
def test_tensors_can_be_trained_as_those_of_the_thread_that_asks(inference: bool, dtype: torch.dtype | None) -> None:
    with torch.inference_mode(inference):
        found = koala_reader.read(Source(read_header(BUILT_IN), VAE_PREFIX), dtype)
    assert {tensor.is_inference() for tensor in found.values()} == {inference}


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def _overwrite(path: Path) -> None:
    _overwritten(path, bytes(path.stat().st_size))


def _replace(path: Path) -> None:
    other = Path(shutil.copyfile(path, path.with_name("other")))
    shutil.copystat(path, other)
    other.replace(path)


@pytest.mark.parametrize("change", [_grow, _overwrite, _replace, lambda path: os.truncate(path, 500)])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_file_that_changed_since_it_was_inspected_is_not_read(
    change: Callable[[Path], None], streamed: bool, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(koala_reader, "streamed", lambda: streamed)
    monkeypatch.setattr(comfy.utils, "load_torch_file", lambda _: {})
    source = Source(read_header(file))
    change(file)
    with pytest.raises(CheckpointError, match=r"^koala.safetensors was changed while it was being loaded, or since"):
        koala_reader.read(source)


def test_a_file_that_becomes_shorter_while_it_is_read_is_named(file: Path) -> None:
    source = Source(read_header(file))
    os.truncate(file, file.stat().st_size // 2)
    shorter = dataclasses.replace(source.header, stamp=stamp(file))
    with pytest.raises(CheckpointError, match=r"^koala.safetensors was changed while"):
        koala_reader.read(Source(shorter))


def test_a_host_that_streams_weights_gets_tensors_of_its_own_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, torch.Tensor]] = []
    load = comfy.utils.load_torch_file

    def watched(*arguments: Any, **further: Any) -> Any:
        made.append(load(*arguments, **further))
        return made[-1]

    monkeypatch.setattr(comfy.utils, "load_torch_file", watched)
    monkeypatch.setattr(koala_reader, "streamed", lambda: True)
    found = koala_reader.read(Source(read_header(BUILT_IN), VAE_PREFIX), torch.float16)
    (whole,) = made
    assert found
    assert all(tensor is whole[VAE_PREFIX + name] for name, tensor in found.items())


@pytest.mark.usefixtures("full_size")
def test_loading_takes_little_more_memory_than_the_weights() -> None:
    """KOALA-700M's U-Net, an fp16 file kept as fp32, in a process of its own: a second copy would be half as much."""
    file = inspect_model(
        random_weights.folder("koala-700m") / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    ).unet.path
    code = (
        "from tools.measure.bench import engines, meter; engines.activate('cpu'); from pathlib import Path\n"
        "from koala_sdxl import koala_loader; from koala_sdxl.koala.files.inspect import inspect_model\n"
        f"unet = inspect_model(Path({str(file)!r})); before = meter.forget_peak()['ram']\n"
        "model = koala_loader.load_unet(unet, 'it'); above = meter.peak()['ram'] - before\n"
        "print(above / sum(weights.nbytes for weights in model.model.parameters()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=testhost.ROOT, capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout.splitlines()[-1]) <= 1.1


# Tiles


@pytest.mark.parametrize(
    ("height", "width", "need", "free", "side"),
    [
        (128, 128, 10, 10, None),
        (128, 128, 10, 9.9, 64),
        (128, 128, 10, 2.5, 64),
        (128, 128, 10, 2.4, 32),
        (128, 128, 10, 0.5, 16),
        (128, 128, 10, 0.001, 16),
        (64, 64, 10, 9.9, 32),  # a tile as large as the whole would be no help
        (32, 256, 10, 5.1, 64),
    ],
)
def test_size_of_tiles(height: int, width: int, need: float, free: float, side: int | None) -> None:
    assert decode_tile(height, width, need, free) == side


def test_a_large_picture_is_decoded_in_tiles_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vae = parity.tiny_models()[2]
    latent = torch.randn(1, 4, 48, 32, generator=torch.Generator().manual_seed(1)) * 4
    need = vae.memory_used_decode(latent.shape, vae.vae_dtype)
    free = need * 1.01  # whatever else this machine's memory holds
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, **__: free)
    with caplog.at_level(logging.INFO):
        whole = vae.decode(latent)
    assert "tiles" not in caplog.text
    free = need * 0.7
    sizes: list[tuple[int, ...]] = []
    hook = vae.first_stage_model.decoder.register_forward_hook(lambda _, given, __: sizes.append(given[0].shape[2:]))
    with caplog.at_level(logging.INFO):
        tiled = vae.decode(latent)
    hook.remove()
    assert len(sizes) > 1
    assert max(height * width for height, width in sizes) <= 0.7 * 48 * 32
    assert "decoding 256x384 pixels in tiles of 256" in caplog.text
    assert tiled.shape == whole.shape
    error = (tiled - whole).square().mean()
    assert float(error) < 1e-3  # tiles know little of each other, so that seams are blended
