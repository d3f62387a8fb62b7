"""Every node of ComfyUI that takes and gives a MODEL, on KOALA: ``dev.py nodes`` writes docs/core-nodes.md.

Importing this brings ComfyUI into the process.
"""

from tools.harness import inprocess

inprocess.activate()
