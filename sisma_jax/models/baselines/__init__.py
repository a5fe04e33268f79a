"""Denoisers to compare with, of the same interface as `Sisma`."""
