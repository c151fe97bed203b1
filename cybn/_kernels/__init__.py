"""The compiled rooms: no Python objects, no checks, no allocation.

One source, ``batch_norm.pyx``, is compiled once per instruction level:
``batch_norm_baseline``, ``batch_norm_x86_64_v3``.
`cybn._runtime` picks one at import.

=================  ==========================================================================
batch_norm.pyx     the five operations as reduce, finish, apply over tiles; who does which tile
runs.pxd           loops over long stretches of one channel
rows.pxd           loops over rows of neighbouring channels: short S, and channels-last
stream.pxd         stores that go past the caches
host.pyx           OpenMP and CPU features
=================  ==========================================================================
"""
