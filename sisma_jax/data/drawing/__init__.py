"""Draws faces together with their masks: the pictures of the embedded data set."""

from sisma_jax.data.drawing.portrait import draw_face

__all__ = ["draw_face"]
