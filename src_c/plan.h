/* plan.h -- all policy in one place: how a call is cut up, by how many threads, and what goes past the cache.
 *
 * A plan never changes a result, only its cost: the mathematics fixes its own blocks (kernels/channel.h).
 */
#ifndef FASTBN_PLAN_H
#define FASTBN_PLAN_H

#include "fastbn.h"

typedef enum {
    FBN_PLAN_MOMENTS,
    FBN_PLAN_FORWARD,
    FBN_PLAN_NORMALIZE,
    FBN_PLAN_REDUCE,
    FBN_PLAN_BACKWARD,
    FBN_PLAN_APPLY
} fbn_op;

/* What the plan knows of the machine. */
typedef struct {
    int64_t l2, l3; /* bytes */
    bool follows;   /* its own prefetchers keep up with long runs: those of a program take up their places */
} fbn_machine;

/* What the plan must know of a call beside its geometry. */
typedef struct {
    fbn_op op;
    int threads;   /* the most that may be used */
    bool gated;    /* a gate is read or written */
    bool adjacent; /* rows: planes of neighbouring channels touch; cols: rows touch. In every tensor of the call */
    bool aligned;  /* rows: runs of the result begin at one place of a cache line; at its beginning, where a gate or the
                    * kernels ask for it */
    bool beside;   /* there are kernels that apply a slab side by side with the sums of another */
    int tensors;   /* that are read or written */
} fbn_call;

typedef struct {
    int team;       /* 1 or call.threads */
    int64_t slab;   /* the most channels reduced and applied together while in cache; 0: two sweeps over all */
    int64_t slabs;  /* so many, as even as they can be, and as many for every thread */
    int64_t grain;  /* each begins with a multiple of so many channels */
    int64_t tile;   /* channels that one reduce step sums side by side */
    int64_t panel;  /* as one row with coefficients for every place: rows: of tiny planes, cols: rows; 0: none */
    int64_t side;   /* what one apply step covers: rows: neighbours, one run where they touch; cols: rows, or panels.
                     * With turns there are no such steps */
    int64_t piece;  /* and so much of each: elements; rows in panels: images */
    int64_t images; /* and of so many images; of panels, and in the cols family, 1 */
    int64_t turn;   /* so many elements of a slab are applied after as many of the next are reduced; 0: no turns */
    bool beside;    /* with turns: side by side instead, where a kernel can */
    bool stream;    /* the output is written past the cache */
    bool backwards; /* an apply walk starts where the reduce before it ended: least of it has left the cache */
    int64_t ahead;  /* an apply prefetches what lies so many channels on; 0: what comes next in its run */
    int64_t soon;   /* bytes to that; 0: then nothing */
    int64_t fetch;  /* a reduce prefetches what lies so many bytes on in its runs; 0: nothing */
} fbn_plan;

fbn_plan fbn_make_plan(const fbn_geometry *g, const fbn_call *call, const fbn_machine *machine);

/* This machine's caches, or common sizes where it does not tell. Read once, at import; `follows` is the dispatch's
 * knowledge. */
void fbn_machine_init(bool follows);
const fbn_machine *fbn_this_machine(void);

int64_t fbn_dtype_size(fbn_dtype dtype);

#endif
