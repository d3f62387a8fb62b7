"""Everything in the repository that a command writes: `python3 dev.py generate [--check]`."""
