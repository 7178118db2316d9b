/* recycle.h -- memory for results: what nobody holds any more serves the next call.
 *
 * malloc maps large memory anew each time and gives it back with every free, so that a new result costs a fault a page:
 * more than the call that writes it. Here some of it is kept, up to a limit.
 */
#ifndef FASTBN_RECYCLE_H
#define FASTBN_RECYCLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Memory of at least so many bytes is kept; with less, malloc does well by itself. */
enum { FBN_RECYCLED = 256 << 10 };

/* As malloc, realloc and free, for any size and from any thread. Begins with a cache line, and with a large page where
 * it is large. */
void *fbn_recycle_malloc(size_t bytes);
void *fbn_recycle_realloc(void *p, size_t bytes);
void fbn_recycle_free(void *p);

/* The bytes that may lie idle, 0 to keep none, and the seconds after which idle memory is old: then the next malloc or
 * free of a size that is kept gives it back. False, and nothing set, for negative numbers, or where the store is held
 * by a thread that a fork left behind. */
bool fbn_recycle_set(int64_t limit, int64_t seconds);

/* Gives all idle memory back; returns its bytes. */
int64_t fbn_recycle_clear(void);

/* What there is, and counters for tests: memory made, memory that served again, memory given back. */
typedef struct {
    int64_t limit, idle;
    int blocks;
    long long made, reused, released;
} fbn_recycle_state;
fbn_recycle_state fbn_recycle_look(void);

/* Once, at import: fork handlers. */
void fbn_recycle_init(void);

#endif
