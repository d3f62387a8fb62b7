"""The prompts of contact sheets. Needs no PyTorch, as `dev.py demo` does not."""

PROMPTS = (
    "a gray koala on a green background",
    "a red circle on a white background",
    "a blue star on a yellow background",
    "a purple triangle on a gray background",
    "an orange ring on a blue background",
    "a white square on a red background",
    "a black koala on an orange background",
    "a green star on a purple background",
    "a yellow circle on a black background",
    "a white koala on a blue background",
    "a red triangle on a gray background",
    "a purple ring on a white background",
)
