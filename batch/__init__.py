"""A workflow and a table in, images out: many prompts on many GPUs."""
