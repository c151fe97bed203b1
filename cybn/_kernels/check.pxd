# Assertions of what the loops assume, for example that a piece fits its buffer.
#
# A debug build (CYBN_DEBUG=1) stops the process if one fails; a release build leaves them out.
# Kernels cannot raise an exception, and one that is only printed is easily overlooked.

cdef extern from "<assert.h>" nogil:
    void check "assert"(bint holds) noexcept
