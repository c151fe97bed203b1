"""The compiled rooms: no checks, no allocation, no Python objects but at the door.

Two sources, ``batch_norm.pyx`` and ``layer_norm.pyx``, are compiled once per instruction level:
``batch_norm_baseline``, ``batch_norm_x86_64_v3`` and so on. `cybn._runtime` picks one level at
import.

=================  ==========================================================================
batch_norm.pyx     the five operations as reduce, finish, apply over tiles; who does which tile
reduce.pxi         reduce and finish: sums over a tile, and what becomes of them
apply.pxi          apply: coefficients, and y or dx from them
runs.pxd           loops over long stretches of one channel
rows.pxd           loops over rows of neighbouring channels: short S, and channels-last
layer_norm.pyx     the family: layer, RMS, group and instance normalization
row_reduce.pxi     its sums over rows, and what becomes of them
row_apply.pxi      its coefficients, and y or dx from them
columns.pxd        its loops where gamma and beta change from element to element
stream.pxd         stores that go past the caches
plain.pxi          plain calls, from their checks to the result: the one door to Python objects
running.pxi        moving running statistics
check.pxd          assertions, in debug builds alone
host.pyx           OpenMP, CPU features, and the kind of build
=================  ==========================================================================
"""
