"""What training libraries write, on KOALA: peft, lycoris-lora and diffusers attach adapters to a narrow SDXL and save
them; what each of them merges into SDXL, cut by lineage, is what KOALA LoRA Loader has to make of the file.
"""
