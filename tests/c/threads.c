/* threads.c -- many callers of the C interface at once, for ThreadSanitizer and valgrind: no race, no byte read that
 * nobody wrote, and everybody gets the bytes that a lone caller on one thread gets.
 *
 * Usage: threads [seed [runs [tier]]]
 */
#include "check.h"
#include "dispatch.h"
#include "fastbn.h"
#include "parallel.h"
#include "plan.h"
#include "recycle.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CALLERS = 4, PROBLEMS = 24, MOST_THREADS = 4 };

typedef enum { MOMENTS, FORWARD, NORMALIZE, APPLY, REDUCE, BACKWARD_APPLY, BACKWARD, COPY, ENTRIES } entry;

/* What a call writes. */
typedef struct {
    void *y, *extra;
    uint8_t *gate;
    double *stats[4];
    size_t bytes, gate_bytes, channels;
} results;

/* What callers share, and only read. */
typedef struct {
    fbn_geometry g;
    fbn_act act;
    fbn_tensor x, other;
    fbn_affine affine;
    fbn_prepared *prepared;
    uint8_t *gate; /* of a forward; NULL where the sign is recomputed */
    double *sums[2];
    results expected[ENTRIES];
} problem;

static void *allocate(size_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
    if (p == NULL) {
        perror("aligned_alloc");
        exit(2);
    }
    memset(p, 0, bytes);
    return p;
}

static results results_make(const problem *p)
{
    results r = {.bytes = (size_t)(p->g.outer * p->g.channels * p->g.inner * fbn_dtype_size(p->g.dtype)),
                 .gate_bytes = (size_t)fbn_gate_bytes(&p->g),
                 .channels = (size_t)p->g.channels};
    r.y = allocate(r.bytes);
    r.extra = allocate(r.bytes);
    r.gate = allocate(r.gate_bytes);
    for (int i = 0; i < 4; i++) {
        r.stats[i] = allocate(r.channels * sizeof(double));
    }
    return r;
}

static void results_free(results *r)
{
    free(r->y);
    free(r->extra);
    free(r->gate);
    for (int i = 0; i < 4; i++) {
        free(r->stats[i]);
    }
}

static bool results_equal(const results *a, const results *b)
{
    bool same = memcmp(a->y, b->y, a->bytes) == 0 && memcmp(a->extra, b->extra, a->bytes) == 0 &&
                memcmp(a->gate, b->gate, a->gate_bytes) == 0;
    for (int i = 0; i < 4; i++) {
        same = same && memcmp(a->stats[i], b->stats[i], a->channels * sizeof(double)) == 0;
    }
    return same;
}

static fbn_tensor contiguous(const fbn_geometry *g, void *data)
{
    return (fbn_tensor){data, g->channels * g->inner, g->family == FBN_ROWS ? g->inner : 1};
}

static fbn_status run(const problem *p, entry e, int threads, results *r)
{
    const fbn_geometry *g = &p->g;
    const fbn_tensor *residual = p->gate == NULL ? NULL : &p->other;
    fbn_tensor y = contiguous(g, r->y);
    fbn_tensor extra = contiguous(g, r->extra);
    fbn_moments moments = {0, r->stats[0], r->stats[1], r->stats[2]};
    uint8_t *gate = p->gate == NULL ? NULL : r->gate;
    switch (e) {
    case MOMENTS: return fbn_moments_of(g, p->x, threads, &moments);
    case FORWARD: return fbn_forward(g, p->x, residual, y, gate, &p->affine, p->act, threads, &moments, r->stats[3]);
    case NORMALIZE: return fbn_normalize(g, p->x, residual, y, gate, &p->affine, p->act, threads);
    case APPLY: return fbn_apply(g, p->x, residual, y, gate, p->prepared, p->act, threads);
    case REDUCE:
        return fbn_backward_reduce(g, p->x, p->other, p->gate, &p->affine, p->act, threads, r->stats[0], r->stats[1]);
    case BACKWARD_APPLY:
        return fbn_backward_apply(g, p->x, p->other, y, &extra, p->gate, &p->affine, p->act, p->sums[0], p->sums[1],
                                  (double)(g->outer * g->inner), threads);
    case BACKWARD:
        return fbn_backward(g, p->x, p->other, y, &extra, p->gate, &p->affine, p->act, true, threads, r->stats[0],
                            r->stats[1]);
    default: return fbn_copy(p->x.data, r->y, (int64_t)r->bytes, threads);
    }
}

static double *draw_doubles(int64_t n, double low, double high, rng *r)
{
    double *p = allocate((size_t)n * sizeof *p);
    for (int64_t i = 0; i < n; i++) {
        p[i] = low + (high - low) * (rng_unit(r) + 1.0) / 2.0;
    }
    return p;
}

static void *draw_data(const fbn_geometry *g, rng *r)
{
    int64_t n = g->outer * g->channels * g->inner;
    void *p = allocate((size_t)(n * fbn_dtype_size(g->dtype)));
    for (int64_t i = 0; i < n; i++) {
        if (g->dtype == FBN_F64) {
            ((double *)p)[i] = rng_unit(r);
        } else if (g->dtype == FBN_F32) {
            ((float *)p)[i] = (float)rng_unit(r);
        } else { /* any finite number of either type, of either sign */
            ((uint16_t *)p)[i] = (uint16_t)(rng_next(r) & 0xbbff);
        }
    }
    return p;
}

/* Half of the problems are large enough for a team. */
static void draw_problem(problem *p, int index, rng *r)
{
    p->g.dtype = (fbn_dtype)(index % FBN_DTYPE_COUNT);
    p->g.family = index / FBN_DTYPE_COUNT % 2 == 0 ? FBN_ROWS : FBN_COLS;
    int64_t elements = (index % 3 == 0 ? 1 << 11 : 150 << 10) / fbn_dtype_size(p->g.dtype);
    p->g.channels = rng_between(r, 3, 40);
    p->g.inner = p->g.family == FBN_COLS ? 1 : rng_one_in(r, 2) ? rng_between(r, 1, 60) : rng_between(r, 500, 5000);
    p->g.outer = 1 + elements / (p->g.channels * p->g.inner);
    p->act = (fbn_act){(fbn_activation)rng_below(r, FBN_ACTIVATION_COUNT), 0.1};
    p->x = contiguous(&p->g, draw_data(&p->g, r));
    p->other = contiguous(&p->g, draw_data(&p->g, r));
    p->affine = (fbn_affine){.mean = draw_doubles(p->g.channels, -1.0, 1.0, r),
                             .var = draw_doubles(p->g.channels, 0.5, 2.0, r),
                             .weight = draw_doubles(p->g.channels, -1.0, 1.0, r),
                             .bias = draw_doubles(p->g.channels, -1.0, 1.0, r),
                             .eps = 1e-5};
    p->sums[0] = draw_doubles(p->g.channels, -1.0, 1.0, r);
    p->sums[1] = draw_doubles(p->g.channels, -1.0, 1.0, r);
    check(fbn_prepare(p->g.dtype, p->g.channels, &p->affine, &p->prepared) == FBN_OK, "prepare");
    if (rng_one_in(r, 2)) {
        results once = results_make(p);
        p->gate = once.gate; /* makes this call, and later ones, write and read a gate */
        check(run(p, NORMALIZE, 1, &once) == FBN_OK, "forward with a gate");
        once.gate = NULL;
        results_free(&once);
    }
    for (int e = 0; e < ENTRIES; e++) {
        p->expected[e] = results_make(p);
        check(run(p, (entry)e, 1, &p->expected[e]) == FBN_OK, "entry %d on one thread", e);
    }
}

static problem problems[PROBLEMS];
static pthread_mutex_t counting = PTHREAD_MUTEX_INITIALIZER;

typedef struct {
    rng r;
    long runs;
} caller;

enum { RECYCLE_LIMIT = 2 << 20 };

/* Memory of one of a few sizes, marked at both ends, which must be as it was when it is left. */
static void *mark(caller *c, uint64_t stamp, size_t *bytes)
{
    *bytes = (size_t)FBN_RECYCLED * (size_t)rng_between(&c->r, 1, 3);
    char *p = fbn_recycle_malloc(*bytes);
    if (p != NULL) {
        memcpy(p, &stamp, sizeof stamp);
        memcpy(p + *bytes - sizeof stamp, &stamp, sizeof stamp);
    }
    return p;
}

static bool unmark(caller *c, char *p, uint64_t stamp, size_t bytes)
{
    bool same = p != NULL && (uintptr_t)p % 64 == 0 && memcmp(p, &stamp, sizeof stamp) == 0 &&
                memcmp(p + bytes - sizeof stamp, &stamp, sizeof stamp) == 0;
    if (rng_one_in(&c->r, 8)) {
        p = fbn_recycle_realloc(p, (size_t)rng_between(&c->r, 8, 4 * FBN_RECYCLED));
        same = same && p != NULL && memcmp(p, &stamp, sizeof stamp) == 0;
    }
    fbn_recycle_free(p);
    if (rng_one_in(&c->r, 500)) {
        fbn_recycle_clear();
    }
    return same && fbn_recycle_look().idle <= RECYCLE_LIMIT;
}

static void *call_many(void *argument)
{
    caller *c = argument;
    for (long i = 0; i < c->runs; i++) {
        size_t bytes;
        uint64_t stamp = rng_next(&c->r);
        void *marked = mark(c, stamp, &bytes);
        int index = (int)rng_below(&c->r, PROBLEMS);
        const problem *p = &problems[index];
        entry e = (entry)rng_below(&c->r, ENTRIES);
        int threads = (int)rng_between(&c->r, 1, MOST_THREADS);
        results r = results_make(p);
        fbn_status status = run(p, e, threads, &r);
        bool same = results_equal(&r, &p->expected[e]);
        results_free(&r);
        bool kept = unmark(c, marked, stamp, bytes);
        pthread_mutex_lock(&counting);
        check(kept, "recycled memory changed under its owner, or too much of it lies idle");
        check(status == FBN_OK && same, "entry %d on problem %d with %d threads: status %d, %s bytes", (int)e, index,
              threads, (int)status, same ? "equal" : "other");
        pthread_mutex_unlock(&counting);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    uint64_t seed = check_seed(argc, argv);
    long runs = argc > 2 ? atol(argv[2]) : 10000;
    rng r = {seed};
    pthread_t threads[CALLERS];
    caller callers[CALLERS];
    /* ThreadSanitizer sees every access of plain C, not every one of intrinsics. */
    const char *tier = argc > 3 ? argv[3] : "scalar";
    check(fbn_dispatch(tier), "tier %s", tier);
    fbn_parallel_init();
    fbn_recycle_init();
    check(fbn_recycle_set(RECYCLE_LIMIT, 1) && !fbn_recycle_set(-1, 1), "recycle_set");
    for (int i = 0; i < PROBLEMS; i++) {
        draw_problem(&problems[i], i, &r);
    }
    for (int i = 0; i < CALLERS; i++) {
        callers[i] = (caller){{rng_next(&r)}, runs / CALLERS};
        if (pthread_create(&threads[i], NULL, call_many, &callers[i]) != 0) {
            perror("pthread_create");
            return 2;
        }
    }
    for (int i = 0; i < CALLERS; i++) {
        pthread_join(threads[i], NULL);
    }
    fbn_parallel_counters n = fbn_parallel_count();
    printf("%lld calls ran on a team, %lld found it taken, workers took %lld shares\n", n.parallel, n.contended,
           n.helped);
    check(n.parallel > 0 && n.contended > 0 && n.helped > 0, "no team, or no contention for it");
    fbn_recycle_state memory = fbn_recycle_look();
    printf("%lld blocks made, %lld served again\n", memory.made, memory.reused);
    check(memory.reused > memory.made, "memory was not recycled");
    check(fbn_recycle_clear() == memory.idle && fbn_recycle_look().blocks == 0, "idle memory was not given back");
    return check_report();
}
