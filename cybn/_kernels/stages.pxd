# cython: cdivision=True
# Stages: the steps between memory and the loops, on pieces that fit L1.
#
#   stage      fills                  with
#   fetch      x, dy, residual        float32 if memory has a half type; other types are not copied
#   shares     w                      the weight of each value
#   inputs     x, g                   x, and dy times the slope of the activation
#   deliver    y, dx                  the results, rounded to a half type or written past the caches
#
# A piece is up to STAGED values of one row. They are of one channel, with one set of coefficients
# (step 0), or of several columns with a set each (step 1). Residuals, activations that need exp,
# masks and weights are handled by stages, so each is written once, for every type, layout and
# direction.
#
# Values with weight 0 are replaced when they are read, so a NaN there has no effect. In sums the
# shift replaces them, and adds exactly 0. In gradients, if dy is 0 as well, a value whose gradient
# is 0 replaces them.

from libc.string cimport memcpy

from cybn._kernels.activation cimport IDENTITY, activate, through
from cybn._kernels.check cimport check
from cybn._kernels.lanes cimport LINE, STRIP, T, Way, item_of, read, write, write_strip
from cybn._kernels.loops cimport A, B, HI, K, Z
from cybn._kernels.problem cimport (
    AGAIN, IN_DRESIDUAL, IN_DX, SCALE, STAGED, UNSCALE, Problem, Route, Rows)


cdef inline char* place(
    const Rows* rows, const Problem* p, Py_ssize_t n, Py_ssize_t i
) noexcept nogil:
    """Return the address of value i of row n."""
    return rows.at + n * rows.pitch + i * p.item


cdef inline const Rows* gradients(const Problem* p, const Route* r) noexcept nogil:
    """Return the gradient before the activation if the first pass stored it, otherwise dy."""
    if r.gradient == IN_DRESIDUAL:
        return &p.dresidual
    return &p.y if r.gradient == IN_DX else &p.dy


cdef inline const T* fetch(
    const Rows* rows, const Problem* p, Way way, Py_ssize_t n, Py_ssize_t i, Py_ssize_t m, T* room
) noexcept nogil:
    """Return values i..i + m of row n: in the array itself, or widened into room."""
    check(n < p.N and m <= STAGED)
    return read(way, place(rows, p, n, i), m, room)


cdef inline void deliver(
    const T* v, const Rows* rows, const Problem* p, Way way, bint stream, Py_ssize_t n,
    Py_ssize_t i, Py_ssize_t m,
) noexcept nogil:
    """Write v to values i..i + m of row n, unless it is there already."""
    cdef char* to = place(rows, p, n, i)
    cdef Py_ssize_t j = 0, lanes = STRIP // <Py_ssize_t> sizeof(T), item = item_of(way, v[0])
    if stream:
        j = min(m, <Py_ssize_t> (-<size_t> to & (LINE - 1)) // item)
        write(way, v, to, j)
        while j + lanes <= m:
            write_strip(way, True, v + j, to + j * item)
            j += lanes
        write(way, v + j, to + j * item, m - j)
    elif <const void*> to != <const void*> v:
        write(way, v, to, m)


# ---- masks and weights -------------------------------------------------------------------

cdef inline const T* shares(
    const Problem* p, bint by_run, Py_ssize_t n, Py_ssize_t i, Py_ssize_t m, T* room
) noexcept nogil:
    """Return the weights of values i..i + m of row n, or of whole rows from n on.

    Weights of a run are neighbours in memory. Weights of columns are copied in the order of the
    values.
    """
    cdef const T* row = <const T*> p.share + n * p.S
    cdef Py_ssize_t j, k
    if by_run:
        return row + i % p.S
    if p.S == 1:
        k = -1
        for j in range(m):
            k += j % p.C == 0
            room[j] = row[k]
    else:
        for k in range(m // p.S):
            memcpy(room + k * p.S, row + k // p.C * p.S, p.S * sizeof(T))
    return room


cdef inline void counted(
    const T* v,                 # IN  (m,)
    const T* w,                 # IN  (m,)
    const T* other,             # IN  (m,), or one value
    Py_ssize_t step,
    T* to,                      # OUT (m,) v, or `other` if the weight is 0; may be v
    Py_ssize_t m,
) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(m):
        to[j] = other[j * step] if w[j] == 0 else v[j]


cdef inline void weigh(
    const T* x, const T* w, const T* hi, Py_ssize_t step, T* to, Py_ssize_t m
) noexcept nogil:
    """Compute to = w * (x - hi)."""
    cdef Py_ssize_t j
    for j in range(m):
        to[j] = w[j] * (x[j] - hi[j * step])


cdef inline void silence(
    const T* dy, const T* w, const T* other, Py_ssize_t step, T* to, Py_ssize_t m
) noexcept nogil:
    """Replace the values of `to` whose weight and gradient are both 0 by `other`."""
    cdef Py_ssize_t j
    for j in range(m):
        to[j] = other[j * step] if w[j] == 0 and dy[j] == 0 else to[j]


# ---- pieces ------------------------------------------------------------------------------

cdef inline void normalize(
    const T* restrict x,        # IN  (m,)
    const T* restrict r,        # IN  (m,) residual, or NULL
    T* restrict z,              # OUT (m,)
    Py_ssize_t m,
    const T* restrict co,
    Py_ssize_t step,            # a constant
) noexcept nogil:
    """Compute z = (x - hi) * a + z + residual: `scale` for a piece in L1."""
    cdef Py_ssize_t j
    if r == NULL:
        for j in range(m):
            z[j] = (x[j] - co[HI + j * step]) * co[A + j * step] + co[Z + j * step]
    else:
        for j in range(m):
            z[j] = (x[j] - co[HI + j * step]) * co[A + j * step] + co[Z + j * step] + r[j]


cdef inline void gradient(
    const T* restrict g,        # IN  (m,)
    const T* restrict x,        # IN  (m,)
    const T* restrict w,        # IN  (m,), or NULL if all weights are 1
    T* restrict dx,             # OUT (m,)
    Py_ssize_t m,
    const T* restrict co,
    Py_ssize_t step,            # a constant
) noexcept nogil:
    """Compute dx = g * a + w * ((x - hi) * k + b), without the second term if w is 0."""
    cdef Py_ssize_t j
    cdef T rest
    if w == NULL:
        for j in range(m):
            dx[j] = (g[j] * co[A + j * step] + (x[j] - co[HI + j * step]) * co[K + j * step]
                     + co[B + j * step])
    else:
        for j in range(m):
            rest = w[j] * ((x[j] - co[HI + j * step]) * co[K + j * step] + co[B + j * step])
            rest = 0 if w[j] == 0 else rest
            dx[j] = g[j] * co[A + j * step] + rest


cdef inline void invert(const T* y, T* z, Py_ssize_t m, T slope) noexcept nogil:
    """Compute z from y = leaky_relu(z)."""
    cdef Py_ssize_t j
    for j in range(m):
        z[j] = y[j] / slope if y[j] < 0 else y[j]


cdef inline void keep(
    const T* g, const Problem* p, const Route* r, Py_ssize_t n, Py_ssize_t i, Py_ssize_t m
) noexcept nogil:
    """Store g for the second pass, if the route requires it."""
    cdef const Rows* rows = gradients(p, r)
    if rows != &p.dy:
        deliver(g, rows, p, r.way, False, n, i, m)


cdef struct Piece:              # of x, of the gradient before the activation, and of weights; in T
    const void* x
    const void* g
    const void* w               # NULL if all weights are 1


cdef inline Piece inputs(
    const Problem* p, const Route* r, bint first, Py_ssize_t n, Py_ssize_t i, Py_ssize_t m,
    const T* co, Py_ssize_t step,
    T* room,                    # OUT (5, STAGED)
) noexcept nogil:
    """Return values i..i + m of row n for a loop of gradients; `first` is the pass that sums."""
    cdef T* of_x = room
    cdef T* of_g = room + STAGED
    cdef T* of_w = room + 2 * STAGED
    cdef T* of_r = room + 3 * STAGED
    cdef T* of_z = room + 4 * STAGED
    cdef T zero = 0
    cdef Way way = r.way
    cdef Piece piece
    cdef const T* x
    cdef const T* dy
    cdef const T* w = NULL
    cdef const T* z
    cdef const T* dr
    dy = fetch(&p.dy if first else gradients(p, r), p, way, n, i, m, of_g)
    x = fetch(&p.x, p, way, n, i, m, of_x)
    if p.inverse and p.activation != IDENTITY:
        invert(x, of_x, m, <T> p.slope)
        x = of_x
    if p.share != NULL:
        w = shares(p, step == 0, n, i, m, of_w)
        if p.zeroed:
            counted(dy, w, &zero, 0, of_g, m)
            dy = of_g
        if x != of_x:
            memcpy(of_x, x, m * sizeof(T))
            x = of_x
        silence(dy, w, co + HI, step, of_x, m)
    if p.activation != IDENTITY and (first or r.gradient == AGAIN):
        z = x
        if not p.inverse:
            dr = fetch(&p.residual, p, way, n, i, m, of_r) if p.residual.at != NULL else NULL
            if step:
                normalize(x, dr, of_z, m, co, 1)
            else:
                normalize(x, dr, of_z, m, co, 0)
            z = of_z
        if w != NULL:           # a residual may be NaN if its weight is 0
            silence(dy, w, &zero, 0, of_z, m)
        through(dy, z, of_r, m, p.activation, <T> p.slope)
        dy = of_r
    if first:
        keep(dy, p, r, n, i, m)
    piece.x, piece.g, piece.w = x, dy, w
    return piece


cdef inline void apply_piece(
    const Problem* p, const Route* r, Py_ssize_t n, Py_ssize_t i, Py_ssize_t m, const T* co,
    Py_ssize_t step,
    const Piece* piece,         # IN  result of `inputs`; ignored if y is written
    T* room,                    # OUT (6, STAGED)
) noexcept nogil:
    """Write y or dx of values i..i + m of row n, by stages."""
    cdef T* v = room + 5 * STAGED
    cdef T zero = 0
    cdef const T* x
    cdef const T* residual = NULL
    if p.apply == UNSCALE:
        if step:
            gradient(<const T*> piece.g, <const T*> piece.x, <const T*> piece.w, v, m, co, 1)
        else:
            gradient(<const T*> piece.g, <const T*> piece.x, <const T*> piece.w, v, m, co, 0)
    else:
        if p.apply == SCALE:
            x = fetch(&p.x, p, r.way, n, i, m, room)
            if p.residual.at != NULL:
                residual = fetch(&p.residual, p, r.way, n, i, m, room + STAGED)
        else:                   # compute dx like y, from g
            x = <const T*> piece.g
            co += K
        if step:
            normalize(x, residual, v, m, co, 1)
        else:
            normalize(x, residual, v, m, co, 0)
        if p.apply == SCALE:
            activate(v, m, p.activation, <T> p.slope)
            if p.zeroed:
                counted(v, shares(p, step == 0, n, i, m, room), &zero, 0, v, m)
    deliver(v, &p.y, p, r.way, r.stream, n, i, m)
