/* fuzz.c -- libFuzzer's way into the C interface: any geometry, strides, dtypes, parameters and bytes.
 *
 * Every buffer is exactly as large as the arguments say it is, so that AddressSanitizer sees the first byte too many.
 * Arguments that no memory could satisfy are passed all the same, with NULL for what cannot be had. A call must return
 * a status, refuse what makes no sense, accept what does, and write nothing unless it returns FBN_OK.
 *
 * What is accepted is called twice: by one thread on a machine whose caches hold all of it, and as it was drawn on one
 * whose caches are as small as its tensors. So plans of every kind are tried, and none may change a result.
 */
#include "dispatch.h"
#include "fastbn.h"
#include "geometry.h"
#include "parallel.h"
#include "plan.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REQUIRE(condition)                                                                                             \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                                    \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* ---- drawing arguments from the input: where it has ended, what makes sense ---- */

typedef struct {
    const uint8_t *next, *end;
} source;

static uint8_t take(source *s) { return s->next < s->end ? *s->next++ : 0; }

static uint64_t take_bytes(source *s, int n)
{
    uint64_t v = 0;
    for (int i = 0; i < n; i++) {
        v = v << 8 | take(s);
    }
    return v;
}

/* Small numbers mostly; and every number there is. */
static int64_t take_integer(source *s)
{
    static const int64_t edges[] = {-1,        0,         INT64_MAX, INT64_MIN, INT64_MAX / 2, INT64_MIN / 2, INT32_MAX,
                                    INT32_MIN, 1LL << 32, 1LL << 60, 1LL << 31, 4095,          4096,          4097};
    uint8_t how = take(s);
    if (how < 160) {
        return 1 + how % (how < 100 ? 8 : 40);
    }
    if (how < 220) {
        return (int16_t)take_bytes(s, 2);
    }
    return how < 240 ? edges[how % (sizeof edges / sizeof *edges)] : (int64_t)take_bytes(s, 8);
}

static double take_double(source *s)
{
    static const double edges[] = {0.0, -0.0, 1.0, -1.0, INFINITY, -INFINITY, NAN, 1e-5, 1e308, 1e-308, 3e38, 1e8};
    uint8_t how = take(s);
    if (how < 128) {
        return (how - 64) / 16.0;
    }
    if (how < 220) {
        return edges[how % (sizeof edges / sizeof *edges)];
    }
    uint64_t bits = take_bytes(s, 8);
    double v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

static int take_threads(source *s)
{
    static const int edges[] = {1, 2, 3, 4, 0, -1, INT_MIN, 1};
    return edges[take(s) % 8];
}

/* Out of range now and then. */
static int take_enum(source *s, int count)
{
    uint8_t how = take(s);
    return how < 240 ? how % count : how < 250 ? count : (int)(int32_t)take_bytes(s, 4);
}

/* ---- memory of exactly the size that it must have ---- */

enum { BUFFERS = 48, MOST_ELEMENTS = 1 << 16, RAW = FBN_DTYPE_COUNT };

typedef struct {
    char *data, *before; /* before: a copy of an output, for calls that must not write it */
    size_t bytes;
    int type; /* a dtype, or RAW */
} buffer;

static buffer buffers[BUFFERS];
static int buffer_count;

static void *allocate(source *s, size_t bytes, int type, bool is_output)
{
    REQUIRE(buffer_count < BUFFERS);
    buffer *b = &buffers[buffer_count++];
    b->bytes = bytes;
    b->type = type;
    void *p = NULL;
    REQUIRE(posix_memalign(&p, 64, bytes) == 0);
    b->data = p;
    uint64_t pattern = take_bytes(s, 8) | 1;
    for (size_t i = 0; i < bytes; i++) {
        pattern = pattern * 6364136223846793005u + 1442695040888963407u;
        b->data[i] = (char)(pattern >> 56);
    }
    b->before = is_output ? malloc(bytes) : NULL;
    if (b->before != NULL) {
        memcpy(b->before, b->data, bytes);
    }
    return b->data;
}

static void release_all(bool nothing_written)
{
    while (buffer_count > 0) {
        const buffer *b = &buffers[--buffer_count];
        REQUIRE(!nothing_written || b->before == NULL || memcmp(b->data, b->before, b->bytes) == 0);
        free(b->data);
        free(b->before);
    }
}

/* The same bytes; but which NaN, of two, is the compiler's choice. */
static bool same_content(const buffer *a, const buffer *b)
{
    static const uint64_t infinity[] = {
        [FBN_F32] = 0x7f800000, [FBN_F64] = 0x7ff0000000000000, [FBN_F16] = 0x7c00, [FBN_BF16] = 0x7f80};
    REQUIRE(a->bytes == b->bytes && a->type == b->type);
    bool same = memcmp(a->data, b->data, a->bytes) == 0;
    if (same || a->type == RAW) {
        return same;
    }
    const size_t size = (size_t)fbn_dtype_size((fbn_dtype)a->type);
    const uint64_t sign = (uint64_t)1 << (8 * size - 1);
    for (size_t i = 0; i < a->bytes; i += size) {
        uint64_t x = 0;
        uint64_t y = 0;
        memcpy(&x, a->data + i, size);
        memcpy(&y, b->data + i, size);
        if (x != y && ((x & ~sign) <= infinity[a->type] || (y & ~sign) <= infinity[a->type])) {
            return false;
        }
    }
    return true;
}

/* ---- the machine, which the linker lets every plan ask for here ---- */

static fbn_machine machine;

/* What plans decide, and how often; what is never seen is not tested. */
#define DECISIONS(SEEN)                                                                                                \
    SEEN(teams, plan.team > 1)                                                                                         \
    SEEN(slabs, plan.slabs > plan.team)                                                                                \
    SEEN(uneven_slabs, plan.slabs > 1 && g->channels % plan.slab != 0)                                                 \
    SEEN(sweeps, plan.slab == 0 && (call->op == FBN_PLAN_FORWARD || call->op == FBN_PLAN_BACKWARD))                    \
    SEEN(sides, plan.side > 1 && call->adjacent && g->family == FBN_ROWS)                                              \
    SEEN(images, plan.images > 1)                                                                                      \
    SEEN(uneven_images, plan.images > 1 && g->outer % plan.images != 0)                                                \
    SEEN(images_backwards, plan.images > 1 && plan.backwards)                                                          \
    SEEN(pieces, plan.piece < (g->family == FBN_COLS ? g->channels : plan.panel > 0 ? g->outer : g->inner))            \
    SEEN(panels_of_planes, plan.panel > 0 && g->family == FBN_ROWS)                                                    \
    SEEN(panels_of_rows, plan.panel > 0 && g->family == FBN_COLS)                                                      \
    SEEN(streams, plan.stream)                                                                                         \
    SEEN(turns, plan.turn > 0)                                                                                         \
    SEEN(beside, plan.beside && call->op == FBN_PLAN_FORWARD)                                                          \
    SEEN(beside_gradients, plan.beside && call->op == FBN_PLAN_BACKWARD)                                               \
    SEEN(teams_in_turns, plan.team > 1 && plan.turn > 0)                                                               \
    SEEN(ahead, plan.ahead > 0 && plan.ahead < g->channels)                                                            \
    SEEN(fetches, plan.fetch > 0)                                                                                      \
    SEEN(fetches_nothing, g->family == FBN_ROWS && plan.fetch == 0)
#define COUNT(what, condition) long what;
static struct {
    long plans;
    DECISIONS(COUNT)
} seen;

fbn_plan __real_fbn_make_plan(const fbn_geometry *g, const fbn_call *call, const fbn_machine *m);
fbn_plan __wrap_fbn_make_plan(const fbn_geometry *g, const fbn_call *call, const fbn_machine *m);
fbn_plan __wrap_fbn_make_plan(const fbn_geometry *g, const fbn_call *call, const fbn_machine *m)
{
    REQUIRE(m == fbn_this_machine());
    fbn_call asked = *call;
    asked.beside = true; /* kernels that cannot refuse, and take turns */
    fbn_plan plan = __real_fbn_make_plan(g, &asked, &machine);
    plan.turn = plan.turn > 0 ? 48 : 0; /* these tensors are small, and turns are to end in the middle of rows */
#define SEE(what, condition) seen.what += (condition) ? 1 : 0;
    plan.images = fbn_min(plan.images, 3); /* few images are more than one step has */
    DECISIONS(SEE)
    seen.plans++;
    return plan;
}

/* Every decision is made by one of the seeds. */
static void report(void)
{
    enum { ENOUGH = 1000 };
    bool all = true;
#define SAY(what, condition)                                                                                           \
    fprintf(stderr, " " #what " %ld", seen.what);                                                                      \
    all = all && seen.what > 0;
    fprintf(stderr, "plans %ld:", seen.plans);
    DECISIONS(SAY)
    fprintf(stderr, "\n");
    if (!all && seen.plans > ENOUGH) {
        fprintf(stderr, "there are plans that were never made\n");
        _Exit(1);
    }
}

/* ---- what makes sense, said a second time and without overflow ---- */

typedef __int128 wide;

static bool geometry_makes_sense(const fbn_geometry *g)
{
    return (unsigned)g->dtype < FBN_DTYPE_COUNT && (unsigned)g->family <= FBN_COLS && g->outer > 0 && g->channels > 0 &&
           g->inner > 0 && (g->family == FBN_ROWS || g->inner == 1);
}

static bool is_ownable(const fbn_geometry *g)
{
    return geometry_makes_sense(g) && g->outer <= MOST_ELEMENTS && g->channels <= MOST_ELEMENTS &&
           g->inner <= MOST_ELEMENTS && (wide)g->outer * g->channels * g->inner <= MOST_ELEMENTS;
}

/* ---- a call ---- */

typedef struct {
    fbn_geometry g;
    fbn_act act;
    fbn_affine affine;
    int threads;
    bool sane;    /* so far, everything that was drawn makes sense */
    bool unsure;  /* something was drawn that may be accepted or refused */
    bool repeats; /* a tensor may have two elements in one place, where the order of writing shows */
} call;

static void expect(call *c, bool condition) { c->sane = c->sane && condition; }

static call take_call(source *s)
{
    call c = {.sane = true};
    c.g = (fbn_geometry){(fbn_dtype)take_enum(s, FBN_DTYPE_COUNT), (fbn_family)take_enum(s, 2), take_integer(s),
                         take_integer(s), take_integer(s)};
    if (c.g.family == FBN_COLS && take(s) < 240) {
        c.g.inner = 1;
    }
    c.act = (fbn_act){(fbn_activation)take_enum(s, FBN_ACTIVATION_COUNT), take_double(s)};
    c.threads = take_threads(s);
    expect(&c, is_ownable(&c.g) && c.threads >= 1);
    return c;
}

/* Whether a dimension's steps do not meet, and lie within one step of the other dimension. */
static bool nests(wide n, wide stride, wide others, wide other_stride, wide inner)
{
    stride = stride < 0 ? -stride : stride;
    other_stride = other_stride < 0 ? -other_stride : other_stride;
    return (n == 1 || stride >= inner) && (others == 1 || other_stride >= (n - 1) * stride + inner);
}

/* A tensor of the call's geometry: any strides; NULL, or misaligned, now and then. */
static fbn_tensor take_tensor(source *s, call *c, bool is_output)
{
    const fbn_geometry *g = &c->g;
    fbn_tensor t = {NULL, g->family == FBN_ROWS && is_ownable(g) ? g->channels * g->inner : g->channels,
                    g->family == FBN_ROWS ? g->inner : 1};
    uint8_t how = take(s);
    if (how >= 128) {
        t.outer_stride = take_integer(s);
        t.channel_stride = g->family == FBN_COLS && how < 240 ? 1 : take_integer(s);
    }
    expect(c, g->family == FBN_ROWS || t.channel_stride == 1);
    if (!is_ownable(g)) {
        return t;
    }
    wide outer = (wide)(g->outer - 1) * t.outer_stride;
    wide across = (wide)(g->channels - 1) * t.channel_stride;
    wide low = (outer < 0 ? outer : 0) + (across < 0 ? across : 0);
    wide high = (outer > 0 ? outer : 0) + (across > 0 ? across : 0) + g->inner;
    size_t size = (size_t)fbn_dtype_size(g->dtype);
    bool in_reach = high - low <= 4 * MOST_ELEMENTS;
    bool never_taken = llabs(t.outer_stride / 2) > 1 << 30 || llabs(t.channel_stride / 2) > 1 << 30;
    c->unsure = c->unsure || never_taken;
    expect(c, in_reach && (how < 100 || how > 104));
    if (!in_reach || how == 100) {
        return t;
    }
    c->repeats = c->repeats || !(nests(g->channels, t.channel_stride, g->outer, t.outer_stride, g->inner) ||
                                 nests(g->outer, t.outer_stride, g->channels, t.channel_stride, g->inner));
    char *p = allocate(s, (size_t)(high - low) * size, (int)g->dtype, is_output);
    t.data = p - (ptrdiff_t)low * (ptrdiff_t)size + (how > 100 && how <= 104 ? 1 : 0);
    return t;
}

/* One number a channel; NULL now and then, which `required` says is senseless. */
static double *take_channels(source *s, call *c, bool required, bool is_output)
{
    bool absent = take(s) % 16 == 15;
    expect(c, !(required && absent));
    if (absent || c->g.channels < 1 || c->g.channels > MOST_ELEMENTS) {
        return NULL;
    }
    double *p = allocate(s, (size_t)c->g.channels * sizeof(double), FBN_F64, is_output);
    for (int64_t i = 0; !is_output && i < c->g.channels && i < 8; i++) {
        p[i] = take_double(s);
    }
    return p;
}

static void take_affine(source *s, call *c, bool has_statistics)
{
    c->affine.mean = take_channels(s, c, has_statistics, false);
    c->affine.mean_lo = take_channels(s, c, false, false);
    c->affine.var = take_channels(s, c, has_statistics, false);
    c->affine.weight = take_channels(s, c, false, false);
    c->affine.bias = take_channels(s, c, false, false);
    c->affine.eps = take_double(s);
}

static uint8_t *take_gate(source *s, const call *c, bool is_output)
{
    int64_t bytes = fbn_gate_bytes(&c->g);
    REQUIRE(bytes > 0 || !is_ownable(&c->g));
    return is_ownable(&c->g) && take(s) % 2 == 0 ? (uint8_t *)allocate(s, (size_t)bytes, RAW, is_output) : NULL;
}

static const fbn_tensor *take_optional(source *s, call *c, fbn_tensor *t, bool is_output)
{
    if (take(s) % 2 == 0) {
        return NULL;
    }
    bool sane = c->sane;
    *t = take_tensor(s, c, is_output);
    if (t->data == NULL) { /* as good as none, or refused */
        c->sane = sane;
        c->unsure = true;
    }
    return t;
}

static fbn_moments take_moments(source *s, call *c)
{
    fbn_moments m = {0};
    m.mean = take_channels(s, c, true, true);
    m.mean_lo = take_channels(s, c, true, true);
    m.m2 = take_channels(s, c, true, true);
    return m;
}

static fbn_status fuzz_moments(source *s, call *c)
{
    fbn_tensor x = take_tensor(s, c, false);
    fbn_moments out = take_moments(s, c);
    return fbn_moments_of(&c->g, x, c->threads, &out);
}

static fbn_status fuzz_forward(source *s, call *c)
{
    fbn_tensor residual;
    fbn_tensor x = take_tensor(s, c, false);
    const fbn_tensor *other = take_optional(s, c, &residual, false);
    fbn_tensor y = take(s) % 8 == 7 ? x : take_tensor(s, c, true);
    uint8_t *gate = take_gate(s, c, true);
    take_affine(s, c, false);
    fbn_moments out = take_moments(s, c);
    double *var = take_channels(s, c, true, true);
    return fbn_forward(&c->g, x, other, y, gate, &c->affine, c->act, c->threads, &out, var);
}

static fbn_status fuzz_normalize(source *s, call *c)
{
    fbn_tensor residual;
    fbn_tensor x = take_tensor(s, c, false);
    const fbn_tensor *other = take_optional(s, c, &residual, false);
    fbn_tensor y = take(s) % 8 == 7 ? x : take_tensor(s, c, true);
    uint8_t *gate = take_gate(s, c, true);
    take_affine(s, c, true);
    return fbn_normalize(&c->g, x, other, y, gate, &c->affine, c->act, c->threads);
}

static fbn_status fuzz_prepared(source *s, call *c)
{
    fbn_prepared *prepared = NULL;
    call made_for = *c;
    if (take(s) % 8 == 7) { /* for another tensor */
        made_for.g.channels = take_integer(s);
        made_for.g.dtype = (fbn_dtype)take_enum(s, FBN_DTYPE_COUNT);
    }
    take_affine(s, &made_for, true);
    fbn_status status = fbn_prepare(made_for.g.dtype, made_for.g.channels, &made_for.affine, &prepared);
    REQUIRE((status == FBN_OK) == (prepared != NULL));
    c->sane = made_for.sane;
    c->unsure = made_for.unsure;
    expect(c, made_for.g.channels == c->g.channels && made_for.g.dtype == c->g.dtype);
    fbn_tensor residual;
    fbn_tensor x = take_tensor(s, c, false);
    const fbn_tensor *other = take_optional(s, c, &residual, false);
    fbn_tensor y = take_tensor(s, c, true);
    uint8_t *gate = take_gate(s, c, true);
    status = fbn_apply(&c->g, x, other, y, gate, prepared, c->act, c->threads);
    fbn_release(prepared);
    return status;
}

static fbn_status fuzz_backward_reduce(source *s, call *c)
{
    fbn_tensor x = take_tensor(s, c, false);
    fbn_tensor dy = take_tensor(s, c, false);
    const uint8_t *gate = take_gate(s, c, false);
    take_affine(s, c, true);
    double *sum_dy = take_channels(s, c, true, true);
    double *sum_dy_xmu = take_channels(s, c, true, true);
    return fbn_backward_reduce(&c->g, x, dy, gate, &c->affine, c->act, c->threads, sum_dy, sum_dy_xmu);
}

static fbn_status fuzz_backward_apply(source *s, call *c)
{
    fbn_tensor extra;
    fbn_tensor x = take_tensor(s, c, false);
    fbn_tensor dy = take_tensor(s, c, false);
    fbn_tensor dx = take_tensor(s, c, true);
    const fbn_tensor *dresidual = take_optional(s, c, &extra, true);
    const uint8_t *gate = take_gate(s, c, false);
    take_affine(s, c, true);
    const double *sum_dy = take_channels(s, c, true, false);
    const double *sum_dy_xmu = take_channels(s, c, true, false);
    return fbn_backward_apply(&c->g, x, dy, dx, dresidual, gate, &c->affine, c->act, sum_dy, sum_dy_xmu, take_double(s),
                              c->threads);
}

static fbn_status fuzz_backward(source *s, call *c)
{
    fbn_tensor extra;
    fbn_tensor x = take_tensor(s, c, false);
    fbn_tensor dy = take_tensor(s, c, false);
    fbn_tensor dx = take(s) % 8 == 7 ? dy : take_tensor(s, c, true);
    const fbn_tensor *dresidual = take_optional(s, c, &extra, true);
    const uint8_t *gate = take_gate(s, c, false);
    take_affine(s, c, true);
    double *grad_bias = take_channels(s, c, true, true);
    double *grad_weight = take_channels(s, c, true, true);
    return fbn_backward(&c->g, x, dy, dx, dresidual, gate, &c->affine, c->act, take(s) % 2 == 0, c->threads, grad_bias,
                        grad_weight);
}

static fbn_status fuzz_copy(source *s, call *c)
{
    int64_t bytes = take_integer(s);
    uint8_t how = take(s);
    bool ownable = bytes >= 0 && bytes <= MOST_ELEMENTS;
    size_t room = ownable ? (size_t)bytes : 0;
    char *from = (char *)allocate(s, room, RAW, false) + (how == 1);
    char *to = (char *)allocate(s, room, RAW, true) + (how == 2);
    c->sane = ownable && c->threads >= 1 && (how < 1 || how > 3);
    fbn_status status = fbn_copy(ownable && how != 3 ? from : NULL, ownable ? to : NULL, bytes, c->threads);
    REQUIRE(status != FBN_OK || memcmp(from, to, room) == 0);
    return status;
}

/* Of those that this CPU runs, the best half of the time. */
static void choose_tier(uint8_t how)
{
    const char *runnable[8];
    unsigned count = 0;
    for (int i = 0; fbn_tier_at(i) != NULL && count < sizeof runnable / sizeof *runnable; i++) {
        if (fbn_tier_at(i)->runnable) {
            runnable[count++] = fbn_tier_at(i)->name;
        }
    }
    REQUIRE(fbn_dispatch(runnable[how % 2 == 0 ? 0 : how / 2 % count]));
}

/* ---- the collapse of strides ---- */

enum { MOST_DIMS = 5, MOST_TUPLES = 4096 };

/* Where one element is in each array; first the channel that it belongs to. */
typedef struct {
    int64_t channel, at[FBN_MAX_ARRAYS];
} tuple;

static int tuple_order(const void *a, const void *b) { return memcmp(a, b, sizeof(tuple)); }

/* The geometry that was found must hold the same elements, in the same channels, paired across arrays as they were. */
static void fuzz_collapse(source *s)
{
    static tuple given[MOST_TUPLES];
    static tuple found[MOST_TUPLES];
    fbn_dtype dtype = (fbn_dtype)(take(s) % FBN_DTYPE_COUNT);
    int64_t size = fbn_dtype_size(dtype);
    int ndim = take(s) % (MOST_DIMS + 1);
    int axis = ndim > 0 ? take(s) % ndim : 0;
    int count = 1 + take(s) % FBN_MAX_ARRAYS;
    intptr_t shape[MOST_DIMS];
    intptr_t strides[FBN_MAX_ARRAYS][MOST_DIMS];
    fbn_array arrays[FBN_MAX_ARRAYS];
    fbn_tensor tensors[FBN_MAX_ARRAYS];
    fbn_geometry g;
    int64_t elements = 1;
    for (int d = 0; d < ndim; d++) {
        shape[d] = 1 + take(s) % 5;
        elements *= shape[d];
    }
    uint8_t order = take(s); /* C order of a rotated shape, then spoilt */
    for (int a = 0; a < count; a++) {
        intptr_t step = size;
        for (int d = 0; d < ndim; d++) {
            int at = (ndim - 1 - d + order) % ndim;
            uint8_t how = take(s);
            strides[a][at] = how < 200        ? step
                             : how < 230      ? -step
                             : how < 240      ? 0
                             : shape[at] == 1 ? (intptr_t)take_bytes(s, 8)
                                              : how;
            step *= shape[at];
        }
        arrays[a] = (fbn_array){(char *)(uintptr_t)(1 << 20), strides[a]};
    }
    if (!fbn_collapse(dtype, ndim, axis, shape, count, arrays, &g, tensors)) {
        return;
    }
    REQUIRE(g.channels == shape[axis] && g.outer * g.channels * g.inner == elements && elements <= MOST_TUPLES);
    memset(given, 0, sizeof given);
    memset(found, 0, sizeof found);
    for (int64_t e = 0; e < elements; e++) {
        int64_t rest = e;
        intptr_t index[MOST_DIMS] = {0};
        for (int d = 0; d < ndim; d++) {
            index[d] = rest % shape[d];
            rest /= shape[d];
        }
        given[e].channel = index[axis];
        found[e].channel = e / g.inner % g.channels;
        for (int a = 0; a < count; a++) {
            int64_t offset = 0;
            for (int d = 0; d < ndim; d++) {
                offset += index[d] == 0 ? 0 : index[d] * strides[a][d];
            }
            given[e].at[a] = (int64_t)(uintptr_t)arrays[a].data + offset;
            found[e].at[a] =
                (int64_t)(uintptr_t)tensors[a].data + (e / g.inner / g.channels * tensors[a].outer_stride +
                                                       found[e].channel * tensors[a].channel_stride + e % g.inner) *
                                                          size;
        }
    }
    qsort(given, (size_t)elements, sizeof *given, tuple_order);
    qsort(found, (size_t)elements, sizeof *found, tuple_order);
    REQUIRE(memcmp(given, found, (size_t)elements * sizeof *given) == 0);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    REQUIRE(fbn_dispatch(NULL));
    fbn_parallel_init();
    atexit(report);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static fbn_status (*const entries[])(source *, call *) = {
        fuzz_moments,         fuzz_forward,        fuzz_normalize, fuzz_prepared,
        fuzz_backward_reduce, fuzz_backward_apply, fuzz_backward,  fuzz_copy,
    };
    enum { ENTRIES = sizeof entries / sizeof *entries };
    uint8_t caches = size > 0 ? data[--size] : 0;
    source s = {data, data + size};
    int how = take(&s);
    int which = how % (ENTRIES + 1);
    choose_tier((uint8_t)(how / (ENTRIES + 1)));
    if (which == ENTRIES) {
        fuzz_collapse(&s);
        return 0;
    }
    const call given = take_call(&s);
    const source rest = s;
    call c = given;
    c.threads = c.threads < 1 ? c.threads : 1;
    machine = (fbn_machine){1 << 24, 1 << 28, false};
    int64_t bytes = is_ownable(&c.g) ? c.g.outer * c.g.channels * c.g.inner * fbn_dtype_size(c.g.dtype) : 0;
    bool activates = entries[which] != fuzz_moments && entries[which] != fuzz_copy;
    expect(&c, !activates || (unsigned)c.act.kind < FBN_ACTIVATION_COUNT);
    fbn_status status = entries[which](&s, &c);
    REQUIRE(status == FBN_OK || status == FBN_BAD_ARGUMENT || status == FBN_NO_MEMORY);
    REQUIRE((status == FBN_OK) == c.sane || status == FBN_NO_MEMORY || (c.unsure && status == FBN_BAD_ARGUMENT));
    if (status == FBN_OK) {
        const int count = buffer_count;
        machine = (fbn_machine){bytes >> caches % 8, bytes >> caches % 8 << caches / 8 % 8, caches / 64 % 2 != 0};
        c = given;
        s = rest;
        status = entries[which](&s, &c);
        REQUIRE(status == FBN_OK && buffer_count == 2 * count);
        for (int i = 0; !c.repeats && i < count; i++) {
            REQUIRE(same_content(&buffers[i], &buffers[count + i]));
        }
    }
    release_all(status != FBN_OK);
    return 0;
}
