# cython: language_level=3
# cython: binding=False
# A description of the loops and stages that a call of batch normalization uses, for tests.

from libc.string cimport memset

from cybn._kernels.activation cimport Activation
from cybn._kernels.problem cimport (
    BRAIN, DOTS, FLOAT32, FLOAT64, HALF, NO_SUMS, NO_WRITE, SCALE, SCALE_DY, SUMS, UNSCALE, Caches,
    Problem, Route, Tiling, chunks_of, route_of, tiling_of)

from .batch_norm import ACTIVATIONS

WAYS = ("plain", "float16", "bfloat16")
LOOPS, SOURCES = ("runs", "columns"), ("memory", "kept", "stages")
GRADIENTS = ("given", "again", "in dresidual", "in dx")
ITEMS = {"f": (FLOAT32, 4), "d": (FLOAT64, 8), "e": (HALF, 2), "E": (BRAIN, 2)}
OPERATIONS = {
    "statistics": (SUMS, NO_WRITE), "forward": (SUMS, SCALE), "inference": (NO_SUMS, SCALE),
    "backward": (DOTS, UNSCALE), "inference_backward": (DOTS, SCALE_DY)}


def route(
    operation, N, C, S, dtype="f", *, activation=None, residual=False, mask=False, weights=False,
    masked="normalize", in_place=False, from_output=False, threads=1, l2=1 << 20, l3=32 << 20,
):
    """Return the route of a call, as a dictionary of words.

    The array folds to N, C and S. `dtype` is "f", "d", "e" or, for bfloat16, "E". `residual`,
    `mask` and `weights` are True if the call has one, and `in_place` if the result overwrites x.
    l2 and l3 are the sizes of the caches in bytes. Other arguments are those of the call.
    """
    cdef Problem p
    cdef Caches caches
    memset(&p, 0, sizeof(p))
    p.N, p.C, p.S = N, C, S
    p.storage, p.item = ITEMS[dtype]
    p.reduce, p.apply = OPERATIONS[operation]
    p.activation = <Activation> <int> ACTIVATIONS.get(activation, 0)
    p.slope = 0.01
    p.chunks = chunks_of(N, C, S)
    p.x.at, p.dy.at = <char*> 64, <char*> 128       # different addresses that are never read
    p.y.at = p.x.at if in_place else <char*> 192
    if residual:
        p.residual.at = <char*> 256
        p.dresidual.at = <char*> 320 if p.reduce == DOTS else NULL
    if mask or weights:
        p.share, p.weighted, p.zeroed = &p, weights, masked == "zero"
    p.inverse, p.threads = from_output, threads
    caches.l2, caches.l3 = l2, l3
    cdef Tiling t = tiling_of(&p, &caches)
    cdef Route r = route_of(&p, &t, &caches)
    return {
        "schedule": "owned" if t.owned else "shared",
        "sums": LOOPS[r.reduce_by],
        "writes": LOOPS[r.apply_by],
        "sums from": SOURCES[r.reduce_from],
        "writes from": SOURCES[r.apply_from],
        "way": WAYS[r.way],
        "stream": bool(r.stream),
        "gradient": GRADIENTS[r.gradient],
    }
