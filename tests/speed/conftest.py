"""These tests call ComfyUI and the pack (as ``koala_pack``) in their own process: see tools/inprocess.py."""

from tools import inprocess

inprocess.activate()
