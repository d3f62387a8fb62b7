"""What KOALA is made of: layouts, tensor names, which SDXL layer each layer came from, text encoders and VAE."""
