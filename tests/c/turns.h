/* turns.h -- while a slab is reduced, as much of the one before it is applied: counted, for no result can show it. */
#ifndef FASTBN_TESTS_TURNS_H
#define FASTBN_TESTS_TURNS_H

void check_turns(void);

#endif
