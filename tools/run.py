"""Runs a module of the checkout by its one import name: python -m tools.run koala_sdxl.distill CONFIG.toml."""

import runpy
import sys

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
