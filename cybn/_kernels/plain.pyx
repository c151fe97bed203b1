# cython: language_level=3
# cython: cdivision=True, boundscheck=False, wraparound=False
# Batch normalization by the textbook formulas, compiled: the file to begin with.
#
# x is (N, C, S): N samples, C channels, S positions. Every channel c has its own mean and variance,
# over all n and s. Threads take channels. The numbers in the comments are those of the formulas in
# docs/math.md.
#
# This is slow, and correct for any shape; tests compare the kernels with it. batch_norm.pyx does
# the same, but it processes neighbours in memory together (columns, strips of lanes), takes blocks
# of channels that stay in the caches, and its sums do not lose digits. `pytest bench -k steps`
# measures what each step gains.

from cython.parallel cimport prange
from libc.math cimport sqrt

ctypedef fused T:
    float
    double


def forward(
    const T[:, :, ::1] x,       # IN  (N, C, S)
    const T[::1] gamma,         # IN  (C,)
    const T[::1] beta,          # IN  (C,)
    double eps,
    T[:, :, ::1] y,             # OUT (N, C, S)
    double[::1] mean,           # OUT (C,)
    double[::1] m2,             # OUT (C,) sum of squared deviations: var = m2 / M
    int threads=1,
):
    """Normalize each channel by its own mean and variance."""
    cdef Py_ssize_t N = x.shape[0], C = x.shape[1], S = x.shape[2], n, c, s
    cdef double M = <double> N * S, rstd
    for c in prange(C, nogil=True, num_threads=threads):
        mean[c] = 0
        for n in range(N):
            for s in range(S):
                mean[c] += x[n, c, s] / M                               # (1)
        m2[c] = 0
        for n in range(N):
            for s in range(S):
                m2[c] += (x[n, c, s] - mean[c]) * (x[n, c, s] - mean[c])     # (3)
        rstd = 1 / sqrt(m2[c] / M + eps)                                # (5)
        for n in range(N):
            for s in range(S):
                y[n, c, s] = <T> ((x[n, c, s] - mean[c]) * rstd * gamma[c] + beta[c])    # (7)


def backward(
    const T[:, :, ::1] dy,      # IN  (N, C, S)
    const T[:, :, ::1] x,       # IN  (N, C, S)
    const double[::1] mean,     # IN  (C,)
    const double[::1] m2,       # IN  (C,)
    const T[::1] gamma,         # IN  (C,)
    double eps,
    T[:, :, ::1] dx,            # OUT (N, C, S)
    double[::1] dgamma,         # OUT (C,)
    double[::1] dbeta,          # OUT (C,)
    int threads=1,
):
    """Compute the gradients of forward with respect to x, gamma and beta."""
    cdef Py_ssize_t N = x.shape[0], C = x.shape[1], S = x.shape[2], n, c, s
    cdef double M = <double> N * S, rstd, xhat
    for c in prange(C, nogil=True, num_threads=threads):
        rstd = 1 / sqrt(m2[c] / M + eps)
        dgamma[c] = 0
        dbeta[c] = 0
        for n in range(N):
            for s in range(S):
                xhat = (x[n, c, s] - mean[c]) * rstd                    # (6)
                dgamma[c] += dy[n, c, s] * xhat                         # (13)
                dbeta[c] += dy[n, c, s]                                 # (12)
        for n in range(N):
            for s in range(S):
                xhat = (x[n, c, s] - mean[c]) * rstd
                dx[n, c, s] = <T> (
                    gamma[c] * rstd * (dy[n, c, s] - (dbeta[c] + xhat * dgamma[c]) / M))     # (21)
