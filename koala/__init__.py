"""What KOALA is: layouts, tensor names, file recognition, published settings, schedules.

Needs torch and safetensors at most, never ComfyUI: every module here can be imported and tested alone.
"""
