# cython: language_level=3
# Features of the machine and of the build. No other file names OpenMP and CPU features.

cdef extern from * nogil:
    """
    #ifdef _OPENMP
    #include <omp.h>
    #define CYBN_OPENMP _OPENMP
    #else
    #define CYBN_OPENMP 0
    static int omp_get_max_threads(void) { return 1; }
    static int omp_get_thread_limit(void) { return 1; }
    #endif

    #if defined(__x86_64__) && defined(__GNUC__)
    #include <cpuid.h>

    /* Check all that x86-64-v3 adds to v2. The builtins also ask the operating system about AVX.
       Only in recent compilers do they know the names of LZCNT, MOVBE and F16C. */
    static int cybn_has_v3(void) {
        unsigned a, b, c, d;
        __builtin_cpu_init();
        if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_MOVBE) || !(c & bit_F16C)) return 0;
        if (!__get_cpuid(0x80000001, &a, &b, &c, &d) || !(c & (1 << 5))) return 0;  /* LZCNT */
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
            && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    }

    /* Check all that x86-64-v4 adds to v3. The builtins also ask the operating system. */
    static int cybn_has_v4(void) {
        return cybn_has_v3() && __builtin_cpu_supports("avx512f")
            && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd")
            && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
    #else
    static int cybn_has_v3(void) { return 0; }
    static int cybn_has_v4(void) { return 0; }
    #endif

    #ifndef CYBN_BUILD
    #define CYBN_BUILD "release"
    #endif
    """
    const char* CYBN_BUILD
    int CYBN_OPENMP
    int omp_get_max_threads()
    int omp_get_thread_limit()
    int cybn_has_v3()
    int cybn_has_v4()


def build():
    """Return the kind of build: "release", or the names of the checks that were compiled in."""
    return CYBN_BUILD.decode()


def openmp():
    """Return the date (yyyymm) of the OpenMP specification of the build; 0 without OpenMP."""
    return CYBN_OPENMP


def max_threads():
    """Return how many threads OpenMP would use now.

    This depends on OMP_NUM_THREADS, OMP_THREAD_LIMIT, the affinity and threadpoolctl.
    """
    return min(omp_get_max_threads(), omp_get_thread_limit())


def has_v3():
    """Return whether this CPU and its operating system run x86-64-v3 code."""
    return bool(cybn_has_v3())


def has_v4():
    """Return whether this CPU and its operating system run x86-64-v4 code."""
    return bool(cybn_has_v4())
