/* forks.c -- forks from C, where no interpreter keeps two of them apart: every child has a store of results and a team.
 *
 * Not a part of threads.c, for ThreadSanitizer lets no two threads fork at once.
 */
#include "check.h"
#include "dispatch.h"
#include "fastbn.h"
#include "parallel.h"
#include "recycle.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { CHANNELS = 64, INNER = 2048, TEAM = 3, IDLE = 2, LIMIT = 8 * FBN_RECYCLED, FORKS = 20, FORKERS = 2 };

/* Why a child is not well: its exit status. */
enum { WELL, STORE_SHUT, STORE_NOT_KEPT, STORE_NOT_EMPTY, STORE_IDLE, WRONG_BYTES, NO_TEAM };

static const fbn_geometry geometry = {FBN_F32, FBN_ROWS, 1, CHANNELS, INNER};
static float data[CHANNELS * INNER];
static double expected[3][CHANNELS];

static void compute(int threads, double results[3][CHANNELS])
{
    fbn_moments moments = {0, results[0], results[1], results[2]};
    if (fbn_moments_of(&geometry, (fbn_tensor){data, CHANNELS * INNER, INNER}, threads, &moments) != FBN_OK) {
        memset(results, 0xff, sizeof expected);
    }
}

static void call(void) { fbn_recycle_free(fbn_recycle_malloc(FBN_RECYCLED)); }

/* In a child: is the store open, has it kept `blocks` (or any number, if negative), does it serve again, and is there a
 * team? */
static int examine(int blocks)
{
    alarm(3);
    fbn_recycle_state before = fbn_recycle_look();
    if (!fbn_recycle_set(LIMIT, 10)) return STORE_SHUT;
    if (blocks > 0 && before.blocks != blocks) return STORE_NOT_KEPT;
    if (blocks == 0 && (before.blocks != 0 || before.idle != 0)) return STORE_NOT_EMPTY;
    call();
    call();
    if (fbn_recycle_look().reused <= before.reused) return STORE_IDLE;
    double results[3][CHANNELS];
    long long parallel = fbn_parallel_count().parallel;
    compute(TEAM, results);
    if (memcmp(results, expected, sizeof expected) != 0) return WRONG_BYTES;
    return fbn_parallel_count().parallel > parallel ? WELL : NO_TEAM;
}

/* The health of a child that is forked here and now, or what ended it. */
static int fork_and_wait(int blocks)
{
    int status;
    pid_t child = fork();
    if (child == 0) {
        _exit(examine(blocks));
    }
    if (child < 0 || waitpid(child, &status, 0) != child) {
        perror("fork");
        exit(2);
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

/* ---- a fork inside another's fork ---- */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t news = PTHREAD_COND_INITIALIZER;
static struct {
    bool wanted, started, done, alone; /* alone: forks take turns in this C library, and ours would not begin */
    pthread_t thread;
    int found;
} inner;

static void *fork_inside(void *unused)
{
    (void)unused;
    int found = fork_and_wait(0);
    pthread_mutex_lock(&lock);
    inner.found = found;
    inner.done = true;
    pthread_cond_signal(&news);
    pthread_mutex_unlock(&lock);
    return NULL;
}

/* Registered before the store's handler, so called after it: this thread has the store, and the inner fork finds it
 * taken. */
static void before_fork(void)
{
    struct timespec until;
    if (!inner.wanted) {
        return;
    }
    inner.wanted = false;
    inner.started = pthread_create(&inner.thread, NULL, fork_inside, NULL) == 0;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 30;
    pthread_mutex_lock(&lock);
    while (!inner.done && !inner.alone) {
        inner.alone = pthread_cond_timedwait(&news, &lock, &until) != 0;
    }
    pthread_mutex_unlock(&lock);
}

/* Red with a child that only leaves the store if it had entered it: the inner child's stays shut for good. Red without
 * the emptying of a store that another thread had: it may be half changed. Red with a store that every child empties.
 */
static void fork_within_a_fork(void)
{
    void *held[IDLE];
    for (int i = 0; i < IDLE; i++) held[i] = fbn_recycle_malloc(FBN_RECYCLED);
    for (int i = 0; i < IDLE; i++) fbn_recycle_free(held[i]);
    inner.wanted = true;
    int outer = fork_and_wait(IDLE);
    check(inner.started && pthread_join(inner.thread, NULL) == 0, "no second thread");
    check(outer == WELL, "the child of the outer fork: %d", outer);
    if (inner.alone) {
        printf("forks take turns here\n");
    } else {
        check(inner.found == WELL, "the child of the inner fork: %d", inner.found);
    }
    check(fbn_recycle_look().blocks == IDLE && examine(-1) == WELL, "the parent's store or team");
    alarm(0);
}

/* ---- forks at any moment ---- */

static atomic_bool stop;

static void *keep_calling(void *unused)
{
    double results[3][CHANNELS];
    while (!stop) {
        compute(TEAM, results);
        call();
    }
    return unused;
}

static void *keep_forking(void *argument)
{
    int *bad = argument;
    for (int i = 0; i < FORKS; i++) {
        int found = fork_and_wait(-1);
        if (found != WELL) {
            *bad = found;
        }
    }
    return NULL;
}

/* Red with a team that its holder takes along into death: the child computes alone. */
static void forks_among_calls(void)
{
    pthread_t threads[2 * FORKERS];
    int bad[FORKERS] = {0};
    for (int i = 0; i < 2 * FORKERS; i++) {
        if (pthread_create(&threads[i], NULL, i < FORKERS ? keep_forking : keep_calling, &bad[i % FORKERS]) != 0) {
            perror("pthread_create");
            exit(2);
        }
    }
    for (int i = 0; i < 2 * FORKERS; i++) {
        stop = i >= FORKERS;
        pthread_join(threads[i], NULL);
    }
    for (int i = 0; i < FORKERS; i++) {
        check(bad[i] == WELL, "a child of %d forks among calls: %d", FORKS, bad[i]);
    }
}

int main(int argc, char **argv)
{
    rng r = {check_seed(argc, argv)};
    for (int i = 0; i < CHANNELS * INNER; i++) {
        data[i] = (float)rng_unit(&r);
    }
    check(pthread_atfork(before_fork, NULL, NULL) == 0, "atfork");
    check(fbn_dispatch("scalar"), "tier");
    fbn_parallel_init();
    fbn_recycle_init();
    check(fbn_recycle_set(LIMIT, 10), "recycle_set");
    compute(1, expected);
    fork_within_a_fork();
    forks_among_calls();
    return check_report();
}
