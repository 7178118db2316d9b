/* parallel.h -- run one function on a team of threads. The only file that knows a threading runtime. */
#ifndef FASTBN_PARALLEL_H
#define FASTBN_PARALLEL_H

#include <stdbool.h>

/* The body of a parallel region. It is called once for every tid in 0..team-1 and must give the same result for every
 * team; team may be 1 where more was asked for. */
typedef void (*fbn_task)(int tid, int team, void *context);

/* Calls task on a team of at most `threads`. The team is 1 or `threads`, never in between: a runtime that keeps one pool
 * rebuilds it when the size changes. It is 1 when the caller is already inside a parallel region or when another caller
 * holds the team. Returns when every member has finished. */
void fbn_parallel(int threads, fbn_task task, void *context);

/* Once, at import: fork handlers. */
void fbn_parallel_init(void);

/* What threading this build has: "openmp" or "serial". */
const char *fbn_parallel_runtime(void);

/* Counters for tests: regions entered with more than one thread, and regions that ran serially because the team was
 * taken. */
typedef struct {
    long long parallel, contended;
} fbn_parallel_counters;
fbn_parallel_counters fbn_parallel_count(void);

#endif
