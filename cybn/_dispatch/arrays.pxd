# cython: cdivision=True
# NumPy's arrays as the dispatch reads them: through the fields of their C structure.
#
# To get the shape of an array through Python takes as long as normalizing a thousand values. A View
# is a copy of the fields, so it does not change if another thread changes the shape of the array.

cdef extern from *:
    """
    #define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
    #include <numpy/ndarraytypes.h>
    """
    ctypedef struct PyArrayObject
    enum:
        NPY_FLOAT
        NPY_DOUBLE
        NPY_HALF
        NPY_ARRAY_ALIGNED
        NPY_ARRAY_C_CONTIGUOUS
        NPY_ARRAY_F_CONTIGUOUS
        NPY_ARRAY_WRITEABLE
    int PyArray_TYPE(const PyArrayObject*) noexcept
    int PyArray_FLAGS(const PyArrayObject*) noexcept
    bint PyArray_ISNOTSWAPPED(const PyArrayObject*) noexcept
    int PyArray_NDIM(const PyArrayObject*) noexcept
    Py_ssize_t* PyArray_DIMS(const PyArrayObject*) noexcept
    Py_ssize_t* PyArray_STRIDES(const PyArrayObject*) noexcept
    void* PyArray_DATA(const PyArrayObject*) noexcept
    void PyArray_CLEARFLAGS(PyArrayObject*, int) noexcept

from cybn._kernels.problem cimport SUM_ROW, Storage

cdef enum:
    MOST_AXES = 64          # most axes of a NumPy array

cdef struct View:
    char* data
    bint ready              # aligned native floats, which a kernel can read
    Storage storage         # set if it is ready
    int ndim
    int flags
    Py_ssize_t item, size   # bytes of a value, number of values
    Py_ssize_t shape[MOST_AXES]
    Py_ssize_t strides[MOST_AXES]

cdef struct Fold:           # how an array of any rank becomes (N, C, S) without a copy
    int order[MOST_AXES]    # axes in the order of memory
    int split               # number of these axes that fold into N
    Py_ssize_t N, C, S
    Py_ssize_t pitch        # bytes from one n to the next


cdef inline void extent(const View* v, char** low, char** high) noexcept:
    """Set low and high to the first byte of an array and to the one after its last."""
    cdef int i
    low[0] = v.data
    high[0] = v.data + v.item if v.size else v.data
    for i in range(v.ndim):
        if v.size and v.strides[i] > 0:
            high[0] += (v.shape[i] - 1) * v.strides[i]
        elif v.size:
            low[0] += (v.shape[i] - 1) * v.strides[i]


cdef inline bint apart(const View* a, const View* b) noexcept:
    """Return whether one of two arrays ends in memory before the other begins."""
    cdef char* a0
    cdef char* a1
    cdef char* b0
    cdef char* b1
    extent(a, &a0, &a1)
    extent(b, &b0, &b1)
    return a1 <= b0 or b1 <= a0


cdef inline bint same_shape(const View* a, const View* b) noexcept:
    cdef int i
    if a.ndim != b.ndim:
        return False
    for i in range(a.ndim):
        if a.shape[i] != b.shape[i]:
            return False
    return True


cdef inline bint same_place(const View* a, const View* b) noexcept:
    """Return whether two arrays of the same shape and type are the same values in memory."""
    cdef int i
    if a.data != b.data:
        return False
    for i in range(a.ndim):
        if a.strides[i] != b.strides[i] and a.shape[i] != 1:
            return False
    return True


# ---- (N, C, S) ---------------------------------------------------------------------------

cdef inline Py_ssize_t dense(
    const View* v, const int* order, int first, int last, Py_ssize_t span
) noexcept:
    """Return the bytes of axes order[first:last] if they are dense around `span` bytes, else -1."""
    cdef int k
    for k in range(last - 1, first - 1, -1):
        if v.shape[order[k]] != 1:
            if v.strides[order[k]] != span:
                return -1
            span *= v.shape[order[k]]
    return span


cdef inline bint lies(
    const View* v, const Fold* f, bint gaps, Py_ssize_t* pitch
) noexcept:
    """Return whether an array folds as `f` describes, without a copy; set pitch.

    `gaps` allows gaps between rows of any width.
    """
    cdef int k, last = -1
    cdef Py_ssize_t row = dense(v, f.order, f.split, v.ndim, v.item)
    if row < 0:
        return False
    for k in range(f.split):
        if v.shape[f.order[k]] != 1:
            last = f.order[k]
    if last < 0:
        pitch[0] = row
        return True
    pitch[0] = v.strides[last]
    if not gaps and f.S == 1 and 2 * row <= SUM_ROW * v.item and pitch[0] != row:
        return False        # several rows of few channels are summed as one
    return (pitch[0] >= row and pitch[0] % v.item == 0
            and dense(v, f.order, 0, f.split, pitch[0]) >= 0)


cdef inline void by_stride(const View* v, int first, int last, int* order) noexcept:
    """Sort axes first..last into order[first:last], those with the largest strides first."""
    cdef int i, k
    for i in range(first, last):
        k = i
        while k > first and v.strides[order[k - 1]] < v.strides[i]:
            order[k] = order[k - 1]
            k -= 1
        order[k] = i


cdef inline bint fold(const View* v, int axis, Fold* f) noexcept:
    """Fold an array that is not empty to (N, C, S); return False if this needs a copy."""
    cdef int k
    by_stride(v, 0, v.ndim, f.order)
    f.N = f.S = 1
    f.C = v.shape[axis]
    f.split = 0
    if f.C == 1:                # one channel is one run
        f.S = v.size
        return lies(v, f, False, &f.pitch)
    while f.order[f.split] != axis:
        f.N *= v.shape[f.order[f.split]]
        f.split += 1
    for k in range(f.split + 1, v.ndim):
        f.S *= v.shape[f.order[k]]
    return lies(v, f, False, &f.pitch)


# ---- rows: (N, G, D) -----------------------------------------------------------------------

cdef inline void channels_first(View* v, int axis) noexcept:
    """Move an axis to axis 1."""
    cdef Py_ssize_t size = v.shape[axis], stride = v.strides[axis]
    while axis > 1:
        v.shape[axis], v.strides[axis] = v.shape[axis - 1], v.strides[axis - 1]
        axis -= 1
    v.shape[1], v.strides[1] = size, stride


cdef inline bint fold_rows(
    const View* v, int lead, bint grouped, bint* last, Fold* f
) noexcept:
    """Fold an array into rows; return False if this needs a copy.

    Arrays in C order need none, nor do channels-last arrays if `grouped`.
    """
    cdef int k
    last[0] = False
    f.split, f.S = lead, 0
    by_stride(v, 0, lead, f.order)
    for k in range(lead, v.ndim):
        f.order[k] = k
    if lies(v, f, True, &f.pitch):
        return True
    if not grouped:
        return False
    last[0] = True
    by_stride(v, 2, v.ndim, f.order)        # sort into order[2:], then move to order[1:]
    for k in range(2, v.ndim):
        f.order[k - 1] = f.order[k]
    f.order[v.ndim - 1] = 1
    return lies(v, f, True, &f.pitch)
