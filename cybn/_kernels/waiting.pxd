# cython: cdivision=True
# How long a call waits for its threads, and when calls use one thread instead.
#
# A parallel region of OpenMP ends when its last thread ends, and the threads of libgomp spin for
# milliseconds between regions. If another process keeps the cores busy, a thread of the region may
# wait as long for a core: a call of 0.1 ms then takes 10 to 50 ms. So a call measures how much of
# its time the calling thread spent on work. If that thread waited far longer than it worked, calls
# use one thread during a pause. The pause is longer each time this soon happens again. Results do
# not depend on the number of threads.

from cython.parallel cimport threadid

cdef extern from * nogil:
    """
    #include <time.h>
    static double cybn_seconds(void) {
        struct timespec t;
    #ifdef CLOCK_MONOTONIC
        clock_gettime(CLOCK_MONOTONIC, &t);
    #else
        timespec_get(&t, TIME_UTC);
    #endif
        return (double) t.tv_sec + 1e-9 * (double) t.tv_nsec;
    }
    """
    double seconds "cybn_seconds"()

cdef struct Watch:              # times of one call, in seconds
    double begun                # when it began
    double took
    double worked               # part of `took` that the calling thread spent on tasks


cdef inline double begun(const Watch* watch) noexcept nogil:
    """Return the time at which the calling thread begins a task; 0 for other threads."""
    return seconds() if watch != NULL and threadid() == 0 else 0


cdef inline void ended(Watch* watch, double since) noexcept nogil:
    """Add the time of a task that has ended, and that began at `since`."""
    if since != 0:
        watch.worked += seconds() - since


cdef struct Patience:           # of all calls of a process
    double until                # when calls may use several threads again
    double pause                # seconds of the last pause; decays, and the next is twice as long


cdef inline int threads_now(Patience* patience, int threads) noexcept:
    """Return how many threads a call uses, at most `threads`."""
    if threads > 1 and patience.until != 0:
        if seconds() < patience.until:
            return 1
        patience.until = 0
    return threads


cdef inline void learn(Patience* patience, const Watch* watch) noexcept:
    """Update the pause after a call on several threads."""
    cdef double waited = watch.took - watch.worked
    if waited > 3e-4 and waited > 2 * watch.worked:
        patience.pause = min(1.0, max(0.02, 2 * patience.pause))
        patience.until = seconds() + patience.pause
    else:
        patience.pause *= 0.98
