"""Weight files: what a file holds, what is wrong with it, and how one is written."""
