/* parallel.h -- run one function on a team of threads. The only file that knows a threading runtime. */
#ifndef FASTBN_PARALLEL_H
#define FASTBN_PARALLEL_H

#include <stdbool.h>

/* The body of a parallel region. It is called once for every tid in 0..team-1 and must give the same result for every
 * team; team may be 1 where more was asked for. Members may run one after another, so they must not wait for each
 * other. */
typedef void (*fbn_task)(int tid, int team, void *context);

enum { FBN_MAX_THREADS = 1024 };

/* Calls task on a team of `threads`, or of 1: when the caller is already inside a parallel region, or another caller
 * holds the team. An OpenMP limit on the calling thread (threadpoolctl) cuts the team to the limit. Returns when every
 * member has finished; members see the caller's floating-point environment. */
void fbn_parallel(int threads, fbn_task task, void *context);

/* Once, at import: fork handlers. */
void fbn_parallel_init(void);

/* Where the team comes from: "pthreads", "openmp" or "serial". */
const char *fbn_parallel_runtime(void);

/* Whether this build sees the parallel regions and limits of other OpenMP programs in the process. */
bool fbn_parallel_sees_openmp(void);

/* The process-wide number, which callers pass to fbn_parallel; 1 until it is set. False, and nothing set, for a number
 * outside 1..FBN_MAX_THREADS. */
bool fbn_set_num_threads(int n);
int fbn_get_num_threads(void);

/* Counters for tests: regions entered with more than one thread, regions that ran serially because the team was taken,
 * and shares that workers of our own took. */
typedef struct {
    long long parallel, contended, helped;
} fbn_parallel_counters;
fbn_parallel_counters fbn_parallel_count(void);

#endif
