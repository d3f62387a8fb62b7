"""Everything that touches the objects of ComfyUI. Knows `koala`; the nodes know this."""
