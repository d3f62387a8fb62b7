"""koala-tiny, the built-in model: its pictures, its training, its judge, its packing."""
