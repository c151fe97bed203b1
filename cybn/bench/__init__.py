"""Measuring cybn on a machine: layer shapes of real networks, floors and peers."""
