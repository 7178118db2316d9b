/* dispatch.h -- which ISA's kernels are in use. */
#ifndef FASTBN_DISPATCH_H
#define FASTBN_DISPATCH_H

#include "fastbn.h"
#include "kernels/kernels.h"

/* Chooses the best tier that this machine can run, no better than `cap` (NULL: no cap). Once, at import: returns false,
 * and changes nothing, for a name that is not known or not runnable. */
bool fbn_dispatch(const char *cap);

/* The i-th known tier, best first; NULL past the end. */
typedef struct {
    const char *name;
    bool built, runnable;
} fbn_tier;
const fbn_tier *fbn_tier_at(int i);

/* Whether prefetches by software are in the way of this machine's own; see fbn_machine. */
bool fbn_follows_runs(void);

const char *fbn_isa_name(void);
const fbn_kernels *fbn_kernels_for(fbn_dtype dtype);

#endif
