"""SDXL LoRAs on a KOALA model: module names, the model a file was trained on, the layer each change goes to."""
