"""What `python3 dev.py test` and `python3 dev.py check` run."""
