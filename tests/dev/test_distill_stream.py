"""WebDataset shards of any size into a data cache: stopped and continued, each picture once, in little memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from koala_sdxl.distill import build_cache, cache
from koala_sdxl.distill.config import DataTable
from koala_sdxl.distill.entries import WHOLE, Digests, Part, digest
from koala_sdxl.distill.sources import read
from tests.dev.distill_pictures import IDENTITY, Averages, encoded, noise, picture, table, tar
from tools.harness.testhost import ROOT

SHARDS, EACH = 4, 15


def shards(folder: Path, image: bytes | None = None, each: int = EACH) -> DataTable:
    """Tar files of small pictures, each of a colour of its own, or all the same."""
    for shard in range(SHARDS):
        files: dict[str, bytes | str] = {}
        for number in range(each):
            colour = shard * EACH + number
            files[f"{number:04}.png"] = image or encoded(picture(64, 64, (colour, 0, 0)))
            files[f"{number:04}.txt"] = f"of {colour}"
        tar(folder / f"{shard}.tar", files)
    return table(folder, kind="webdataset")


KILLED = """
import os, signal, sys
import tools
from koala_sdxl.distill import build_cache, config
from koala_sdxl.distill.entries import Part
from koala_sdxl.koala.files import atomic_write as disk
from tests.dev.distill_pictures import IDENTITY, Averages
build_cache.PER_SHARD, build_cache.AT_ONCE = 4, 3
data = config.DataTable.model_validate_json(sys.argv[1])
write = disk.write_safetensors

def killed_at(last, plan, part):
    def until_killed(path, *rest):
        nonlocal last
        write(path, *rest)
        last -= 1
        if not last:
            os.kill(os.getpid(), signal.SIGKILL)
    disk.write_safetensors = until_killed
    build_cache.encode(data, Averages(), plan, part, print, print)
    os._exit(0)

for processes in eval(sys.argv[2]):
    plan, children = build_cache.begin(data, IDENTITY, print), []
    for number, last in enumerate(processes):
        children.append(os.fork())
        if not children[-1]:
            killed_at(last, plan, Part(number, len(processes)))
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_killed_again_and_again_every_picture_is_there_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By two processes, by three, by more than there are shards, each killed while it writes; finished by two."""
    data = shards(tmp_path / "data")
    rounds = "[(2, 3), (1, 2, 3), (1, 1, 1, 1, 1), (1,)]"
    subprocess.run([sys.executable, "-c", KILLED, data.model_dump_json(), rounds], cwd=ROOT, check=True)
    finished = {path: path.read_bytes() for path in data.cache.glob("latents-*")}
    assert len(finished) == 1 + 2 + 0 + 1 + 2
    monkeypatch.setattr(build_cache, "PER_SHARD", 4)
    plan, encoder, lines = build_cache.begin(data, IDENTITY, print), Averages(), list[str]()
    outcomes = [build_cache.encode(data, encoder, plan, Part(number, 2), print, lines.append) for number in range(2)]
    found = build_cache.finish(data, IDENTITY, plan, outcomes, print)
    assert lines == []
    assert encoder.pictures == SHARDS * EACH - 4 * len(finished)
    colours = [round(float((found[number]["latents"][0].mean() + 1) * 127.5)) for number in range(len(found))]
    assert sorted(colours) == list(range(SHARDS * EACH))
    captions = [round(float(found[number]["pooled"][0] * 2)) for number in range(len(found))]
    assert captions == [len(f"of {colour}") for colour in colours]
    assert {path: path.read_bytes() for path in finished} == finished
    assert not any(shard.unused for shard in found.index.shards)
    assert cache.ready(data, IDENTITY) is not None


def test_more_processes_than_shards_share_the_samples(tmp_path: Path) -> None:
    data = shards(tmp_path / "data")
    (tmp_path / "data" / "0.tar").write_bytes((tmp_path / "data" / "0.tar").read_bytes()[:-10240])
    found, lines = list[str](), list[str]()
    for number in range(SHARDS + 1):
        own = [sample.key for sample in read(data, lines.append, Part(number, SHARDS + 1))]
        assert len(own) == EACH * SHARDS / (SHARDS + 1)
        found += own
    assert sorted(found) == sorted(sample.key for sample in read(data, lines.append))
    assert len(set(found)) == EACH * SHARDS
    assert lines == ["0.tar: the shard is damaged (it has no end marker); the rest is skipped"] * 2


def passed_over(data: DataTable, each: int) -> build_cache.Plan:
    """A plan for a cache that has every picture already."""
    cached = Digests()
    for shard in range(SHARDS):
        status = (data.path / f"{shard}.tar").stat()
        for number in range(each):
            cached.add(digest(f"{shard}.tar/{number:04}.png", f"{status.st_size} {status.st_mtime_ns}"))
    return build_cache.Plan("", cached, 0)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count what is read")
def test_what_is_cached_is_not_read_again(tmp_path: Path) -> None:
    data = shards(tmp_path / "data", image=encoded(noise(600, 600)))
    plan = passed_over(data, EACH)

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split("\n")[0].split()[1])

    build_cache.encode(data, Averages(), plan, WHOLE, print, print)  # imports what it needs
    before, encoder = bytes_read(), Averages()
    outcome = build_cache.encode(data, encoder, plan, WHOLE, print, print)
    of_all = sum(path.stat().st_size for path in data.path.iterdir())
    assert (encoder.pictures, len(outcome.present)) == (0, SHARDS * EACH)
    assert bytes_read() - before < 0.05 * of_all


def test_memory_grows_by_little_more_than_two_digests_a_picture(tmp_path: Path) -> None:
    peaks = []
    for each in (1, 100, 700):  # the first imports what it needs
        data = shards(tmp_path / str(each), image=encoded(picture(8, 8)), each=each)
        plan = passed_over(data, each)
        tracemalloc.start()
        outcome = build_cache.encode(data, Averages(), plan, WHOLE, print, print)
        assert len(outcome.present) == SHARDS * each
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[2] - peaks[1]) / (SHARDS * 600) < 100
