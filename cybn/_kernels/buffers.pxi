# Plain arrays as the buffer protocol has them: about 0.06 us each, a typed memoryview takes 0.3.

from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer)

from numpy import ndarray


cdef bint take(object array, Py_buffer* view, int flags):
    """Take the buffer of a plain array; False where it is not one."""
    if type(array) is not ndarray:
        return False
    try:
        PyObject_GetBuffer(array, view, flags)
    except (BufferError, ValueError):
        return False
    return True


cdef inline bint is_float(const Py_buffer* v) noexcept:
    """Whether the values are native, aligned float32 or float64."""
    return (
        v.format != NULL and (v.format[0] == b"f" or v.format[0] == b"d") and v.format[1] == 0
        and <size_t> v.buf % <size_t> v.itemsize == 0)


cdef inline bint apart(const Py_buffer* a, const Py_buffer* b) noexcept:
    """Whether two buffers share no byte."""
    return <char*> a.buf + a.len <= <char*> b.buf or <char*> b.buf + b.len <= <char*> a.buf
