/* parallel.c -- one team of threads for the whole process.
 *
 * The team is our own and not an OpenMP region because of what a server needs: an OpenMP runtime keeps a pool for every
 * thread that ever called it (40 callers: 40 pools, however few run at a time), its idle threads spin for milliseconds
 * after a region, and after a fork its pool is a memory of threads that are gone. Here is a single pool that outlives
 * its callers, sleeps soon, and is forgotten by a forked child, which starts its own. docs/reliability.md has the
 * figures. Where POSIX threads are missing (Windows, where nothing forks) the team is an OpenMP region.
 *
 * OpenMP, if built with it, is otherwise only asked two things: are we inside somebody's parallel region, and has
 * somebody (threadpoolctl, say) limited this thread.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* pthread_setname_np */
#endif

#include "parallel.h"

#include <fenv.h>
#include <stdint.h>
#include <stdlib.h>

#ifdef _OPENMP
#include <omp.h>
#endif

/* FBN_OPENMP_TEAM chooses regions everywhere: the comparison that docs/reliability.md quotes. */
#if defined(_WIN32) && !defined(FBN_OPENMP_TEAM)
#define FBN_OPENMP_TEAM
#endif

#ifdef _MSC_VER
typedef volatile long shared_long; /* atomic enough for a setting and two counters */
#else
#include <stdatomic.h>
typedef _Atomic long shared_long;
#endif

static shared_long num_threads = 1, parallel_count, contended_count;

void fbn_set_num_threads(int n) { num_threads = n; }
int fbn_get_num_threads(void) { return (int)num_threads; }

fbn_parallel_counters fbn_parallel_count(void) {
    return (fbn_parallel_counters){.parallel = parallel_count, .contended = contended_count};
}

/* One job: what the members of a team need to know. */
typedef struct {
    fbn_task task;
    void *context;
    fenv_t environment;
} job;

/* Members compute under the caller's floating-point environment: a caller that flushes subnormals must not get them
 * flushed in its own share of the work only. */
static void run_member(const job *j, int tid, int team) {
    fesetenv(&j->environment);
    j->task(tid, team, j->context);
}

#if !defined(FBN_OPENMP_TEAM)

#include <pthread.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

/* Spinning pays for as long as waking a sleeper takes (50 us and more on a virtual machine). All workers together burn
 * at most IDLE_NANOSECONDS after a call. */
enum { SPIN_NANOSECONDS = 100000, IDLE_NANOSECONDS = 2000000, SPINS_PER_LOOK_AT_THE_CLOCK = 32 };

/* Worker tid has share tid of every job, so that it meets the same memory again. A share that its worker has not begun
 * by the time the caller is done with its own is taken by the caller: a worker that wakes late costs nothing but the
 * help that it did not give. */
typedef struct {
    _Alignas(64) atomic_bool waiting;
} share;

/* The holder of the token owns the pool. The lock only guards sleeping and waking. */
static atomic_flag token = ATOMIC_FLAG_INIT;
static struct {
    pthread_mutex_t lock;
    pthread_cond_t posted, finished;
    atomic_int unfinished;
    job job;
    int team, workers;
    pid_t process;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .posted = PTHREAD_COND_INITIALIZER, .finished = PTHREAD_COND_INITIALIZER};
static share shares[FBN_MAX_THREADS];

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static bool share_waits(int tid) { return shares[tid].waiting; }
static bool all_finished(int tid) {
    (void)tid;
    return pool.unfinished == 0;
}

static void await(bool (*ready)(int), int tid, pthread_cond_t *changed, int64_t spin) {
    const int64_t deadline = nanoseconds() + spin;
    do {
        for (int i = 0; i < SPINS_PER_LOOK_AT_THE_CLOCK; i++) {
            if (ready(tid)) return;
            relax();
        }
    } while (nanoseconds() < deadline);
    pthread_mutex_lock(&pool.lock);
    while (!ready(tid)) pthread_cond_wait(changed, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
}

/* Passing through the lock keeps the news from falling between a sleeper's last look and its sleep. */
static void announce(pthread_cond_t *changed) {
    pthread_mutex_lock(&pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_cond_broadcast(changed);
}

/* The job may be read between taking a share and counting it as finished, and at no other time. */
static void take_share(int tid) {
    if (!atomic_exchange(&shares[tid].waiting, false)) return;
    run_member(&pool.job, tid, pool.team);
    if (atomic_fetch_sub(&pool.unfinished, 1) == 1) announce(&pool.finished);
}

static void *work(void *argument) {
    const int tid = (int)(intptr_t)argument;
    const int64_t fair = IDLE_NANOSECONDS / tid, spin = fair < SPIN_NANOSECONDS ? fair : SPIN_NANOSECONDS;
    for (;;) {
        await(share_waits, tid, &pool.posted, spin);
        take_share(tid);
    }
    return NULL;
}

static bool start_worker(int tid) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, work, (void *)(intptr_t)tid)) return false;
#ifdef __linux__
    pthread_setname_np(thread, "fastbn");
#endif
    pthread_detach(thread);
    return true;
}

/* Signals belong to the program's own threads: one that landed on a worker would not interrupt the call that the
 * program meant it to interrupt. Faults stay deliverable, for crash reporters. */
static void hire(int workers) {
    sigset_t blocked, before;
    const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT};
    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) sigdelset(&blocked, faults[i]);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    while (pool.workers < workers && start_worker(pool.workers + 1)) pool.workers++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* In a forked child: the workers are gone, and so is whoever held the lock or had posted a job. */
static void forget_workers(void) {
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.posted, NULL);
    pthread_cond_init(&pool.finished, NULL);
    for (int tid = 0; tid < FBN_MAX_THREADS; tid++) shares[tid].waiting = false;
    pool.workers = 0;
    pool.process = getpid();
}

static void after_fork_in_child(void) {
    forget_workers();
    atomic_flag_clear(&token);
}

static bool take_token(void) { return !atomic_flag_test_and_set(&token); }
static void release_token(void) { atomic_flag_clear(&token); }

static void run_team(const job *j, int team) {
    /* The net below the fork handler: a clone that did not run it must not wait for workers that it does not have. */
    if (pool.process != getpid()) forget_workers();
    if (pool.workers < team - 1) hire(team - 1);
    if (pool.workers < team - 1) { /* no more threads to be had */
        j->task(0, 1, j->context);
        return;
    }
    parallel_count++;
    pool.job = *j;
    pool.team = team;
    pool.unfinished = team;
    for (int tid = 0; tid < team; tid++) shares[tid].waiting = true;
    announce(&pool.posted);
    for (int tid = 0; tid < team; tid++) take_share(tid);
    await(all_finished, 0, &pool.finished, SPIN_NANOSECONDS);
}

static void init_team(void) {
    pool.process = getpid();
    pthread_atfork(NULL, NULL, after_fork_in_child);
}

const char *fbn_parallel_runtime(void) { return "pthreads"; }

#elif defined(_OPENMP)

static omp_lock_t token;

static bool take_token(void) { return omp_test_lock(&token); }
static void release_token(void) { omp_unset_lock(&token); }

static void run_team(const job *j, int team) {
    parallel_count++;
#pragma omp parallel num_threads(team)
    run_member(j, omp_get_thread_num(), omp_get_num_threads());
}

static void init_team(void) { omp_init_lock(&token); }

const char *fbn_parallel_runtime(void) { return "openmp"; }

#else

static bool take_token(void) { return true; }
static void release_token(void) {}
static void run_team(const job *j, int team) {
    (void)team;
    run_member(j, 0, 1);
}
static void init_team(void) {}

const char *fbn_parallel_runtime(void) { return "serial"; }

#endif

#ifdef _OPENMP
/* What an OpenMP region would have if nobody limited it. */
static int openmp_default;

static void init_limit(void) {
    const char *s = getenv("OMP_NUM_THREADS");
    openmp_default = s ? atoi(s) : 0;
    if (openmp_default < 1) openmp_default = omp_get_num_procs();
}

/* A limit is a limit only if somebody lowered it: OMP_NUM_THREADS and the size of the machine have already had their
 * say in the number of threads, where FASTBN_NUM_THREADS may have overruled them. */
static int limited(int threads) {
    if (omp_in_parallel()) return 1;
    const int limit = omp_get_max_threads();
    return limit < openmp_default && limit < threads ? limit : threads;
}

bool fbn_parallel_sees_openmp(void) { return true; }
#else
static void init_limit(void) {}
static int limited(int threads) { return threads; }

bool fbn_parallel_sees_openmp(void) { return false; }
#endif

void fbn_parallel_init(void) {
    init_team();
    init_limit();
}

void fbn_parallel(int threads, fbn_task task, void *context) {
    const int team = threads > 1 ? limited(threads < FBN_MAX_THREADS ? threads : FBN_MAX_THREADS) : 1;
    if (team > 1 && take_token()) {
        job j = {.task = task, .context = context};
        fegetenv(&j.environment);
        run_team(&j, team);
        release_token();
        return;
    }
    if (team > 1) contended_count++;
    task(0, 1, context);
}
