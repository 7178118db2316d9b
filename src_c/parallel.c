/* parallel.c -- one team of threads for the whole process.
 *
 * The team is our own and not an OpenMP region because of what a server needs. An OpenMP runtime keeps a pool for every
 * thread that ever called it (40 callers: 40 pools, however few run at a time), its idle threads spin for milliseconds
 * after a region, and after a fork its pool is a memory of threads that are gone. Here is a single pool that outlives
 * its callers, sleeps soon, and is forgotten by a forked child, which starts its own. docs/reliability.md has the
 * figures. Where there are no POSIX threads (Windows, where nothing forks) the team is an OpenMP region.
 *
 * Otherwise OpenMP is only asked two things, if built with it: are we inside somebody's parallel region, and has
 * somebody (threadpoolctl, say) limited this thread.
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* names and processors of threads */
#endif

#include "parallel.h"

#include <fenv.h>
#include <stdint.h>
#include <stdlib.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

/* FBN_OPENMP_TEAM asks for regions everywhere: the comparison that docs/reliability.md quotes. */
#if defined(_WIN32) && !defined(FBN_OPENMP_TEAM)
#define FBN_OPENMP_TEAM
#endif

#if defined(_MSC_VER)
typedef volatile long fbn_shared; /* atomic enough for a setting and three counters */
#else
#include <stdatomic.h>
typedef atomic_long fbn_shared;
#endif

static fbn_shared fbn_number = 1, fbn_parallel_runs, fbn_contended_runs, fbn_helped_shares;

bool fbn_set_num_threads(int n)
{
    if (n < 1 || n > FBN_MAX_THREADS) return false;
    fbn_number = n;
    return true;
}

int fbn_get_num_threads(void) { return (int)fbn_number; }

fbn_parallel_counters fbn_parallel_count(void)
{
    return (fbn_parallel_counters){
        .parallel = fbn_parallel_runs, .contended = fbn_contended_runs, .helped = fbn_helped_shares};
}

/* What follows is written three times: who may use the team, how it runs, and what it is called. */
static bool fbn_take_team(void);
static void fbn_release_team(void);
static void fbn_run_team(int team, fbn_task task, void *context);
static void fbn_init_team(void);

#if !defined(FBN_OPENMP_TEAM)

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

/* Spinning pays for as long as waking a sleeper takes: 50 us and more on a virtual machine. All workers together burn
 * at most FBN_IDLE_NS after a call. */
enum { FBN_SPIN_NS = 100000, FBN_IDLE_NS = 2000000, FBN_SPINS_PER_CLOCK = 32 };

/* Worker tid has share tid of every job, so that it meets the same memory again. A share that its worker has not begun
 * when the caller is done with its own is taken by the caller: a worker that wakes late, or that a busy machine does
 * not run, costs nothing but its help. */
typedef struct {
    _Alignas(64) atomic_bool waiting;
} fbn_share;

static fbn_share fbn_shares[FBN_MAX_THREADS];

/* Whoever has set taken owns the pool. The lock only guards sleeping and waking. */
static struct {
    atomic_flag taken;
    pthread_mutex_t lock;
    pthread_cond_t posted, finished;
    int workers;
    pid_t process;
    atomic_int unfinished, processor; /* shares; the caller's */
    /* The job. It may be read between taking a share and counting it as finished, and at no other time. */
    fbn_task task;
    void *context;
    int team;
    fenv_t environment;
} fbn_pool = {.taken = ATOMIC_FLAG_INIT,
              .lock = PTHREAD_MUTEX_INITIALIZER,
              .posted = PTHREAD_COND_INITIALIZER,
              .finished = PTHREAD_COND_INITIALIZER};

static bool fbn_waiting(int tid) { return fbn_shares[tid].waiting; }

static bool fbn_all_finished(int team)
{
    (void)team;
    return fbn_pool.unfinished == 0;
}

static int64_t fbn_nanoseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void fbn_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void fbn_await(bool (*condition)(int), int argument, pthread_cond_t *news, int64_t spin)
{
    int64_t deadline = fbn_nanoseconds() + spin;
    do {
        for (int i = 0; i < FBN_SPINS_PER_CLOCK; i++) {
            if (condition(argument)) return;
            fbn_relax();
        }
    } while (fbn_nanoseconds() < deadline);
    pthread_mutex_lock(&fbn_pool.lock);
    while (!condition(argument)) pthread_cond_wait(news, &fbn_pool.lock);
    pthread_mutex_unlock(&fbn_pool.lock);
}

/* Passing through the lock keeps the news from falling between a sleeper's last look and its sleep. */
static void fbn_announce(pthread_cond_t *news)
{
    pthread_mutex_lock(&fbn_pool.lock);
    pthread_mutex_unlock(&fbn_pool.lock);
    pthread_cond_broadcast(news);
}

static bool fbn_take_share(int tid) { return atomic_exchange(&fbn_shares[tid].waiting, false); }

static void fbn_do_share(int tid)
{
    fbn_pool.task(tid, fbn_pool.team, fbn_pool.context);
    if (atomic_fetch_sub(&fbn_pool.unfinished, 1) == 1) fbn_announce(&fbn_pool.finished);
}

static int fbn_processor(void)
{
#if defined(__linux__)
    return sched_getcpu();
#else
    return -1;
#endif
}

/* A kernel with few processors may wake a worker on the processor of the very caller that it is to help, and go on
 * doing so: the two then take turns. Leave, and be allowed back at once: a thread is woken where it last ran. */
static void fbn_leave(int processor)
{
#if defined(__linux__)
    cpu_set_t all, others;
    if (sched_getcpu() != processor || sched_getaffinity(0, sizeof all, &all) != 0) return;
    others = all;
    CPU_CLR((size_t)processor, &others);
    if (CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof others, &others) == 0)
        sched_setaffinity(0, sizeof all, &all);
#else
    (void)processor;
#endif
}

static void *fbn_work(void *argument)
{
    int tid = (int)(intptr_t)argument;
    int64_t fair = FBN_IDLE_NS / tid, spin = fair < FBN_SPIN_NS ? fair : FBN_SPIN_NS;
    for (;;) {
        fbn_await(fbn_waiting, tid, &fbn_pool.posted, spin);
        fbn_leave(fbn_pool.processor);
        if (fbn_take_share(tid)) {
            fbn_helped_shares++;
            /* A caller that flushes subnormals must not get them flushed in its own part of the result only. */
            fesetenv(&fbn_pool.environment);
            fbn_do_share(tid);
        }
    }
    return NULL;
}

/* A new thread inherits where its creator may run; but the workers are the process's, not those of a caller that was
 * pinned to one processor. */
static void fbn_free_from_caller(pthread_attr_t *attributes)
{
#if defined(__linux__)
    cpu_set_t process, caller;
    if (sched_getaffinity(getpid(), sizeof process, &process) == 0 &&
        sched_getaffinity(0, sizeof caller, &caller) == 0 && !CPU_EQUAL(&process, &caller))
        pthread_attr_setaffinity_np(attributes, sizeof process, &process);
#else
    (void)attributes;
#endif
}

static bool fbn_start_worker(int tid)
{
    pthread_t thread;
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) return false;
    fbn_free_from_caller(&attributes);
    /* A sandbox may forbid to choose processors: then where the caller may run will do. */
    bool started = pthread_create(&thread, &attributes, fbn_work, (void *)(intptr_t)tid) == 0 ||
                   pthread_create(&thread, NULL, fbn_work, (void *)(intptr_t)tid) == 0;
    pthread_attr_destroy(&attributes);
    if (!started) return false;
#if defined(__linux__)
    pthread_setname_np(thread, "fastbn");
#endif
    pthread_detach(thread);
    return true;
}

/* Signals belong to the program's own threads: one that landed on a worker would not interrupt the wait that it was
 * meant to interrupt. Faults stay deliverable, for crash reporters. */
static void fbn_start_workers(int workers)
{
    const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT};
    sigset_t blocked, before;
    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) sigdelset(&blocked, faults[i]);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    while (fbn_pool.workers < workers && fbn_start_worker(fbn_pool.workers + 1)) fbn_pool.workers++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* In a forked child: the workers are gone, and so is whoever held the lock or had posted a job. */
static void fbn_forget_workers(void)
{
    pthread_mutex_init(&fbn_pool.lock, NULL);
    pthread_cond_init(&fbn_pool.posted, NULL);
    pthread_cond_init(&fbn_pool.finished, NULL);
    for (int tid = 0; tid < FBN_MAX_THREADS; tid++) fbn_shares[tid].waiting = false;
    fbn_pool.workers = 0;
    fbn_pool.process = getpid();
}

static void fbn_after_fork(void)
{
    fbn_forget_workers();
    fbn_release_team();
}

static void fbn_init_team(void)
{
    fbn_pool.process = getpid();
    pthread_atfork(NULL, NULL, fbn_after_fork);
}

static bool fbn_take_team(void) { return !atomic_flag_test_and_set(&fbn_pool.taken); }
static void fbn_release_team(void) { atomic_flag_clear(&fbn_pool.taken); }

static void fbn_run_team(int team, fbn_task task, void *context)
{
    /* The net below the fork handler: a clone that did not run it must not wait for workers that it does not have. */
    if (fbn_pool.process != getpid()) fbn_forget_workers();
    if (fbn_pool.workers < team - 1) fbn_start_workers(team - 1);
    fbn_parallel_runs++;
    fbn_pool.task = task;
    fbn_pool.context = context;
    fbn_pool.team = team;
    fegetenv(&fbn_pool.environment);
    fbn_pool.unfinished = team;
    fbn_pool.processor = fbn_processor();
    for (int tid = 0; tid < team; tid++) fbn_shares[tid].waiting = true;
    fbn_announce(&fbn_pool.posted);
    for (int tid = 0; tid < team; tid++) {
        if (fbn_take_share(tid)) fbn_do_share(tid);
    }
    fbn_await(fbn_all_finished, team, &fbn_pool.finished, FBN_SPIN_NS);
}

const char *fbn_parallel_runtime(void) { return "pthreads"; }

#elif defined(_OPENMP)

static omp_lock_t fbn_taken;

static void fbn_init_team(void) { omp_init_lock(&fbn_taken); }
static bool fbn_take_team(void) { return omp_test_lock(&fbn_taken) != 0; }
static void fbn_release_team(void) { omp_unset_lock(&fbn_taken); }

static void fbn_run_team(int team, fbn_task task, void *context)
{
    fenv_t environment;
    fegetenv(&environment);
    fbn_parallel_runs++;
#pragma omp parallel num_threads(team)
    {
        if (omp_get_thread_num() > 0) fesetenv(&environment);
        task(omp_get_thread_num(), omp_get_num_threads(), context);
    }
}

const char *fbn_parallel_runtime(void) { return "openmp"; }

#else

static void fbn_init_team(void) {}
static bool fbn_take_team(void) { return true; }
static void fbn_release_team(void) {}

static void fbn_run_team(int team, fbn_task task, void *context)
{
    (void)team;
    task(0, 1, context);
}

const char *fbn_parallel_runtime(void) { return "serial"; }

#endif

#if defined(_OPENMP)

/* The threads of an OpenMP region that nobody limited. */
static int fbn_openmp_default;

static void fbn_init_limit(void)
{
    const char *wish = getenv("OMP_NUM_THREADS");
    fbn_openmp_default = wish != NULL ? atoi(wish) : 0;
    if (fbn_openmp_default < 1) fbn_openmp_default = omp_get_num_procs();
}

/* Only what somebody lowered is a limit: OMP_NUM_THREADS and the size of the machine have already had their say in the
 * number of threads, where FASTBN_NUM_THREADS may have overruled them. */
static int fbn_limited(int threads)
{
    if (omp_in_parallel()) return 1;
    int limit = omp_get_max_threads();
    return limit < fbn_openmp_default && limit < threads ? limit : threads;
}

bool fbn_parallel_sees_openmp(void) { return true; }

#else

static void fbn_init_limit(void) {}
static int fbn_limited(int threads) { return threads; }
bool fbn_parallel_sees_openmp(void) { return false; }

#endif

void fbn_parallel_init(void)
{
    fbn_init_team();
    fbn_init_limit();
}

void fbn_parallel(int threads, fbn_task task, void *context)
{
    int team = threads > 1 ? fbn_limited(threads < FBN_MAX_THREADS ? threads : FBN_MAX_THREADS) : 1;
    if (team > 1 && fbn_take_team()) {
        fbn_run_team(team, task, context);
        fbn_release_team();
        return;
    }
    if (team > 1) fbn_contended_runs++;
    task(0, 1, context);
}
