# Between memory and the loops: half types, and outputs that are computed in L1 first. Included by
# each kernel; what it needs of the kernel's Job:
#
#   storage     what x, dy, y and dx are in memory
#   item        bytes of an element there
#   x_row       bytes from one row of x to the next
#   stream      what is delivered goes past the caches; never half types
#   buffered    y is computed in a buffer, and then delivered

cdef inline const T* fetch(
    const Job* job, const T* base, Py_ssize_t pitch,
    Py_ssize_t n, Py_ssize_t i, Py_ssize_t m, T* scratch,
) noexcept nogil:
    """Values i..i + m of row n: where they lie, or widened into scratch."""
    check((n < job.N or m == 0) and m <= TILE)
    cdef const void* at = <const char*> base + n * pitch + i * job.item
    if job.storage == NATIVE:
        return <const T*> at
    if T is float:
        widen(<const uint16_t*> at, scratch, m, job.storage)
    return scratch


cdef inline const uint16_t* half_at(
    const T* base, Py_ssize_t pitch, Py_ssize_t n, Py_ssize_t i
) noexcept nogil:
    """Where value i of row n of a half type lies."""
    return <const uint16_t*> (<const char*> base + n * pitch) + i


cdef inline const T* place(
    const Job* job, const T* base, Py_ssize_t pitch, Py_ssize_t n, Py_ssize_t i
) noexcept nogil:
    """Where value i of row n lies, in the type of storage."""
    return <const T*> (<const char*> base + n * pitch + i * job.item)


cdef inline double value(
    const Job* job, const T* x, Py_ssize_t n, Py_ssize_t i
) noexcept nogil:
    """Value i of row n."""
    cdef T buffer[1]
    buffer[0] = 0
    return fetch(job, x, job.x_row, n, i, 1, buffer)[0]


cdef inline T* target(
    const Job* job, const T* base, Py_ssize_t pitch, Py_ssize_t n, Py_ssize_t i, T* buffer
) noexcept nogil:
    """Where values i.. of row n are computed: where they belong, or in the buffer."""
    if job.buffered:
        return buffer
    return <T*> (<char*> base + n * pitch + i * job.item)


cdef inline void deliver(
    const Job* job, const T* computed, const T* base, Py_ssize_t pitch,
    Py_ssize_t n, Py_ssize_t i, Py_ssize_t m,
) noexcept nogil:
    """Bring what was computed in a buffer to where it belongs."""
    cdef void* to = <char*> base + n * pitch + i * job.item
    if job.storage != NATIVE:
        if T is float:
            narrow(computed, <uint16_t*> to, m, job.storage)
    elif job.stream:
        stream(to, computed, m * job.item)
    else:
        memcpy(to, computed, m * job.item)
