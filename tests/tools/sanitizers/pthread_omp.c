/* OpenMP on plain POSIX threads, for ThreadSanitizer: those functions that the kernels call.

   GNU's libgomp keeps its threads between parallel regions, and they wait on futexes, which no
   sanitizer sees. ThreadSanitizer would report each parallel loop as racing with the one before.
   Here each region starts its threads and joins them, which ThreadSanitizer sees. Nothing else
   orders the threads, so it reports two iterations that touch the same bytes, whichever thread
   runs them. Chunks go round in turn, so every thread gets some, however loaded the machine is.
   This library must be loaded before libgomp. */

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>

enum { MOST = 64 };

struct team {
    void (*body)(void *);
    void *data;
    long size;
    pthread_barrier_t barrier;
};

struct member {
    struct team *team;
    long number;            /* number of this thread in its team */
    long next, end, chunk;  /* bounds of the current loop */
};

static _Thread_local struct member self;

static void begin(long start, long end, long increment, long chunk) {
    if (increment != 1) abort();
    self.next = start + self.number * chunk;
    self.end = end;
    self.chunk = chunk;
}

static bool take(long *from, long *to) {
    if (self.next >= self.end) return false;
    *from = self.next;
    *to = self.end - self.next < self.chunk ? self.end : self.next + self.chunk;
    self.next += self.team->size * self.chunk;
    return true;
}

static void *work(void *member) {
    self = *(struct member *)member;
    self.team->body(self.team->data);
    return NULL;
}

static void region(void (*body)(void *), void *data, unsigned size, long end, long chunk) {
    struct member before = self, members[MOST];
    struct team team;
    pthread_t threads[MOST];
    team.body = body;
    team.data = data;
    team.size = before.team ? 1 : size == 0 ? 2 : size < MOST ? size : MOST;
    pthread_barrier_init(&team.barrier, NULL, (unsigned)team.size);
    for (long i = team.size - 1; i >= 0; i--) {
        members[i] = (struct member){&team, i, i * chunk, end, chunk};
        if (i && pthread_create(&threads[i], NULL, work, &members[i])) abort();
    }
    work(&members[0]);
    for (long i = 1; i < team.size; i++) pthread_join(threads[i], NULL);
    self = before;
    pthread_barrier_destroy(&team.barrier);
}

void GOMP_parallel(void (*body)(void *), void *data, unsigned size, unsigned flags) {
    (void)flags;
    region(body, data, size, 0, 1);
}

void GOMP_parallel_loop_nonmonotonic_dynamic(
    void (*body)(void *), void *data, unsigned size, long start, long end, long increment,
    long chunk, unsigned flags)
{
    (void)flags;
    if (start != 0 || increment != 1) abort();
    region(body, data, size, end, chunk);
}

bool GOMP_loop_nonmonotonic_dynamic_start(
    long start, long end, long increment, long chunk, long *from, long *to)
{
    begin(start, end, increment, chunk);
    return take(from, to);
}

bool GOMP_loop_nonmonotonic_dynamic_next(long *from, long *to) { return take(from, to); }

void GOMP_barrier(void) {
    if (self.team) pthread_barrier_wait(&self.team->barrier);
}

void GOMP_loop_end_nowait(void) {}

void GOMP_loop_end(void) { GOMP_barrier(); }

int omp_get_thread_num(void) { return (int)self.number; }

int omp_get_num_threads(void) { return self.team ? (int)self.team->size : 1; }

int omp_get_max_threads(void) { return 2; }

int omp_get_thread_limit(void) { return MOST; }
