"""What developers run; nothing here is part of the installed pack.

ComfyUI imports a pack by the folder that it lies in, so the checkout has no import name of its own. Importing ``tools``
gives it one: ``koala_sdxl.koala.releases``, ``koala_sdxl.host.model``, ``koala_sdxl.distill`` and so on, relative
imports included, without running the checkout's ``__init__``. No module of the pack is imported by another name.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

PACK = "koala_sdxl"

if PACK not in sys.modules:
    _spec = ModuleSpec(PACK, None, is_package=True)
    _spec.submodule_search_locations = [str(Path(__file__).resolve().parents[1])]
    sys.modules[PACK] = importlib.util.module_from_spec(_spec)
