"""Damaged files by the thousand: whatever the pack reads is loaded as it is, or refused by name (``dev.py fuzz``).

Importing this brings ComfyUI into the process.
"""

from tools.harness import inprocess

inprocess.activate()
