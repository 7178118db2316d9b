/* plan.c -- the policy. Its numbers, here and in plan.h, are measurements; docs/performance.md has the telling ones. */
#include "plan.h"

#include "kernels/channel.h"

#include <stdio.h>

static fbn_machine fbn_machine_now = {.l2 = 512 << 10, .l3 = 16 << 20};

#if defined(__linux__)
/* Of all sources the kernel's own tells what one core shares with its neighbours; the C library may report the sum over
 * a whole package. */
static void fbn_ask(int index, int64_t *size)
{
    char path[64];
    long kib = 0;
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", index);
    FILE *file = fopen(path, "r");
    if (file == NULL) {
        return;
    }
    if (fscanf(file, "%ldK", &kib) == 1 && kib > 0 && kib < 1L << 24) {
        *size = (int64_t)kib << 10;
    }
    fclose(file);
}
#endif

void fbn_machine_init(bool follows)
{
    fbn_machine_now.follows = follows;
#if defined(__linux__)
    fbn_ask(2, &fbn_machine_now.l2);
    fbn_ask(3, &fbn_machine_now.l3);
#endif
}

const fbn_machine *fbn_this_machine(void) { return &fbn_machine_now; }

int64_t fbn_dtype_size(fbn_dtype dtype) { return dtype == FBN_F64 ? 8 : dtype == FBN_F32 ? 4 : 2; }

/* How much of a tensor one step of an apply walk covers: small enough to share, large enough to call a kernel for.
 * Elements of a run, and what pieces of it are multiples of; images of a panel; bytes of rows, at most, and at least
 * where threads share them. A row's columns, of which L1 is to keep the coefficients. And where walks take turns,
 * elements: stores are to drain while the other reads. */
enum {
    FBN_PIECE = 1 << 16,
    FBN_EVEN = 32,
    FBN_PANEL_TILE = 8,
    FBN_ROWS_MOST = 1 << 19,
    FBN_ROWS_LEAST = 1 << 16,
    FBN_COLUMNS = 1024,
    FBN_TURN = 4096
};

/* Bytes from what is read to what is fetched: by a reduce, and by an apply, whose stores come in between. */
enum { FBN_REACH = 2048, FBN_SOON = 1024, FBN_SOON_FOLLOWED = 2048 };

/* Bytes below which a parallel region costs more than it saves; what is short enough for a panel, and where rows that
 * are not streamed share their coefficients; how many rows and elements make one worth it; columns of a tile, whose
 * words of a gate must be whole. */
enum {
    FBN_SERIAL_BYTES = 128 << 10,
    FBN_PANEL_BYTES = 1024,
    FBN_STACKED_BYTES = 256,
    FBN_PANEL_ROWS = 8,
    FBN_PANEL_WIDTH = 512,
    FBN_TILE = 1024,
    FBN_LINES = 32,
    FBN_RUN_BYTES = 8192,
    FBN_PATCHED_BYTES = 4096,
    FBN_CACHE_LINE = 64
};
_Static_assert(FBN_TILE % 16 == 0, "a tile begins with a word of the gate");
_Static_assert(FBN_EVEN % 16 == 0 && FBN_EVEN * 2 % FBN_CACHE_LINE == 0, "so does a piece, and with a cache line");
_Static_assert(FBN_PANEL_WIDTH + FBN_PANEL_BYTES / 2 <= FBN_COLUMNS, "a row of panels is one piece");

static int64_t fbn_bytes(const fbn_geometry *g) { return g->outer * g->channels * g->inner * fbn_dtype_size(g->dtype); }

static int fbn_choose_team(const fbn_geometry *g, const fbn_call *call)
{
    return fbn_bytes(g) >= FBN_SERIAL_BYTES ? call->threads : 1;
}

/* So much that the caches keep little of it: the last level may be the neighbours', too. A single sweep has more use
 * for what it keeps than one whose first sweep has read all. Where hardware follows runs, as measured there. */
static bool fbn_large(const fbn_geometry *g, const fbn_call *call, const fbn_machine *m)
{
    if (m->follows) {
        return fbn_bytes(g) > m->l2 * 4;
    }
    const int64_t share = fbn_ceil_div(fbn_bytes(g), fbn_choose_team(g, call));
    const int64_t times = call->op == FBN_PLAN_NORMALIZE ? 16 : 8;
    return share > m->l2 * times / call->tensors || fbn_bytes(g) > fbn_max(m->l3, m->l2) / call->tensors;
}

static bool fbn_two_phase(fbn_op op) { return op == FBN_PLAN_FORWARD || op == FBN_PLAN_BACKWARD; }

/* Channels of which a multiple fills whole vectors, and so whole cache lines: an output that is streamed has no use for
 * the ends of rows. */
static int64_t fbn_grain(const fbn_geometry *g)
{
    int64_t line = FBN_CACHE_LINE / fbn_dtype_size(g->dtype);
    int64_t even = g->inner & -g->inner;
    return fbn_max(fbn_max(line, 16) / even, 1);
}

/* What a slab holds of a channel. */
static int64_t fbn_channel_bytes(const fbn_geometry *g, fbn_op op)
{
    return g->outer * g->inner * fbn_dtype_size(g->dtype) * (op == FBN_PLAN_BACKWARD ? 2 : 1);
}

/* Slabs are small where the hardware follows runs. With 2 MB of L2 a backward takes, in multiples of the copy, 2.36
 * with slabs of half of it, 2.25 with a quarter, 2.12 with an eighth. */
static void fbn_choose_slabs(const fbn_geometry *g, const fbn_call *call, const fbn_machine *m, fbn_plan *plan)
{
    const int team = plan->team;
    const bool turns = plan->turn > 0;
    const int64_t channel_bytes = fbn_channel_bytes(g, call->op);
    if (g->family == FBN_COLS) {
        return;
    }
    /* What L2 cannot hold may stay in a thread's share of L3, if it is read in long runs. By turns, three slabs are
     * there at a time; where hardware follows runs, those of 1.6 MB take 1.4 copies without turns, 1.65 with them. */
    const int64_t at_a_time = turns ? 3 : 1;
    if (turns && m->follows && channel_bytes > m->l2 / 2) {
        return;
    }
    if ((channel_bytes > m->l2 && g->inner * fbn_dtype_size(g->dtype) < FBN_RUN_BYTES) ||
        (channel_bytes > m->l2 / at_a_time && channel_bytes > m->l3 / 2 / at_a_time / team)) {
        return;
    }
    /* A channel dealt to one thread whole: uneven shares cost more than a second sweep where channels are few. */
    int64_t share = fbn_ceil_div(g->channels, team);
    if (share * team * 4 > g->channels * 5) {
        return;
    }
    /* Every thread needs work, and as many slabs as the others. */
    int64_t most = g->channels < team ? 1 : g->channels / team;
    int64_t grain = fbn_grain(g);
    int64_t fits = m->l2 / (m->follows ? 8 : turns ? 4 : 2) / channel_bytes;
    fits = fbn_clamp(fbn_max(fits, fbn_min(m->l2 / 4 / channel_bytes, grain)), 1, most);
    plan->grain = fits >= grain ? grain : 1;
    int64_t grains = fbn_ceil_div(g->channels, plan->grain);
    int64_t each = fbn_ceil_div(fbn_ceil_div(grains, team), fits / plan->grain);
    plan->slabs = fbn_min(each * team, grains);
    plan->slab = fbn_min(fbn_ceil_div(grains, plan->slabs) * plan->grain, g->channels);
}

/* Channels side by side: long runs where planes are short; not so many that a thread goes without. */
static int64_t fbn_choose_tile(const fbn_geometry *g, const fbn_plan *plan)
{
    const bool rows = g->family == FBN_ROWS;
    int64_t strips = rows ? fbn_blocks_rows(g->outer, g->inner).strips : fbn_strips_cols(g->outer);
    int64_t share = fbn_ceil_div(g->channels, fbn_ceil_div(plan->team, strips));
    if (plan->slab > 0) {
        return fbn_min(plan->slab, FBN_LINES);
    }
    if (rows) {
        int64_t most = fbn_clamp(share, 1, FBN_LINES);
        int64_t tile = fbn_clamp(FBN_RUN_BYTES / (g->inner * fbn_dtype_size(g->dtype)), 1, most);
        int64_t grain = fbn_grain(g);
        return tile > grain ? tile / grain * grain : tile;
    }
    return fbn_clamp(fbn_ceil_div(share, 16) * 16, 16, FBN_TILE);
}

static int64_t fbn_choose_panel(const fbn_geometry *g, const fbn_plan *plan, bool large)
{
    if (g->family == FBN_COLS) {
        const bool many = g->outer * g->channels >= FBN_PANEL_ROWS * FBN_PANEL_WIDTH;
        const int64_t most = large ? FBN_PANEL_BYTES : FBN_STACKED_BYTES;
        return many && g->channels * fbn_dtype_size(g->dtype) < most ? fbn_ceil_div(FBN_PANEL_WIDTH, g->channels) : 0;
    }
    if (g->outer < FBN_PANEL_ROWS || fbn_joins(g->inner, fbn_dtype_size(g->dtype))) {
        return 0;
    }
    int64_t grain = fbn_grain(g);
    return fbn_clamp(fbn_ceil_div(fbn_ceil_div(FBN_PANEL_WIDTH, g->inner), grain) * grain, 1,
                     plan->slab != 0 ? plan->slab : g->channels);
}

/* Of a backward's wide rows L1 does not keep the coefficients, 32 KB at 2048 channels of float32: it takes 4.3 copies
 * whole, 3.2 in two pieces. That is worth it where enough rows share a piece and no cache line is cut in two; a forward
 * has less coefficients, and narrower pieces are bad for memory. */
static int64_t fbn_choose_pieces(const fbn_geometry *g, const fbn_call *call, const fbn_plan *plan, int64_t run)
{
    const bool backward = call->op == FBN_PLAN_BACKWARD || call->op == FBN_PLAN_APPLY;
    const bool lines = run * fbn_dtype_size(g->dtype) % FBN_CACHE_LINE == 0;
    const bool wide = run >= 2 * FBN_COLUMNS && plan->side >= FBN_PANEL_ROWS;
    return backward && lines && wide ? run / FBN_COLUMNS : fbn_ceil_div(run, FBN_PIECE);
}

/* What one step of an apply walk covers: a call of a kernel costs as much as some short planes. */
static void fbn_choose_step(const fbn_geometry *g, const fbn_call *call, fbn_plan *plan)
{
    const int64_t parts = plan->slab != 0 ? 1 : plan->team;
    int64_t run = g->inner;
    int64_t pieces = fbn_ceil_div(run, FBN_PIECE);
    plan->images = 1;
    if (g->family == FBN_COLS) {
        int64_t fold = plan->panel > 0 ? plan->panel : 1;
        int64_t rows = g->outer < fold ? 1 : g->outer / fold;
        int64_t bytes =
            parts > 1 ? fbn_clamp(fbn_bytes(g) / (parts * 16), FBN_ROWS_LEAST, FBN_ROWS_MOST) : FBN_ROWS_MOST;
        run = g->channels * fold;
        plan->side = fbn_clamp(bytes / (run * fbn_dtype_size(g->dtype)), 1, rows);
        pieces = fbn_choose_pieces(g, call, plan, run);
    } else if (plan->panel > 0) {
        plan->side = plan->panel;
        plan->piece = fbn_clamp(parts > 1 ? FBN_PANEL_TILE : g->outer, 1, g->outer);
        return;
    } else {
        int64_t most = plan->slab != 0 ? plan->slab : g->channels;
        int64_t side = fbn_clamp(fbn_min(FBN_PIECE / g->inner, g->outer * most / (parts * 4)), 1, most);
        int64_t grain = fbn_grain(g);
        plan->side = side > grain ? side / grain * grain : side;
        if (plan->side == most) {
            plan->images =
                fbn_clamp(FBN_PIECE / (most * g->inner), 1, fbn_max(g->outer / (parts > 1 ? parts * 4 : 1), 1));
        }
    }
    plan->piece = fbn_ceil_div(fbn_ceil_div(run, pieces), FBN_EVEN) * FBN_EVEN;
}

/* Where hardware follows runs it fetches them. Elsewhere what the last-level cache holds comes as fast without; and so
 * do short planes by turns, of which many images are read abreast. */
static int64_t fbn_choose_fetch(const fbn_geometry *g, const fbn_call *call, const fbn_machine *m, const fbn_plan *plan)
{
    const bool abreast = plan->turn > 0 && fbn_short(g->inner);
    const bool fetches = g->family == FBN_ROWS && !m->follows && !abreast;
    return fetches && fbn_bytes(g) > m->l3 / call->tensors ? FBN_REACH : 0;
}

/* What the apply of a slab fetches, while its stores wait for memory: by turns, the next is being read already. Where
 * hardware follows runs, what would push out much of the slab comes soon enough by itself. */
static int64_t fbn_choose_ahead(const fbn_geometry *g, const fbn_call *call, const fbn_machine *m, const fbn_plan *plan,
                                bool large)
{
    const bool turns = plan->turn > 0;
    const bool much = plan->slab * fbn_channel_bytes(g, call->op) > m->l2 / 2;
    if (plan->slab == 0 || !large || (m->follows && (turns || much))) {
        return 0;
    }
    return turns ? 2 * plan->slab : plan->slab;
}

/* Where hardware follows runs, inference gains 5 % by what it fetches; but a slab is in L2, and a backward loses 3 %.
 */
static int64_t fbn_choose_soon(const fbn_machine *m, const fbn_plan *plan)
{
    return !m->follows ? FBN_SOON : plan->slab > 0 ? 0 : FBN_SOON_FOLLOWED;
}

/* Whether slabs can be applied side by side with sums: their runs are whole vectors and cache lines. Sums of short
 * planes are in memory. */
static bool fbn_fits_beside(const fbn_geometry *g, const fbn_call *call, const fbn_plan *plan)
{
    const int64_t run = (call->adjacent && !call->gated ? plan->grain : 1) * g->inner;
    const bool whole = run % 16 == 0 && run * fbn_dtype_size(g->dtype) % FBN_CACHE_LINE == 0;
    return plan->turn > 0 && call->beside && call->aligned && whole && g->inner > FBN_SHORT_MOST;
}

static fbn_plan fbn_plan_as(const fbn_geometry *g, const fbn_call *call, const fbn_machine *m, bool large, bool turns)
{
    fbn_plan plan = {.team = fbn_choose_team(g, call), .turn = turns ? FBN_TURN : 0};
    int64_t size = fbn_dtype_size(g->dtype);
    if (fbn_two_phase(call->op)) {
        fbn_choose_slabs(g, call, m, &plan);
    }
    plan.tile = fbn_choose_tile(g, &plan);
    if (call->adjacent && !call->gated) {
        plan.panel = fbn_choose_panel(g, &plan, large);
    }
    fbn_choose_step(g, call, &plan);
    /* A gate is written in words, which begin with every plane; it may be read from anywhere. */
    const bool joined = call->adjacent && (!call->gated || call->op == FBN_PLAN_BACKWARD || call->op == FBN_PLAN_APPLY);
    int64_t run = (g->family == FBN_ROWS ? g->inner : g->channels) * size;
    if (g->family == FBN_ROWS && joined && fbn_joins(g->inner, size)) {
        run *= plan.side;
    }
    /* Runs that do not end with a cache line would be patched at both ends, and that costs more than it saves unless
     * they are long. */
    run = plan.panel > 0 ? FBN_CACHE_LINE : run;
    plan.stream = large && (run % FBN_CACHE_LINE == 0 || run >= FBN_PATCHED_BYTES);
    plan.beside = fbn_fits_beside(g, call, &plan);
    plan.backwards = fbn_two_phase(call->op) && !turns;
    plan.ahead = fbn_choose_ahead(g, call, m, &plan, large);
    plan.soon = fbn_choose_soon(m, &plan);
    plan.fetch = fbn_choose_fetch(g, call, m, &plan);
    return plan;
}

/* Turns are worth their smaller slabs where stores are streamed, and where a thread has a slab to apply while it
 * reduces the next. Panels take none; nor do short planes to which a residual is added: 2048 x 7 x 7 takes 2.7 copies
 * without and 3.4 with them. Where hardware follows runs they would interrupt it, and are worth it side by side alone;
 * but then for a backward without a residual, too: 512 x 28 x 28 takes 2.1 copies without and 1.8 with them. */
fbn_plan fbn_make_plan(const fbn_geometry *g, const fbn_call *call, const fbn_machine *m)
{
    const bool large = fbn_large(g, call, m);
    const bool added = call->tensors > 2;
    const bool forward = call->op == FBN_PLAN_FORWARD && !(added && fbn_short(g->inner));
    const bool backward = call->op == FBN_PLAN_BACKWARD && m->follows && call->tensors == 3 && !call->gated;
    if (large && (forward || backward)) {
        const fbn_plan plan = fbn_plan_as(g, call, m, large, true);
        if (plan.stream && plan.slabs > plan.team && plan.panel == 0 && (plan.beside || !m->follows)) {
            return plan;
        }
    }
    return fbn_plan_as(g, call, m, large, false);
}
