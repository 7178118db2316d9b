/* pass.c -- walks in terms of kernels: which run, which rows, in which order. */
#include "pass.h"

#include "dispatch.h"
#include "geometry.h"

#include <math.h>
#include <stdlib.h>

static int64_t fbn_min(int64_t a, int64_t b) { return a < b ? a : b; }

static void *fbn_at(const fbn_tensor *t, int64_t size, int64_t o, int64_t c, int64_t i)
{
    return t->data == NULL ? NULL : (char *)t->data + (o * t->outer_stride + c * t->channel_stride + i) * size;
}

int64_t fbn_gate_words(const fbn_geometry *g)
{
    return fbn_ceil_div(g->family == FBN_ROWS ? g->inner : g->channels, 16);
}

int64_t fbn_gate_bytes(const fbn_geometry *g)
{
    if (!fbn_geometry_valid(g)) {
        return -1;
    }
    int64_t rows = g->family == FBN_ROWS ? g->outer * g->channels : g->outer;
    return rows * fbn_gate_words(g) * (int64_t)sizeof(uint16_t);
}

static uint16_t *fbn_gate_at(const fbn_pass *pass, int64_t o, int64_t c)
{
    if (pass->gate == NULL) {
        return NULL;
    }
    int64_t words = fbn_gate_words(&pass->g);
    return pass->gate + (pass->g.family == FBN_ROWS ? (o * pass->g.channels + c) * words : o * words + c / 16);
}

static bool fbn_adjacent(const fbn_geometry *g, const fbn_tensor *t)
{
    return t->data == NULL || (g->family == FBN_ROWS ? t->channel_stride == g->inner : t->outer_stride == g->channels);
}

bool fbn_pass_ready(fbn_pass *pass, const fbn_geometry *g, fbn_act act, fbn_op op, int threads)
{
    fbn_tensor *tensors[] = {&pass->x, &pass->other, &pass->y, &pass->extra};
    if (!fbn_geometry_valid(g) || (unsigned)act.kind >= FBN_ACTIVATION_COUNT || threads < 1) {
        return false;
    }
    fbn_call call = {.op = op, .threads = threads, .gated = pass->gate != NULL, .adjacent = true};
    for (int i = 0; i < 4; i++) {
        if (tensors[i]->data == NULL) {
            *tensors[i] = (fbn_tensor){0}; /* whatever its strides were */
        } else if (!fbn_tensor_valid(g, tensors[i])) {
            return false;
        }
        call.adjacent = call.adjacent && fbn_adjacent(g, tensors[i]);
    }
    pass->g = *g;
    pass->kernels = fbn_kernels_for(g->dtype);
    pass->plan = fbn_make_plan(g, &call, fbn_this_machine());
    pass->rule = (fbn_gate_rule){.kind = (int)act.kind,
                                 .upper = act.kind == FBN_RELU6 ? 6.0 : (double)INFINITY,
                                 .negative = act.kind == FBN_LEAKY_RELU ? act.negative_slope : 0.0};
    return true;
}

/* ---- reduce ---- */

static int64_t fbn_strips(const fbn_pass *pass)
{
    const fbn_geometry *g = &pass->g;
    return g->family == FBN_ROWS ? fbn_blocks_rows(g->outer, g->inner).strips : fbn_strips_cols(g->outer);
}

/* Elements of a channel in strips [from, to). */
static double fbn_strips_count(const fbn_pass *pass, const fbn_blocks *b, int64_t strips, int64_t from, int64_t to)
{
    const fbn_geometry *g = &pass->g;
    if (g->family == FBN_COLS) {
        return (double)(fbn_part(g->outer, to, strips) - fbn_part(g->outer, from, strips));
    }
    int64_t first = fbn_part(b->count, from, strips);
    int64_t last = fbn_part(b->count, to, strips);
    if (b->pieces == 1) {
        return (double)((fbn_min(last * b->planes, g->outer) - first * b->planes) * g->inner);
    }
    int64_t begin = first / b->pieces * g->inner + first % b->pieces * b->piece_len;
    int64_t end = last / b->pieces * g->inner + last % b->pieces * b->piece_len;
    return (double)(end - begin);
}

/* Reduces one strip of channels [first, last). */
static void fbn_reduce_strip(const fbn_pass *pass, fbn_partials *p, const double *mean, const fbn_coefs *coefs,
                             fbn_room *room, int64_t first, int64_t last, int64_t strip)
{
    const fbn_geometry *g = &pass->g;
    const bool rows = g->family == FBN_ROWS;
    int64_t size = fbn_dtype_size(g->dtype);
    int64_t at = strip * g->channels + first;
    fbn_blocks blocks = {0};
    int64_t begin = 0; /* rows: blocks; cols: rows */
    int64_t end = 0;
    if (rows) {
        blocks = fbn_blocks_rows(g->outer, g->inner);
        begin = fbn_part(blocks.count, strip, p->strips);
        end = fbn_part(blocks.count, strip + 1, p->strips);
    } else {
        begin = fbn_part(g->outer, strip, p->strips);
        end = fbn_part(g->outer, strip + 1, p->strips);
    }
    /* The hardware's prefetcher loses its place at the end of every plane: fetch as many planes ahead as it takes; or
     * of short planes without a gate, of which all images are read at once, the neighbours. */
    bool fetch = rows && !pass->plan.warm;
    bool across = fbn_short(g->inner) && pass->gate == NULL;
    int64_t planes = fetch && !across ? fbn_ceil_div(FBN_REACH, (last - first) * g->inner * size) : 0;
    int64_t channels = fetch && across ? last - first : 0;
    fbn_span span = {
        .x = fbn_at(&pass->x, size, rows ? 0 : begin, first, 0),
        .other = fbn_at(&pass->other, size, rows ? 0 : begin, first, 0),
        .gate = fbn_gate_at(pass, rows ? 0 : begin, first),
        .x_stride = pass->x.outer_stride,
        .other_stride = pass->other.outer_stride,
        .gate_stride = fbn_gate_words(g) * (rows ? g->channels : 1),
        .rows = rows ? g->outer : end - begin,
        .width = rows ? g->inner : last - first,
        .x_next = pass->x.channel_stride,
        .other_next = pass->other.channel_stride,
        .gate_next = fbn_gate_words(g),
        .ahead = (planes * pass->x.outer_stride + channels * pass->x.channel_stride) * size,
        .other_ahead = (planes * pass->other.outer_stride + channels * pass->other.channel_stride) * size,
    };
    fbn_coef k = pass->backward ? fbn_coefs_at(coefs, first) : (fbn_coef){0};
    const fbn_kernels *kernels = pass->kernels;
    if (rows && pass->backward) {
        kernels->backward_reduce_rows(&span, &k, pass->rule, &blocks, begin, end, last - first, mean + first,
                                      room->tile, p->a + at, p->b + at);
    } else if (rows) {
        kernels->moments_rows(&span, &blocks, begin, end, last - first, room->tile, p->a + at, p->b + at, p->c + at);
    } else if (pass->backward) {
        kernels->backward_reduce_cols(&span, &k, pass->rule, mean + first, room->tile, p->a + at, p->b + at);
    } else {
        kernels->moments_cols(&span, room->tile, p->a + at, p->b + at, p->c + at);
    }
}

void fbn_reduce(const fbn_pass *pass, fbn_partials *p, const double *mean, const fbn_coefs *coefs, fbn_room *room,
                int64_t first, int64_t last, int64_t part, int64_t parts)
{
    int64_t chunk = fbn_min(pass->plan.tile, last - first);
    int64_t chunks = fbn_ceil_div(last - first, chunk);
    int64_t tasks = chunks * p->strips;
    for (int64_t t = fbn_part(tasks, part, parts); t < fbn_part(tasks, part + 1, parts); t++) {
        int64_t c = first + t % chunks * chunk;
        fbn_reduce_strip(pass, p, mean, coefs, room, c, fbn_min(c + chunk, last), t / chunks);
    }
}

/* A tree: its sums round less than a chain's, and float64 data have no digits to spare. */
void fbn_combine(const fbn_pass *pass, fbn_partials *p, int64_t first, int64_t last)
{
    const fbn_geometry *g = &pass->g;
    fbn_blocks blocks = {0};
    if (g->family == FBN_ROWS) {
        blocks = fbn_blocks_rows(g->outer, g->inner);
    }
    for (int64_t step = 1; step < p->strips; step *= 2) {
        for (int64_t strip = 0; strip + step < p->strips; strip += 2 * step) {
            int64_t middle = strip + step;
            double count = fbn_strips_count(pass, &blocks, p->strips, strip, middle);
            double more = fbn_strips_count(pass, &blocks, p->strips, middle, fbn_min(middle + step, p->strips));
            double share = more / (count + more);
            double weight = count * share;
            for (int64_t c = first; c < last; c++) {
                int64_t a = strip * g->channels + c;
                int64_t b = middle * g->channels + c;
                if (pass->backward) {
                    p->a[a] += p->a[b];
                    p->b[a] += p->b[b];
                } else {
                    fbn_merge_into(&p->a[a], &p->b[a], &p->c[a], share, weight, p->a[b], p->b[b], p->c[b]);
                }
            }
        }
    }
}

/* ---- apply ---- */

/* Rows [row, row + rows) of `width` elements that begin at channel c, as one call of a cols kernel. With `panel`, a row
 * is that many of the tensor's rows. Where no slab is to be fetched ahead, the next row is. */
static void fbn_apply_block(const fbn_pass *pass, const fbn_coef *k, int64_t row, int64_t rows, int64_t c,
                            int64_t width, int64_t panel, int64_t ahead)
{
    int64_t size = fbn_dtype_size(pass->g.dtype);
    int64_t step = panel > 0 ? panel : 1;
    fbn_span span = {
        .x = fbn_at(&pass->x, size, row * step, c, 0),
        .other = fbn_at(&pass->other, size, row * step, c, 0),
        .y = fbn_at(&pass->y, size, row * step, c, 0),
        .extra = fbn_at(&pass->extra, size, row * step, c, 0),
        .gate = fbn_gate_at(pass, row, c),
        .x_stride = pass->x.outer_stride * step,
        .other_stride = pass->other.outer_stride * step,
        .y_stride = pass->y.outer_stride * step,
        .extra_stride = pass->extra.outer_stride * step,
        .gate_stride = fbn_gate_words(&pass->g),
        .rows = rows,
        .width = width,
        .ahead = (ahead > 0 ? ahead * pass->x.channel_stride : pass->x.outer_stride * step) * size,
        .other_ahead = (ahead > 0 ? ahead * pass->other.channel_stride : pass->other.outer_stride * step) * size,
        .stream = pass->plan.stream,
    };
    if (pass->backward) {
        pass->kernels->backward_apply_cols(&span, k, pass->rule);
    } else {
        pass->kernels->normalize_cols(&span, k, pass->rule);
    }
}

/* Where the plan walks backwards, each part is walked from its end: what was read last is still in cache. */
static int64_t fbn_turn(const fbn_pass *pass, int64_t u, int64_t begin, int64_t end)
{
    return pass->plan.backwards ? begin + (end - 1 - u) : u;
}

static void fbn_apply_runs(const fbn_pass *pass, const fbn_coefs *coefs, int64_t first, int64_t last, int64_t ahead,
                           int64_t part, int64_t parts)
{
    const fbn_geometry *g = &pass->g;
    int64_t size = fbn_dtype_size(g->dtype);
    int64_t channels = last - first;
    int64_t pieces = fbn_ceil_div(g->inner, FBN_PIECE);
    /* Neighbours together where planes are short: a call costs as much as some of them. */
    int64_t side = fbn_clamp(fbn_min(FBN_PIECE / g->inner, g->outer * channels / (parts * 4)), 1, channels);
    int64_t sides = fbn_ceil_div(channels, side);
    int64_t units = g->outer * sides * pieces;
    int64_t begin = fbn_part(units, part, parts);
    int64_t end = fbn_part(units, part + 1, parts);
    for (int64_t u = begin; u < end; u++) {
        int64_t unit = fbn_turn(pass, u, begin, end);
        int64_t o = unit / pieces / sides;
        int64_t c = first + unit / pieces % sides * side;
        int64_t i = unit % pieces * FBN_PIECE;
        uint16_t *gate = fbn_gate_at(pass, o, c);
        fbn_span span = {
            .x = fbn_at(&pass->x, size, o, c, i),
            .other = fbn_at(&pass->other, size, o, c, i),
            .y = fbn_at(&pass->y, size, o, c, i),
            .extra = fbn_at(&pass->extra, size, o, c, i),
            .gate = gate == NULL ? NULL : gate + i / 16,
            .x_stride = pass->x.channel_stride,
            .other_stride = pass->other.channel_stride,
            .y_stride = pass->y.channel_stride,
            .extra_stride = pass->extra.channel_stride,
            .gate_stride = fbn_gate_words(g),
            .rows = fbn_min(side, last - c),
            .width = fbn_min(FBN_PIECE, g->inner - i),
            .ahead = ahead > 0 ? ahead * pass->x.channel_stride * size : FBN_SOON,
            .other_ahead = ahead > 0 ? ahead * pass->other.channel_stride * size : FBN_SOON,
            .stream = pass->plan.stream,
        };
        fbn_coef k = fbn_coefs_at(coefs, c);
        if (pass->backward) {
            pass->kernels->backward_apply_rows(&span, &k, pass->rule);
        } else {
            pass->kernels->normalize_rows(&span, &k, pass->rule);
        }
    }
}

/* Panels of channels in the rows family: short planes of neighbouring channels as one long row. */
static void fbn_apply_planes(const fbn_pass *pass, const fbn_coefs *coefs, fbn_coefs *panel, int64_t first,
                             int64_t last, int64_t ahead, int64_t part, int64_t parts)
{
    const fbn_geometry *g = &pass->g;
    int64_t wide = pass->plan.panel;
    int64_t panels = fbn_ceil_div(last - first, wide);
    int64_t tiles = parts == 1 ? 1 : fbn_ceil_div(g->outer, FBN_PANEL_TILE);
    int64_t units = panels * tiles;
    int64_t ready = -1;
    fbn_coef k = {0};
    int64_t begin = fbn_part(units, part, parts);
    int64_t end = fbn_part(units, part + 1, parts);
    for (int64_t u = begin; u < end; u++) {
        int64_t unit = fbn_turn(pass, u, begin, end);
        int64_t c = first + unit / tiles * wide;
        int64_t width = fbn_min(wide, last - c) * g->inner;
        int64_t row = fbn_part(g->outer, unit % tiles, tiles);
        int64_t rows = fbn_part(g->outer, unit % tiles + 1, tiles) - row;
        if (c != ready) {
            fbn_coefs_expand(panel, coefs, c, fbn_min(wide, last - c), g->inner, width, pass->backward);
            k = fbn_coefs_at(panel, 0);
            ready = c;
        }
        fbn_apply_block(pass, &k, row, rows, c, width, 0, ahead);
    }
}

/* The cols family; where the plan has panels, that many adjacent rows are one long row. */
static void fbn_apply_rows(const fbn_pass *pass, const fbn_coefs *coefs, fbn_coefs *panel, int64_t first, int64_t last,
                           int64_t ahead, int64_t part, int64_t parts)
{
    const fbn_geometry *g = &pass->g;
    int64_t fold = pass->plan.panel > 0 ? pass->plan.panel : 1;
    int64_t width = (last - first) * fold;
    int64_t rows = g->outer / fold;
    /* Whole rows while they are short; pieces of one row, each a multiple of 16 channels, where it is long. */
    int64_t chunk = fbn_min(width, FBN_PIECE);
    int64_t chunks = fbn_ceil_div(width, chunk);
    int64_t tile = fbn_clamp(FBN_ROWS_BYTES / (width * fbn_dtype_size(g->dtype)), 1, rows > 0 ? rows : 1);
    int64_t tiles = fbn_ceil_div(rows, tile);
    int64_t units = tiles * chunks;
    int64_t begin = fbn_part(units, part, parts);
    int64_t end = fbn_part(units, part + 1, parts);
    fbn_coef k = fbn_coefs_at(coefs, first);
    if (fold > 1) {
        fbn_coefs_expand(panel, coefs, first, g->channels, 1, width, pass->backward);
        k = fbn_coefs_at(panel, 0);
    }
    for (int64_t u = begin; u < end; u++) {
        int64_t unit = fbn_turn(pass, u, begin, end);
        int64_t row = unit / chunks * tile;
        int64_t c = unit % chunks * chunk;
        if (c != 0) {
            k = fbn_coefs_at(coefs, first + c);
        } else if (chunks > 1) {
            k = fbn_coefs_at(coefs, first);
        }
        fbn_apply_block(pass, &k, row, fbn_min(tile, rows - row), first + c, fbn_min(chunk, width - c),
                        fold > 1 ? fold : 0, ahead);
    }
    if (part == parts - 1 && g->outer % fold != 0) {
        k = fbn_coefs_at(panel, 0);
        fbn_pass rest = *pass;
        rest.plan.panel = 0;
        fbn_apply_block(&rest, &k, rows * fold, 1, first, g->outer % fold * g->channels, 0, 0);
    }
}

static int64_t fbn_panel_width(const fbn_pass *pass)
{
    return pass->plan.panel * (pass->g.family == FBN_ROWS ? pass->g.inner : pass->g.channels);
}

void fbn_apply_pass(const fbn_pass *pass, const fbn_coefs *coefs, fbn_room *room, int64_t first, int64_t last,
                    int64_t ahead, int64_t part, int64_t parts)
{
    if (pass->g.family == FBN_COLS) {
        fbn_apply_rows(pass, coefs, &room->panel, first, last, ahead, part, parts);
    } else if (pass->plan.panel > 0) {
        fbn_apply_planes(pass, coefs, &room->panel, first, last, ahead, part, parts);
    } else {
        fbn_apply_runs(pass, coefs, first, last, ahead, part, parts);
    }
    if (pass->plan.stream) {
        pass->kernels->fence();
    }
}

/* ---- the memory of a call ---- */

/* A call asks for memory once: everything is laid out twice, first in no memory, to learn how much it takes. */
typedef struct {
    char *memory;
    uint64_t used;
} fbn_arena;

static void *fbn_deal(fbn_arena *a, int64_t bytes)
{
    char *p = a->memory == NULL ? NULL : a->memory + a->used;
    a->used += (uint64_t)fbn_ceil_div(bytes, FBN_LINE) * FBN_LINE;
    return p;
}

static void fbn_deal_coefs(fbn_arena *a, fbn_coefs *c, fbn_dtype dtype, int64_t width)
{
    void *p = fbn_deal(a, fbn_coefs_bytes(dtype, width));
    if (p != NULL) {
        fbn_coefs_place(c, dtype, width, p);
    }
}

static void fbn_lay_out(fbn_work *w, int needs, fbn_arena *a)
{
    const fbn_pass *pass = &w->pass;
    const int team = pass->plan.team;
    const bool sums = (needs & FBN_NEEDS_SUMS) != 0;
    const int64_t side = fbn_min(pass->plan.tile, pass->g.channels);
    const int64_t panel = fbn_panel_width(pass);
    if (sums) {
        int64_t bytes = pass->g.channels * w->partials.strips * (int64_t)sizeof(double);
        w->partials.a = fbn_deal(a, bytes);
        w->partials.b = fbn_deal(a, bytes);
        w->partials.c = fbn_deal(a, bytes);
    }
    if ((needs & FBN_NEEDS_COEFS) != 0) {
        fbn_deal_coefs(a, &w->coefs, pass->g.dtype, pass->g.channels);
    }
    w->rooms = team == 1 ? &w->one : fbn_deal(a, team * (int64_t)sizeof *w->rooms);
    for (int i = 0; i < team; i++) {
        fbn_room *room = w->rooms == NULL ? &w->one : &w->rooms[i];
        *room = (fbn_room){0};
        if (sums) {
            room->tile = fbn_deal(a, pass->g.family == FBN_ROWS
                                         ? fbn_lines_bytes(side, pass->g.inner, fbn_is_wide(pass->g.dtype))
                                         : fbn_columns_bytes(side));
        }
        if (panel > 0) {
            fbn_deal_coefs(a, &room->panel, pass->g.dtype, panel);
        }
    }
}

fbn_status fbn_work_begin(fbn_work *w, int needs)
{
    fbn_arena count = {0};
    w->partials.strips = fbn_strips(&w->pass);
    if (w->pass.g.channels >= FBN_WIDEST / w->partials.strips) {
        return FBN_NO_MEMORY;
    }
    fbn_lay_out(w, needs, &count);
    if (count.used == 0) {
        return FBN_OK;
    }
    if (count.used > SIZE_MAX - FBN_LINE) {
        return FBN_NO_MEMORY;
    }
    w->memory = malloc((size_t)count.used + FBN_LINE);
    if (w->memory == NULL) {
        return FBN_NO_MEMORY;
    }
    fbn_arena memory = {.memory = fbn_to_line(w->memory)};
    fbn_lay_out(w, needs, &memory);
    return FBN_OK;
}

void fbn_work_end(fbn_work *w) { free(w->memory); }

void fbn_each_slab(const fbn_work *w, int tid, int team, fbn_slab_step step, void *context)
{
    int64_t slab = w->pass.plan.slab;
    int64_t slabs = fbn_ceil_div(w->pass.g.channels, slab);
    int64_t end = fbn_part(slabs, tid + 1, team);
    for (int64_t s = fbn_part(slabs, tid, team); s < end; s++) {
        int64_t ahead = w->pass.plan.ahead && s + 1 < end ? slab : 0;
        step(context, tid, s * slab, fbn_min((s + 1) * slab, w->pass.g.channels), ahead);
    }
}
