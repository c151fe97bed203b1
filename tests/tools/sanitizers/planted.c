/* Faults that a sanitizer must report, and one loop without a fault, which test the set-up. */

#include <stdlib.h>

#define LENGTH 100000

long racing_sum(void) {
    long sum = 0;
    #pragma omp parallel num_threads(2)
    {
        #pragma omp for schedule(dynamic, 100)
        for (long i = 0; i < LENGTH; i++) sum += i;
    }
    return sum;
}

long ordered_sum(void) {
    static long parts[LENGTH];
    long sum = 0;
    #pragma omp parallel num_threads(2)
    {
        #pragma omp for schedule(dynamic, 100)
        for (long i = 0; i < LENGTH; i++) parts[i] = i;
        #pragma omp for schedule(dynamic, 100)
        for (long i = 0; i < LENGTH; i++) parts[LENGTH - 1 - i] += 1;
    }
    for (long i = 0; i < LENGTH; i++) sum += parts[i];
    return sum;
}

long past_the_end(void) {
    volatile char *bytes = malloc(3);
    return bytes[3];
}

long past_the_stack(long n) {
    volatile float piece[32];
    for (long i = 0; i < n; i++) piece[i] = 0;
    return (long)piece[0];
}

long overflow(long n) { return n * n; }

long misaligned(long offset) {
    char *bytes = calloc(16, 1);
    return (long)*(float *)(bytes + offset);
}
