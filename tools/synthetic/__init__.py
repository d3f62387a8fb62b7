"""Weights for tests: random full-size models, and LoRAs and ControlNets of every kind."""
