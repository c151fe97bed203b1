# cython: cdivision=True
# Which thread takes which tasks of a loop.
#
# Each thread has a share of the tasks, which are neighbours in memory, and takes them one by one.
# When none are left, it takes tasks of other threads. So a thread finds in its own L2 what it read
# in the loop before, and a thread that waits for a core does not delay the others. Results do not
# depend on which thread takes a task.

cdef extern from * nogil:
    """
    #if defined(_MSC_VER) && !defined(__clang__)
    #include <intrin.h>
    static __inline long long cybn_take(long long *taken) {
        return _InterlockedExchangeAdd64(taken, 1);
    }
    #else
    static inline long long cybn_take(long long *taken) {
        return __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED);
    }
    #endif
    """
    long long take "cybn_take"(long long* taken)

cdef enum:
    SHARES = 64                 # most shares; further threads use the same ones

cdef struct Share:
    long long taken             # number of its tasks that threads have taken
    long long room[7]           # so that each share has a cache line of its own

cdef struct Tasks:              # the tasks of one loop
    Py_ssize_t total
    Py_ssize_t shares           # number of shares
    bint down                   # take the last task of a share first
    Share share[SHARES]


cdef inline void deal(Tasks* tasks, Py_ssize_t total, Py_ssize_t threads, bint down) noexcept nogil:
    """Divide the tasks of a loop into one share per thread."""
    cdef Py_ssize_t k
    tasks.total, tasks.down = total, down
    tasks.shares = max(1, min(total, min(threads, SHARES)))
    for k in range(tasks.shares):
        tasks.share[k].taken = 0


cdef inline Py_ssize_t next_task(
    Tasks* tasks,
    Py_ssize_t thread,
    Py_ssize_t* emptied,        # IO  shares in which this thread found no task left
) noexcept nogil:
    """Return a task that no thread has taken, first from the thread's share; -1 if none is left."""
    cdef Py_ssize_t k, first, last, i
    while emptied[0] < tasks.shares:
        k = (thread + emptied[0]) % tasks.shares
        first = k * tasks.total // tasks.shares
        last = (k + 1) * tasks.total // tasks.shares - 1
        i = take(&tasks.share[k].taken)
        if i <= last - first:
            return last - i if tasks.down else first + i
        emptied[0] += 1
    return -1
