"""What was made for SDXL, applied to a KOALA model: weight patches, attention and block patches, LoRAs, ControlNets.

Which SDXL layer a KOALA layer came from, ``host.model`` answers.
"""
