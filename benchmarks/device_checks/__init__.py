"""The parts of `benchmarks/device_check.py`, which need only JAX, Flax, Optax, NumPy, jaxtyping and this project."""
