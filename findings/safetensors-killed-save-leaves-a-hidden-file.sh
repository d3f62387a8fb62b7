#!/usr/bin/env bash
# safetensors 0.8.0: a training that is killed while it saves, as a preempted one is, leaves a hidden file each time, up
# to the size of the model. No later save uses or deletes it, and its name has no ending: a job that is killed often
# fills its disk. The file that was there before stays whole, which it did not before 0.8.
#
# Guess before running: a killed save leaves what it wrote under the file's own name, cut off, so that the next save
# writes over it and the folder never holds more than one file.
# Found: a file of 512 MB is there; three processes save it again and are killed when a fourth is on the disk:
#     safetensors   files afterwards                                    the older file
#     0.7.0         1                                                   gone: a file that cannot be read has its place
#     0.8.0         1, and 3 hidden ones, each with what was written    whole
# Why: since 0.8 save_file() and serialize_file() write to a temporary file (.tmpXXXXXX) in the same folder and rename
#   it; a killed process does neither that nor deletes it.
# What to do: before a job goes on, delete the folder's .tmp* files that no process has open.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/check.py" <<'PYTHON'
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

PARTS, EACH = 8, 64 * 2**20


def save(path, value):
    save_file({f"part{at}": np.full(EACH // 4, value, np.float32) for at in range(PARTS)}, path)


if len(sys.argv) > 1:
    save(sys.argv[1], float(sys.argv[2]))
    sys.exit()
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model.safetensors"
    save(path, 1)
    whole, killed = path.stat().st_size, 0
    while killed < 3:
        before = {file: file.stat() for file in Path(folder).iterdir()}
        job = subprocess.Popen([sys.executable, __file__, str(path), "2"])
        while job.poll() is None:
            files = [file for file in Path(folder).iterdir() if file not in before or file.stat() != before[file]]
            if any(file.stat().st_blocks * 512 > whole / 4 for file in files):
                job.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        if job.wait() != -signal.SIGKILL:
            sys.exit("the save was over before it could be killed")
        killed += 1
    hidden = [file for file in Path(folder).iterdir() if file != path]
    try:
        kept = all((tensor == 1).all() for tensor in load_file(path).values())
        older = "whole" if kept else "mixed"
    except SafetensorError as error:
        older = f"unreadable ({error})"
    written = [file.stat().st_blocks * 512 / whole for file in hidden]
    print(f"safetensors {safetensors.__version__}: the older file is {older}; hidden files, on the disk as shares of its")
    print(f"  size: {', '.join(f'{share:.2f}' for share in written) or 'none'}")
    assert all(file.name.startswith(".tmp") for file in hidden)
    assert all(share > 0.2 for share in written)
    expected = {"0.7.0": (0, "unreadable"), "0.8.0": (3, "whole")}[safetensors.__version__]
    assert (len(hidden), older.partition(" ")[0]) == expected, "the behaviour has changed"
    save(path, 3)
    assert all(file.exists() for file in hidden)  # nor does a save that succeeds delete them
PYTHON
for version in 0.7.0 0.8.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet --disable-pip-version-check \
        "safetensors==$version" "numpy==2.4.6" 2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 2; }
    "$folder/$version/bin/python" "$folder/check.py"
done
