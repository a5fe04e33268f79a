"""Draws faces and their exact masks, for the data set `synthetic_faces`."""

from sisma_jax.data.drawing.portrait import draw_face

__all__ = ["draw_face"]
