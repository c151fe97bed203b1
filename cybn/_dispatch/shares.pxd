from cybn._dispatch.arguments cimport Call
from cybn._kernels.problem cimport Problem

cdef int take_shares(Call* c, Problem* p, tuple selected) except -1
