"""koala/ stands alone: torch and safetensors are all that importing it takes."""

from __future__ import annotations

import subprocess
import sys

from tools.harness.testhost import ROOT

IMPORT_ALL = """
import importlib, pkgutil, sys
sys.modules |= dict.fromkeys(("comfy", "folder_paths", "nodes", "diffusers", "transformers"))  # not importable
import koala
for module in pkgutil.walk_packages(koala.__path__, "koala."):
    print(importlib.import_module(module.name).__name__)
print(*sorted(name for name in sys.modules if name.startswith(("host", "koala_sdxl", "distill", "tools"))))
"""


def test_every_module_of_koala_is_imported_without_comfyui_or_the_rest_of_the_pack() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True, check=True)
    *modules, others = done.stdout.splitlines()
    assert {"koala.files.inspect", "koala.files.write", "koala.lora.plan", "koala.schedule"} <= set(modules)
    assert others == ""
