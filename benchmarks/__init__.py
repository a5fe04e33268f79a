"""Speed and memory, measured at shapes people run. Each file beside `measure.py` is one benchmark's command."""
