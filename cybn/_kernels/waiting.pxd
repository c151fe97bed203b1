# cython: cdivision=True
# How long a call waits for its threads, and when it does without them.
#
# A region of OpenMP ends when its last thread does, and the threads of libgomp spin for
# milliseconds between regions. Where another process keeps the cores busy, a thread that is wanted
# may not run for as long: a call of 0.1 ms then takes 10 to 50. So a call measures how much of its
# time the calling thread spent on work. Where it waited far longer than it worked, calls stay on
# one thread for a while, which is longer each time that this happens soon again. Results do not
# depend on it.

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

cdef struct Watch:              # of one call; times in seconds
    double begun                # when
    double took
    double worked               # of these, on tasks of the calling thread


cdef inline double begun(const Watch* watch) noexcept nogil:
    """The time, if the thread that called begins a task; else 0."""
    return seconds() if watch != NULL and threadid() == 0 else 0


cdef inline void ended(Watch* watch, double since) noexcept nogil:
    """Note that a task has ended that began then."""
    if since != 0:
        watch.worked += seconds() - since


cdef struct Patience:           # of all calls of a process
    double until                # when calls may use several threads again
    double pause                # seconds for which they did not, or will not, the next time


cdef inline int threads_now(Patience* patience, int threads) noexcept:
    """How many threads a call is to have of those that it may have."""
    if threads > 1 and patience.until != 0:
        if seconds() < patience.until:
            return 1
        patience.until = 0
    return threads


cdef inline void learn(Patience* patience, const Watch* watch) noexcept:
    """Take note of a call on several threads."""
    cdef double waited = watch.took - watch.worked
    if waited > 3e-4 and waited > 2 * watch.worked:
        patience.pause = min(1.0, max(0.02, 2 * patience.pause))
        patience.until = seconds() + patience.pause
    else:
        patience.pause *= 0.98
