"""The compiled kernels: no checks, no allocation, no Python objects.

`plain.pyx` is the page to begin with: the textbook, compiled. ``batch_norm.pyx`` and
``layer_norm.pyx`` are compiled once per instruction level, as ``batch_norm_x86_64_v3`` and so on;
`cybn._runtime` picks one level at import, and the dispatch calls it. What they share lies in .pxd
files, each of which says in its first lines what it is for. ``host.pyx`` is the only place that
names OpenMP and CPU features.
"""
