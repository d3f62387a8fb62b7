"""What was made for SDXL, carried to a KOALA: weight patches, attention and block patches, LoRAs, ControlNets.

Works on the host's objects; which SDXL layer a KOALA layer came from it asks ``koala.lineage``.
"""
