/* pass.h -- the two walks over a tensor that every operation is made of: reduce channels, apply to elements. */
#ifndef FASTBN_PASS_H
#define FASTBN_PASS_H

#include "coef.h"
#include "plan.h"

/* Everything a walk needs. x is read by all; `other` is the residual of normalize and dy of a backward; y is what an
 * apply writes; extra is the gradient of the residual. Absent tensors have NULL data. */
typedef struct {
    fbn_geometry g;
    fbn_plan plan;
    const fbn_kernels *kernels;
    fbn_tensor x, other, y, extra;
    uint16_t *gate;
    fbn_gate_rule rule;
    bool backward;
} fbn_pass;

/* Statistics of all channels while they are being made: the moments, or with `backward` the two sums. Strips are what
 * different threads may reduce, combined in their order whoever did them. */
typedef struct {
    int64_t strips;
    double *a, *b, *c; /* mean, lo, m2; or sum_dy, sum_dy_xmu, unused: [strip][channel] */
} fbn_partials;

int64_t fbn_gate_words(const fbn_geometry *g); /* of one row (rows: of one run) */

/* What one thread works in. */
typedef struct {
    fbn_coefs panel; /* expanded coefficients */
    void *tile;      /* the sums of several channels */
    fbn_turn *turn;  /* the slab before the one that is reduced, where it is not applied yet; else NULL */
} fbn_room;

/* Reduces the strips of channels [first, last) that are this part's. `mean` and coefs are for a backward. */
void fbn_reduce(const fbn_pass *pass, fbn_partials *p, const double *mean, const fbn_coefs *coefs, fbn_room *room,
                int64_t first, int64_t last, int64_t part, int64_t parts);

/* Combines the strips of channels [first, last): the results are in row 0. */
void fbn_combine(const fbn_pass *pass, fbn_partials *p, int64_t first, int64_t last);

/* Applies to this part of all elements. */
void fbn_apply_pass(const fbn_pass *pass, const fbn_coefs *coefs, fbn_room *room, int64_t part, int64_t parts);

/* A pass and the memory that it works in. */
typedef struct {
    fbn_pass pass;
    fbn_partials partials;
    fbn_coefs coefs;
    fbn_room *rooms; /* one a thread */
    fbn_room one;    /* where there is one thread */
    void *memory;    /* of all of these */
} fbn_work;

/* For a work that is zeroed but for its pass. On failure nothing is left to free. */
enum { FBN_NEEDS_NOTHING = 0, FBN_NEEDS_SUMS = 1, FBN_NEEDS_COEFS = 2 };
fbn_status fbn_work_begin(fbn_work *w, int needs);
void fbn_work_end(fbn_work *w);

/* Reduces and applies every slab of this thread's share. Of an operation it needs to know what coefficients a reduce
 * takes (NULL: none), and those that follow from combined partials. */
typedef struct {
    void (*ready)(void *context, fbn_coefs *coefs, int64_t first, int64_t last);
    void (*settle)(void *context, fbn_coefs *coefs, int64_t first, int64_t last);
} fbn_slab_steps;
void fbn_each_slab(fbn_work *w, const double *mean, const fbn_slab_steps *steps, void *context, int tid, int team);

/* Fills in plan, kernels and rule; false for sizes, strides or an activation that make no sense. */
bool fbn_pass_ready(fbn_pass *pass, const fbn_geometry *g, fbn_act act, fbn_op op, int threads);

#endif
