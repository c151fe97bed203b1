"""The compiled kernels: no checks, no allocation, no Python objects.

Begin with ``plain.pyx``, which has the textbook formulas. ``batch_norm.pyx`` and ``layer_norm.pyx``
are compiled once per instruction level, as ``batch_norm_x86_64_v3`` and so on. `cybn._runtime`
picks one level at import, and the dispatch calls it. Code that they share is in .pxd files; the
first lines of each describe its purpose. Only ``host.pyx`` names OpenMP and CPU features.
"""
