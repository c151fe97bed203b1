# cython: language_level=3
# cython: cdivision=True, boundscheck=False, wraparound=False
# Batch normalization as a textbook would compile it: the page to begin with.
#
# x is (N, C, S): N samples, C channels, S positions. Every channel c has a mean and a variance of
# its own, over all n and s. Threads take channels; a channel is read twice. The numbers are those
# of docs/math.md.
#
# This is slow, and right for any shape: tests hold the kernels against it. batch_norm.pyx does the
# same with values that are neighbours in memory done together (columns, strips of lanes), with
# blocks of channels that stay in the caches, and with sums that do not lose digits. What each step
# gains is measured by `pytest bench -k steps`.

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
    """Gradients of forward with respect to x, gamma and beta."""
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
