/* check.c -- see check.h. */
#include "check.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* Splitmix64: one line, and good enough to draw shapes and numbers. */
uint64_t rng_next(rng *r)
{
    uint64_t z = r->state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

int64_t rng_below(rng *r, int64_t n) { return (int64_t)(rng_next(r) % (uint64_t)n); }
int64_t rng_between(rng *r, int64_t low, int64_t high) { return low + rng_below(r, high - low + 1); }
bool rng_one_in(rng *r, int64_t n) { return rng_below(r, n) == 0; }
double rng_unit(rng *r) { return (double)(rng_next(r) >> 11) * 0x1p-52 - 1.0; }

uint64_t check_seed(int argc, char **argv)
{
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : (uint64_t)time(NULL);
    printf("seed %llu\n", (unsigned long long)seed);
    return seed;
}

static void give_up(const char *why)
{
    perror(why);
    exit(2);
}

arena arena_make(size_t size)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size = (size + page - 1) / page * page;
    char *p = mmap(NULL, size + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(p + page, size, PROT_READ | PROT_WRITE) != 0) {
        give_up("mmap");
    }
    return (arena){p + page, p + page + size};
}

void arena_seal(const arena *a, bool sealed)
{
    if (mprotect(a->begin, (size_t)(a->end - a->begin), sealed ? PROT_READ : PROT_READ | PROT_WRITE) != 0) {
        give_up("mprotect");
    }
}

char *arena_place(const arena *a, size_t bytes, size_t unit, place where, rng *r)
{
    size_t room = (size_t)(a->end - a->begin);
    size_t shift = 1024 + (size_t)rng_below(r, 64) * unit;
    if (bytes + shift + 1024 > room) {
        fprintf(stderr, "a case of %zu bytes does not fit into its arena\n", bytes);
        exit(2);
    }
    return where == AT_BEGIN ? a->begin : where == AT_END ? a->end - bytes : a->begin + shift;
}

sigjmp_buf check_fault;
volatile bool check_armed;

static void on_fault(int signal_number)
{
    if (!check_armed) {
        signal(signal_number, SIG_DFL);
        raise(signal_number);
    }
    check_armed = false;
    siglongjmp(check_fault, 1);
}

void check_catch_faults(void)
{
    const int faults[] = {SIGSEGV, SIGBUS, SIGILL};
    struct sigaction action = {.sa_handler = on_fault, .sa_flags = SA_NODEFER};
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) {
        sigaction(faults[i], &action, NULL);
    }
}

static long passed, failed;

bool check(bool ok, const char *why, ...)
{
    enum { SHOWN = 20 };
    if (ok) {
        passed++;
        return true;
    }
    if (failed++ < SHOWN) {
        va_list arguments;
        va_start(arguments, why);
        fputs("FAILED ", stdout);
        vprintf(why, arguments);
        putchar('\n');
        va_end(arguments);
    }
    return false;
}

int check_report(void)
{
    printf("%ld passed, %ld failed\n", passed, failed);
    return failed == 0 && passed > 0 ? 0 : 1;
}
