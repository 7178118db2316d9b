/* check.h -- what the C tests share: random numbers, memory between guard pages, faults as failures, the count. */
#ifndef CHECK_H
#define CHECK_H

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- random numbers: the same for a seed on every machine ---- */

typedef struct {
    uint64_t state;
} rng;

uint64_t rng_next(rng *r);
int64_t rng_below(rng *r, int64_t n); /* 0..n-1 */
int64_t rng_between(rng *r, int64_t low, int64_t high);
bool rng_one_in(rng *r, int64_t n);
double rng_unit(rng *r); /* [-1, 1) */

/* The seed of this run: the first argument, or from the clock. Printed. */
uint64_t check_seed(int argc, char **argv);

/* ---- memory ---- */

/* `size` usable bytes, the page before and the page after them out of bounds. */
typedef struct {
    char *begin, *end;
} arena;

arena arena_make(size_t size);
void arena_seal(const arena *a, bool sealed); /* read-only while sealed */

typedef enum { AT_BEGIN, AT_END, INSIDE, PLACES } place; /* against which guard page, or against none */

/* Where `bytes` bytes go; INSIDE they are misaligned by a random number of `unit` bytes. */
char *arena_place(const arena *a, size_t bytes, size_t unit, place where, rng *r);

/* ---- faults ---- */

extern sigjmp_buf check_fault;
extern volatile bool check_armed;
void check_catch_faults(void);

/* Runs a statement; true where it did not touch what it must not. */
#define CHECK_RUNS(statement)                                                                                          \
    (sigsetjmp(check_fault, 1) == 0 ? (check_armed = true, (statement), check_armed = false, true) : false)

/* ---- the count ---- */

/* Counts a check; says why where it failed. */
__attribute__((format(printf, 2, 3))) bool check(bool ok, const char *why, ...);
int check_report(void); /* prints the last line, returns the exit status */

#endif
