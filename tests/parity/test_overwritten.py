"""A weights file that is overwritten in place under a loaded model: the model stays as it was loaded.

Each case runs in a process of its own, because a mapped file that becomes shorter ends the process that reads it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from koala_sdxl.koala_loader import BUILT_IN
from tests.daily import daily
from tools.harness import testhost

LOAD_OVERWRITE_RUN = """
import os, sys
import tests.parity  # before ComfyUI's own package of that name
from tools.harness import inprocess
inprocess.activate()
import comfy.model_management, torch
from pathlib import Path
from koala_sdxl import koala_loader
from tests.parity.answers import encode, predict

torch.set_grad_enabled(False)
path, how = Path(sys.argv[1]), sys.argv[2]

def answers(loaded):
    comfy.model_management.unload_all_models()
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    return [predict(loaded[0]), *encode(loaded[1]), loaded[2].decode(latent)]

def same(found, wanted):
    return all(map(torch.equal, found, wanted))

faults = []
loaded = koala_loader.load_checkpoint(path, "fp16")
wanted = answers(loaded)
if str(path) in {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}:
    faults.append("the file is still open")
if str(path) in Path("/proc/self/maps").read_text():
    faults.append("the file is still mapped")
print(faults, flush=True)
size = path.stat().st_size
with path.open("r+b") as file:
    if how == "same size":
        header = 8 + int.from_bytes(file.read(8), "little")
        file.seek(header)
        file.write(bytes(size - header))
    else:
        file.truncate(1000)
if not same(answers(loaded), wanted):
    faults.append("another answer")
if how == "same size":
    other = koala_loader.load_checkpoint(path, "fp16")
    if any(map(torch.equal, answers(other), wanted)):
        faults.append("the old weights are given out for the new file")
    if not same(answers(loaded), wanted):
        faults.append("the loaded model became the new one")
print(faults, flush=True)
os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("how", daily(["same size", "shorter"], ["same size"]))
def test_a_loaded_model_is_not_the_files_any_more(how: str, tmp_path: Path) -> None:
    path = Path(shutil.copyfile(BUILT_IN, tmp_path / "koala.safetensors"))
    command = [sys.executable, "-c", LOAD_OVERWRITE_RUN, str(path), how]
    done = subprocess.run(command, cwd=testhost.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()) == (0, ["[]", "[]"]), done.stderr[-2000:]
