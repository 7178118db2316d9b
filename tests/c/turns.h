/* turns.h -- while a slab is reduced, as much of the one before it is applied: counted, for no result can show it. */
#ifndef FASTBN_TESTS_TURNS_H
#define FASTBN_TESTS_TURNS_H

#include "kernels/kernels.h"

void check_turns(void);

/* Elements of a turn's slab that are applied: a place counts from where its run begins, which is an image's first row
 * where rows touch and there is no gate. */
static inline int64_t turn_done(const fbn_turn *t)
{
    const fbn_place *p = &t->place;
    const int64_t before = p->row * t->span.width;
    return p->image * t->span.rows * t->span.width + (p->at < before || t->span.gate != NULL ? before : 0) + p->at;
}

#endif
