"""Measurements of speed and memory at realistic shapes. Each module is a command, except for shared code: `measure.py`,
`peers.py` and `tpu_compiler.py`."""
