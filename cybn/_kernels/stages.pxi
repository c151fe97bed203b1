# Stages: what stands between memory and the loops. Each works on a piece that lies in L1, and
# which of them run is decided by the job, outside the loops.
#
#   stage      works on               where
#   fetch      x, dy, residual        widens half types; other types are read where they lie
#   fetch_x    y                      back to z, where the layer wrote y over x; 0 where x is masked
#   gradient   dy, z                  g = dy times the slope of the activation at z
#   blank      g, y, dx               0 where x is masked (masks.pxi)
#   epilogue   z, residual            y = activation(z + residual)
#   keep       g                      is the gradient of the residual
#   deliver    y, dx                  narrows to half types, or writes past the caches
#
# fetch and deliver are in storage.pxi.

cdef inline const T* fetch_x(
    const Job* job, const T* x, Py_ssize_t n, Py_ssize_t i, Py_ssize_t m, T* scratch
) noexcept nogil:
    """What the statistics are those of: x, or z where x is the y that was written over it."""
    cdef T of_w[TILE]
    cdef const T* at = fetch(job, x, job.x_row, n, i, m, scratch)
    if job.inverse and job.activation != IDENTITY:
        invert(at, scratch, m, <T> job.slope)
        at = scratch
    if job.share != NULL and job.reduce == DOTS:
        choose(at, shares(job, at, n, i, m, of_w), scratch, m, 0)
        at = scratch
    return at


cdef inline const T* gradient(
    const Job* job, const T* dy, const T* z,
    Py_ssize_t n, Py_ssize_t i, Py_ssize_t m, T* g,
) noexcept nogil:
    """Values i..i + m of row n of dy, taken back through the activation."""
    cdef const T* at = fetch(job, dy, job.dy_row, n, i, m, g)
    if job.activation == IDENTITY:
        return at
    chain(at, z, g, m, job.activation, <T> job.slope)
    return g


cdef inline T* room(
    const Job* job, Py_ssize_t n, Py_ssize_t i, T* buffer
) noexcept nogil:
    """Where g is computed: as dresidual, where it is kept as it is, or in the buffer."""
    if job.dresidual == NULL or job.storage != NATIVE:
        return buffer
    return <T*> (<char*> job.dresidual + n * job.dresidual_row + i * job.item)


cdef inline void keep(
    const Job* job, const T* g, Py_ssize_t n, Py_ssize_t i, Py_ssize_t m
) noexcept nogil:
    """Keep g as the gradient of the residual."""
    cdef void* to
    if job.dresidual == NULL:
        return
    to = <char*> job.dresidual + n * job.dresidual_row + i * job.item
    if job.storage != NATIVE:
        if T is float:
            narrow(g, <uint16_t*> to, m, job.storage)
    elif to != <const void*> g:
        memcpy(to, g, m * sizeof(T))


cdef inline void add_residual(
    const Job* job, T* z, Py_ssize_t n, Py_ssize_t i, Py_ssize_t m, T low, T high
) noexcept nogil:
    cdef T scratch[TILE]
    add(z, fetch(job, <const T*> job.residual, job.residual_row, n, i, m, scratch), m, low, high)


cdef inline const T* residual_at(
    const Job* job, const T* of_type, Py_ssize_t n, Py_ssize_t i
) noexcept nogil:
    """Where value i of row n of the residual lies; not for half types."""
    return <const T*> (<const char*> job.residual + n * job.residual_row + i * sizeof(T))


cdef inline void epilogue(
    const Job* job, T* z, Py_ssize_t n, Py_ssize_t i, Py_ssize_t m
) noexcept nogil:
    """What apply's own loop has not done yet."""
    if job.residual != NULL:
        add_residual(job, z, n, i, m, <T> job.low, <T> job.high)
    if job.activation >= LEAKY_RELU:
        activate(z, m, job.activation, <T> job.slope)
