"""The compiled rooms: no checks, no allocation, no Python objects but at the door.

One source, ``batch_norm.pyx``, is compiled once per instruction level:
``batch_norm_baseline``, ``batch_norm_x86_64_v3``. `cybn._runtime` picks one at import.

=================  ==========================================================================
batch_norm.pyx     the five operations as reduce, finish, apply over tiles; who does which tile
reduce.pxi         reduce and finish: sums over a tile, and what becomes of them
apply.pxi          apply: coefficients, and y or dx from them
runs.pxd           loops over long stretches of one channel
rows.pxd           loops over rows of neighbouring channels: short S, and channels-last
stream.pxd         stores that go past the caches
small.pxi          small calls, from their checks to the result: the one door to Python objects
running.pxi        moving running statistics
host.pyx           OpenMP and CPU features
=================  ==========================================================================
"""
