"""What KOALA Checkpoint Save calls its files, and what it writes into them beside weights."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import pytest
from comfy.cli_args import args
from comfy_api.latest import io

from koala_sdxl.host import saver as koala_saver
from koala_sdxl.koala.files import atomic_write as disk
from koala_sdxl.koala.files.header import read_header
from koala_sdxl.nodes.load import diffusers_folders
from koala_sdxl.nodes.save import KoalaCheckpointSave
from tools.measure import parity


@pytest.mark.parametrize("disabled", [False, True])
def test_the_graph_is_left_out_where_the_server_was_told_so(
    disabled: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The node as the server runs it, started with and without --disable-metadata."""
    monkeypatch.setattr(args, "disable_metadata", disabled)
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    hidden = {io.Hidden.prompt: {"1": {}}, io.Hidden.extra_pnginfo: {"workflow": {"nodes": []}}}
    node = KoalaCheckpointSave.PREPARE_CLASS_CLONE({"hidden_inputs": hidden})
    chosen = {"format": "checkpoint", "filename_prefix": "a"}
    written = node.execute(parity.tiny_models()[0], chosen, "default").result[0]
    found = read_header(tmp_path / written).metadata
    graph = {} if disabled else {"prompt": '{"1": {}}', "workflow": '{"nodes": []}'}
    assert {key: found[key] for key in ("prompt", "workflow") if key in found} == graph
    assert found["modelspec.title"] == "a_00001_"


def _save(prefix: str, kind: str, output: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(folder_paths, "output_directory", str(output))
    node = KoalaCheckpointSave.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    chosen = {"format": kind, "filename_prefix": prefix}
    written: str = node.execute(*parity.tiny_models()[:1], chosen, "default", *parity.tiny_models()[1:]).result[0]
    assert (output / written).exists()
    return written


@pytest.mark.parametrize(
    ("prefix", "kind", "wanted"),
    [
        ("", "checkpoint", "checkpoints/KOALA_00001_.safetensors"),
        (" ", "checkpoint", "checkpoints/KOALA_00001_.safetensors"),
        ("checkpoints/", "checkpoint", "checkpoints/KOALA_00001_.safetensors"),
        ("own//", "checkpoint", "own/KOALA_00001_.safetensors"),
        (".", "checkpoint", "KOALA_00001_.safetensors"),
        ("own/..", "checkpoint", "KOALA_00001_.safetensors"),
        ("", "diffusers folder", "diffusers/KOALA_00001_"),
        ("diffusers/", "diffusers folder", "diffusers/KOALA_00001_"),
        ("ö" * 100, "checkpoint", "ö" * 100 + "_00001_.safetensors"),
        ("n" * 200, "checkpoint", "n" * 200 + "_00001_.safetensors"),
        ("n" * 236, "checkpoint", "n" * 236 + "_00001_.safetensors"),
        ("n" * 248, "diffusers folder", "n" * 248 + "_00001_"),
    ],
    ids=lambda text: text[:24],
)
def test_any_prefix_gives_a_name(
    prefix: str, kind: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _save(prefix, kind, tmp_path, monkeypatch) == wanted
    if len(prefix) < 20:
        assert _save(prefix, kind, tmp_path, monkeypatch) == wanted.replace("00001", "00002")


@pytest.mark.parametrize(
    ("prefix", "says"),
    [
        ("n" * 237, r"^n{60}\.\.\. is too long a name for .*: it has 256 bytes with its number and ending"),
        ("n" * 300 + "/a", r"^filename_prefix n{60}: no such folder can be made \(File name too long\)"),
        ("a\0b", r"^filename_prefix .*: no such folder can be made \(it holds a zero byte\)"),
        ("taken/a", r"^filename_prefix taken/a: no such folder can be made \(Not a directory\)"),
    ],
    ids=["name", "folder", "zero", "file"],
)
def test_a_prefix_that_can_be_no_name_is_said(
    prefix: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(disk.SaveError, match=says):
        _save(prefix, "checkpoint", tmp_path, monkeypatch)
    assert [item.name for item in tmp_path.iterdir()] == ["taken"]


def test_what_a_killed_save_left_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be complete but for its name."""
    left = tmp_path / "diffusers" / f"koala-{32 * 'a'}.partial" / "content"
    koala_saver.save_folder(tmp_path / "whole", *parity.tiny_models())
    left.parent.mkdir(parents=True)
    (tmp_path / "whole").rename(left)
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    assert not [path for path in diffusers_folders().values() if path.is_relative_to(tmp_path)]
    assert _save("", "diffusers folder", tmp_path, monkeypatch) == "diffusers/KOALA_00001_"
    assert [name for name, path in diffusers_folders().items() if path.is_relative_to(tmp_path)] == ["KOALA_00001_"]
