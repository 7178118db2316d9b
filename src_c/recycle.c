/* recycle.c -- a small store of idle blocks, oldest first.
 *
 * Nobody ever waits for long, or for somebody who is gone: who cannot have the store goes to malloc and free, as if it
 * were empty. So there is nothing to hang on after a fork; and a child that was forked while another thread had the
 * store begins with an empty one.
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* madvise */
#endif

#include "recycle.h"

#include "kernels/kernels.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(_MSC_VER)
#include <intrin.h>
typedef volatile long fbn_flag;
#define FBN_FLAG_DOWN 0
static bool fbn_raise(fbn_flag *flag) { return _InterlockedExchange(flag, 1) == 0; }
static void fbn_lower(fbn_flag *flag) { _InterlockedExchange(flag, 0); }
#else
#include <stdatomic.h>
typedef atomic_flag fbn_flag;
#define FBN_FLAG_DOWN ATOMIC_FLAG_INIT
static bool fbn_raise(fbn_flag *flag) { return !atomic_flag_test_and_set_explicit(flag, memory_order_acquire); }
static void fbn_lower(fbn_flag *flag) { atomic_flag_clear_explicit(flag, memory_order_release); }
#endif

#if !defined(_WIN32)
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
static void fbn_step_aside(void) { sched_yield(); }
#else
static void fbn_step_aside(void) {}
#endif

/* Idle memory is nobody's: under AddressSanitizer whoever touches it is told so, as after a free. */
#if defined(__SANITIZE_ADDRESS__)
#define FBN_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FBN_ASAN 1
#endif
#endif
#if defined(FBN_ASAN)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

enum { FBN_SLOTS = 64, FBN_TRIES = 1000, FBN_STALE_SECONDS = 10 };

/* Where pages of 2 MB are worth asking for. */
#define FBN_HUGE ((size_t)2 << 20)

/* What lies in the cache line before the memory. */
typedef struct {
    void *start; /* what malloc returned */
    size_t capacity;
} fbn_block;

typedef struct {
    fbn_block *block;
    time_t since;
} fbn_idle;

static struct {
    fbn_flag taken;
    int64_t limit, stale;
    fbn_recycle_state state;
    fbn_idle idle[FBN_SLOTS];
} fbn_store = {.taken = FBN_FLAG_DOWN, .stale = FBN_STALE_SECONDS};

/* Blocks on their way out: given back when the store is free again, as that takes long. */
typedef struct {
    int count;
    fbn_block *blocks[FBN_SLOTS + 1];
} fbn_refuse;

/* Seconds that no change of the clock can turn back. */
static time_t fbn_now(void)
{
#if defined(_WIN32)
    return time(NULL);
#else
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec;
#endif
}

static bool fbn_store_enter(void)
{
    for (int i = 0; i < FBN_TRIES; i++) {
        if (fbn_raise(&fbn_store.taken)) {
            return true;
        }
        fbn_step_aside();
    }
    return false;
}

static void fbn_store_leave(void) { fbn_lower(&fbn_store.taken); }

static void *fbn_block_memory(fbn_block *block) { return (char *)block + FBN_LINE; }

static fbn_block *fbn_block_of(void *p) { return (fbn_block *)(void *)((char *)p - FBN_LINE); }

/* Sizes come in classes, an eighth apart at the most, so that what is nearly as large serves. 0: too large. */
static size_t fbn_class_of(size_t bytes)
{
    size_t step = FBN_LINE;
    if (bytes > SIZE_MAX / 4) {
        return 0;
    }
    while (step < bytes / 16) {
        step *= 2;
    }
    return bytes == 0 ? step : (bytes + step - 1) / step * step;
}

static fbn_block *fbn_block_make(size_t capacity)
{
    size_t align = capacity >= 2 * FBN_HUGE ? FBN_HUGE : FBN_LINE;
    char *start = malloc(capacity + align + FBN_LINE);
    if (start == NULL) {
        return NULL;
    }
    char *memory = start + FBN_LINE + (align - ((uintptr_t)start + FBN_LINE) % align) % align;
#if defined(MADV_HUGEPAGE)
    if (align == FBN_HUGE) {
        (void)madvise(memory, capacity, MADV_HUGEPAGE); /* only a wish */
    }
#endif
    fbn_block *block = fbn_block_of(memory);
    *block = (fbn_block){start, capacity};
    return block;
}

static fbn_block *fbn_store_remove(int at)
{
    fbn_block *block = fbn_store.idle[at].block;
    int rest = --fbn_store.state.blocks - at;
    memmove(&fbn_store.idle[at], &fbn_store.idle[at + 1], (size_t)rest * sizeof *fbn_store.idle);
    fbn_store.state.idle -= (int64_t)block->capacity;
    return block;
}

static void fbn_store_discard(fbn_refuse *refuse)
{
    refuse->blocks[refuse->count++] = fbn_store_remove(0);
    fbn_store.state.released++;
}

static void fbn_store_discard_old(fbn_refuse *refuse, time_t now)
{
    while (fbn_store.state.blocks > 0 && now - fbn_store.idle[0].since > fbn_store.stale) {
        fbn_store_discard(refuse);
    }
}

static void fbn_store_shrink(fbn_refuse *refuse, int64_t most)
{
    while (fbn_store.state.blocks > 0 && fbn_store.state.idle > most) {
        fbn_store_discard(refuse);
    }
}

static void fbn_refuse_free(const fbn_refuse *refuse)
{
    for (int i = 0; i < refuse->count; i++) {
        free(refuse->blocks[i]->start);
    }
}

static fbn_block *fbn_store_take(size_t capacity)
{
    fbn_refuse refuse = {.count = 0};
    fbn_block *found = NULL;
    time_t now = fbn_now();
    if (!fbn_store_enter()) {
        return NULL;
    }
    for (int i = fbn_store.state.blocks - 1; i >= 0 && found == NULL; i--) { /* the last one may still be in cache */
        if (fbn_store.idle[i].block->capacity == capacity) {
            found = fbn_store_remove(i);
        }
    }
    fbn_store.state.reused += found != NULL;
    fbn_store.state.made += found == NULL;
    fbn_store_discard_old(&refuse, now);
    fbn_store_leave();
    fbn_refuse_free(&refuse);
    return found;
}

void *fbn_recycle_malloc(size_t bytes)
{
    size_t capacity = fbn_class_of(bytes);
    if (capacity == 0) {
        return NULL;
    }
    fbn_block *block = capacity >= FBN_RECYCLED ? fbn_store_take(capacity) : NULL;
    if (block == NULL) {
        block = fbn_block_make(capacity);
    }
    /* What lies idle is not what a call should fail for. */
    if (block == NULL && fbn_recycle_clear() > 0) {
        block = fbn_block_make(capacity);
    }
    if (block == NULL) {
        return NULL;
    }
    ASAN_UNPOISON_MEMORY_REGION(fbn_block_memory(block), block->capacity);
    return fbn_block_memory(block);
}

void fbn_recycle_free(void *p)
{
    fbn_refuse refuse = {.count = 0};
    if (p == NULL) {
        return;
    }
    fbn_block *block = fbn_block_of(p);
    int64_t capacity = (int64_t)block->capacity;
    time_t now = fbn_now();
    bool kept = false;
    if (capacity >= FBN_RECYCLED && fbn_store_enter()) {
        kept = capacity <= fbn_store.limit;
        fbn_store_discard_old(&refuse, now);
        if (kept) {
            fbn_store_shrink(&refuse, fbn_store.limit - capacity);
            if (fbn_store.state.blocks == FBN_SLOTS) {
                fbn_store_discard(&refuse);
            }
            ASAN_POISON_MEMORY_REGION(p, block->capacity);
            fbn_store.idle[fbn_store.state.blocks++] = (fbn_idle){block, now};
            fbn_store.state.idle += capacity;
        }
        fbn_store.state.released += !kept;
        fbn_store_leave();
    }
    fbn_refuse_free(&refuse);
    if (!kept) {
        free(block->start);
    }
}

void *fbn_recycle_realloc(void *p, size_t bytes)
{
    size_t capacity = p == NULL ? 0 : fbn_block_of(p)->capacity;
    if (p != NULL && fbn_class_of(bytes) == capacity) {
        return p;
    }
    void *q = fbn_recycle_malloc(bytes);
    if (p != NULL && q != NULL) {
        memcpy(q, p, bytes < capacity ? bytes : capacity);
        fbn_recycle_free(p);
    }
    return q;
}

bool fbn_recycle_set(int64_t limit, int64_t seconds)
{
    fbn_refuse refuse = {.count = 0};
    if (limit < 0 || seconds < 0 || !fbn_store_enter()) {
        return false;
    }
    fbn_store.limit = limit;
    fbn_store.stale = seconds;
    fbn_store_shrink(&refuse, limit);
    fbn_store_leave();
    fbn_refuse_free(&refuse);
    return true;
}

int64_t fbn_recycle_clear(void)
{
    fbn_refuse refuse = {.count = 0};
    if (!fbn_store_enter()) {
        return 0;
    }
    int64_t bytes = fbn_store.state.idle;
    fbn_store_shrink(&refuse, 0);
    fbn_store_leave();
    fbn_refuse_free(&refuse);
    return bytes;
}

fbn_recycle_state fbn_recycle_look(void)
{
    fbn_recycle_state state = {.limit = 0};
    if (fbn_store_enter()) {
        state = fbn_store.state;
        state.limit = fbn_store.limit;
        fbn_store_leave();
    }
    return state;
}

#if !defined(_WIN32)

/* A child gets the store as it is between two calls, with the idle memory in it. Several threads may fork at once. */
static _Thread_local bool fbn_held_for_fork;

static void fbn_before_fork(void) { fbn_held_for_fork = fbn_store_enter(); }

static void fbn_after_fork_in_parent(void)
{
    if (fbn_held_for_fork) {
        fbn_store_leave();
    }
}

/* The only thread there is: whoever else had the store is gone, and what it was about to change cannot be trusted. */
static void fbn_after_fork_in_child(void)
{
    if (!fbn_held_for_fork) {
        fbn_store.state.blocks = 0;
        fbn_store.state.idle = 0;
    }
    fbn_store_leave();
}

void fbn_recycle_init(void) { pthread_atfork(fbn_before_fork, fbn_after_fork_in_parent, fbn_after_fork_in_child); }

#else

void fbn_recycle_init(void) {}

#endif
