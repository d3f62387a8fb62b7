"""`python3 dev.py bench`: this pack, stock ComfyUI and diffusers side by side; writes docs/benchmarks.md.

The command line's process (``__main__``, ``sections``, ``targets``, ``report``, ``plots``, ``store``) only gives tasks
and writes down figures; what is measured runs in processes of their own (``process`` is this side of one, ``worker``
the other), so that each engine's memory is its own, and engines can take turns.
"""
