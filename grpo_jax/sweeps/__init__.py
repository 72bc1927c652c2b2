"""Sweeps: the points, one run after the other, or all of them as one program."""
