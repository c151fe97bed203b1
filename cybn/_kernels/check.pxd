# What the loops take for granted, such as that a piece fits its buffer.
#
# A debug build (CYBN_DEBUG=1) stops the process where that does not hold; in a release nothing is
# left of it. An exception would not do: no kernel can raise one, and a printed one is overlooked.

cdef extern from "<assert.h>" nogil:
    void check "assert"(bint holds) noexcept
