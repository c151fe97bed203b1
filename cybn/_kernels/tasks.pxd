# cython: cdivision=True
# Which thread takes which tasks of a loop.
#
# Each thread has a share of the tasks, neighbours in memory, and takes them one by one; with none
# left it goes on with those of others. So a thread finds in its own L2 what it read in the loop
# before, and one that is kept from running holds up nobody. Results do not depend on it.

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
    SHARES = 64                 # at most; threads beyond share a share

cdef struct Share:
    long long taken             # how many of its tasks
    long long room[7]           # so that each has a cache line of its own

cdef struct Tasks:              # of one loop
    Py_ssize_t total
    Py_ssize_t shares           # in how many they are cut
    bint down                   # the last task of a share first
    Share share[SHARES]


cdef inline void deal(Tasks* tasks, Py_ssize_t total, Py_ssize_t threads, bint down) noexcept nogil:
    """Cut the tasks of a loop into a share a thread."""
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
    """A task that nobody has yet, of the thread's own share first; -1 at the end."""
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
