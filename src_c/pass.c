/* pass.c -- walks in terms of kernels: which run, which rows, in which order. */
#include "pass.h"

#include "dispatch.h"
#include "geometry.h"

#include <math.h>
#include <stdlib.h>

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

static bool fbn_lines_up(const fbn_geometry *g, const fbn_tensor *t, bool on_lines)
{
    const int64_t steps = t->outer_stride | (fbn_adjacent(g, t) ? 0 : t->channel_stride);
    const uintptr_t begins = on_lines ? (uintptr_t)t->data : 0;
    return (begins | (uintptr_t)steps * (uintptr_t)fbn_dtype_size(g->dtype)) % FBN_LINE == 0;
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
        call.tensors += tensors[i]->data != NULL;
    }
    pass->g = *g;
    pass->kernels = fbn_kernels_for(g->dtype);
    call.aligned = fbn_lines_up(g, &pass->y, call.gated || !pass->kernels->beside_off_lines);
    call.beside = fbn_goes_beside(pass->kernels, pass->backward);
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

/* Elements of a channel before the i-th block. */
static int64_t fbn_before_block(const fbn_geometry *g, const fbn_blocks *b, int64_t i)
{
    int64_t plane = fbn_min(i / b->pieces * b->planes, g->outer);
    int64_t abreast = fbn_min(b->planes, g->outer - plane);
    return plane * g->inner + abreast * (i % b->pieces * b->piece_len);
}

/* Elements of a channel in strips [from, to). */
static double fbn_strips_count(const fbn_pass *pass, const fbn_blocks *b, int64_t strips, int64_t from, int64_t to)
{
    const fbn_geometry *g = &pass->g;
    if (g->family == FBN_COLS) {
        return (double)(fbn_part(g->outer, to, strips) - fbn_part(g->outer, from, strips));
    }
    return (double)(fbn_before_block(g, b, fbn_part(b->count, to, strips)) -
                    fbn_before_block(g, b, fbn_part(b->count, from, strips)));
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
        .ahead = pass->plan.fetch,
        .turn = room->turn,
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

/* A walk in units, each a few runs. */
typedef struct fbn_walk {
    void (*step)(struct fbn_walk *w, int64_t unit);
    const fbn_pass *pass;
    const fbn_coefs *coefs;
    fbn_coefs *panel;    /* coefs expanded */
    int64_t first, last; /* channels */
    int64_t ahead;       /* how many further the channels are that are to be in cache next; 0: none */
    int64_t pieces;      /* of each of a unit's neighbours: a unit has one of them */
    int64_t begin, end;  /* the units that are left */
    int64_t ready;       /* the channel that `panel` begins with */
} fbn_walk;

/* Bytes to what is fetched beside a row of `step` of a tensor's: the slab so many channels on, or the next row; or what
 * comes soon where that is nearer, and read already. Nothing where hardware fetches what comes soon. */
static int64_t fbn_row_ahead(const fbn_pass *pass, const fbn_tensor *t, int64_t ahead, int64_t step)
{
    int64_t bytes = (ahead > 0 ? ahead * t->channel_stride : t->outer_stride * step) * fbn_dtype_size(pass->g.dtype);
    if (ahead == 0 && pass->plan.soon == 0) {
        return 0;
    }
    return bytes > 0 && bytes < pass->plan.soon ? pass->plan.soon : bytes;
}

/* Rows [row, row + rows) of `width` elements that begin at channel c, as one call of a cols kernel. With `panel`, a row
 * is that many of the tensor's rows. */
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
        .ahead = fbn_row_ahead(pass, &pass->x, ahead, step),
        .other_ahead = fbn_row_ahead(pass, &pass->other, ahead, step),
        .stream = pass->plan.stream,
    };
    if (pass->backward) {
        pass->kernels->backward_apply_cols(&span, k, pass->rule);
    } else {
        pass->kernels->normalize_cols(&span, k, pass->rule);
    }
}

/* `width` elements, from i on, of the planes of channels [first, last) of so many images, from o on by steps of 1 or
 * -1. */
static fbn_span fbn_planes(const fbn_pass *pass, int64_t o, int64_t images, int64_t step, int64_t first, int64_t last,
                           int64_t i, int64_t width, int64_t ahead)
{
    const fbn_geometry *g = &pass->g;
    const int64_t size = fbn_dtype_size(g->dtype);
    const int64_t words = fbn_gate_words(g);
    uint16_t *gate = fbn_gate_at(pass, o, first);
    return (fbn_span){
        .x = fbn_at(&pass->x, size, o, first, i),
        .other = fbn_at(&pass->other, size, o, first, i),
        .y = fbn_at(&pass->y, size, o, first, i),
        .extra = fbn_at(&pass->extra, size, o, first, i),
        .gate = gate == NULL ? NULL : gate + i / 16,
        .x_stride = pass->x.channel_stride,
        .other_stride = pass->other.channel_stride,
        .y_stride = pass->y.channel_stride,
        .extra_stride = pass->extra.channel_stride,
        .gate_stride = words,
        .rows = last - first,
        .width = width,
        .images = images,
        .x_image = step * pass->x.outer_stride,
        .other_image = step * pass->other.outer_stride,
        .y_image = step * pass->y.outer_stride,
        .extra_image = step * pass->extra.outer_stride,
        .gate_image = step * words * g->channels,
        .ahead = ahead > 0 ? ahead * pass->x.channel_stride * size : pass->plan.soon,
        .other_ahead = ahead > 0 ? ahead * pass->other.channel_stride * size : pass->plan.soon,
        .stream = pass->plan.stream,
    };
}

/* Pieces of planes, or some neighbours' planes, of an image or some: a call costs as much as some short ones. */
static void fbn_apply_runs(fbn_walk *w, int64_t unit)
{
    const fbn_pass *pass = w->pass;
    const fbn_geometry *g = &pass->g;
    const fbn_plan *plan = &pass->plan;
    int64_t sides = fbn_ceil_div(w->last - w->first, plan->side);
    int64_t o = unit / w->pieces / sides * plan->images;
    int64_t c = w->first + unit / w->pieces % sides * plan->side;
    int64_t i = unit % w->pieces * plan->piece;
    int64_t images = fbn_min(plan->images, g->outer - o);
    fbn_span span = fbn_planes(pass, plan->backwards ? o + images - 1 : o, images, plan->backwards ? -1 : 1, c,
                               fbn_min(c + plan->side, w->last), i, fbn_min(plan->piece, g->inner - i), w->ahead);
    fbn_coef k = fbn_coefs_at(w->coefs, c);
    if (pass->backward) {
        pass->kernels->backward_apply_rows(&span, &k, pass->rule);
    } else {
        pass->kernels->normalize_rows(&span, &k, pass->rule);
    }
}

/* Panels of channels in the rows family: short planes of neighbouring channels as one long row. */
static void fbn_apply_planes(fbn_walk *w, int64_t unit)
{
    const fbn_geometry *g = &w->pass->g;
    const fbn_plan *plan = &w->pass->plan;
    int64_t c = w->first + unit / w->pieces * plan->side;
    int64_t wide = fbn_min(plan->side, w->last - c);
    int64_t row = unit % w->pieces * plan->piece;
    int64_t rows = fbn_min(plan->piece, g->outer - row);
    if (c != w->ready) {
        fbn_coefs_expand(w->panel, w->coefs, c, wide, g->inner, wide * g->inner, w->pass->backward);
        w->ready = c;
    }
    fbn_coef k = fbn_coefs_at(w->panel, 0);
    fbn_apply_block(w->pass, &k, row, rows, c, wide * g->inner, 0, w->ahead);
}

/* The cols family: some rows, or the same piece of each where they are long. Where the plan has panels, that many
 * adjacent rows are one, and not long. */
static void fbn_apply_rows(fbn_walk *w, int64_t unit)
{
    const fbn_plan *plan = &w->pass->plan;
    const int64_t fold = plan->panel;
    int64_t rows = w->pass->g.outer / (fold > 0 ? fold : 1);
    int64_t width = (w->last - w->first) * (fold > 0 ? fold : 1);
    int64_t row = unit / w->pieces * plan->side;
    int64_t c = unit % w->pieces * plan->piece;
    fbn_coef k = fold > 0 ? fbn_coefs_at(w->panel, 0) : fbn_coefs_at(w->coefs, w->first + c);
    fbn_apply_block(w->pass, &k, row, fbn_min(plan->side, rows - row), w->first + c, fbn_min(plan->piece, width - c),
                    fold, w->ahead);
}

/* The adjacent rows that are left of a walk in panels. */
static void fbn_apply_rest(const fbn_walk *w)
{
    const fbn_geometry *g = &w->pass->g;
    const int64_t rest = g->outer % w->pass->plan.panel;
    fbn_coef k = fbn_coefs_at(w->panel, 0);
    if (rest > 0) {
        fbn_apply_block(w->pass, &k, g->outer - rest, 1, w->first, rest * g->channels, 0, 0);
    }
}

static void fbn_walk_begin(fbn_walk *w, const fbn_pass *pass, const fbn_coefs *coefs, fbn_room *room, int64_t first,
                           int64_t last, int64_t ahead, int64_t part, int64_t parts)
{
    const fbn_geometry *g = &pass->g;
    const fbn_plan *plan = &pass->plan;
    const int64_t channels = last - first;
    const int64_t fold = plan->panel > 0 ? plan->panel : 1;
    int64_t units = fbn_ceil_div(g->family == FBN_COLS ? g->outer / fold : channels, plan->side);
    *w = (fbn_walk){.pass = pass, .coefs = coefs, .panel = &room->panel, .first = first, .last = last, .ahead = ahead};
    if (g->family == FBN_COLS) {
        w->step = fbn_apply_rows;
        w->pieces = fbn_ceil_div(channels * fold, plan->piece);
        if (plan->panel > 0) {
            fbn_coefs_expand(w->panel, coefs, first, g->channels, 1, channels * fold, pass->backward);
        }
    } else if (plan->panel > 0) {
        w->step = fbn_apply_planes;
        w->pieces = fbn_ceil_div(g->outer, plan->piece);
        w->ready = -1;
    } else {
        w->step = fbn_apply_runs;
        w->pieces = fbn_ceil_div(g->inner, plan->piece);
        units *= fbn_ceil_div(g->outer, plan->images);
    }
    units *= w->pieces;
    w->begin = fbn_part(units, part, parts);
    w->end = fbn_part(units, part + 1, parts);
}

/* Where the plan walks backwards, each part is walked from its end: what was read last is still in cache. */
static void fbn_walk_to_end(fbn_walk *w)
{
    while (w->begin < w->end) {
        w->step(w, w->pass->plan.backwards ? --w->end : w->begin++);
    }
}

void fbn_apply_pass(const fbn_pass *pass, const fbn_coefs *coefs, fbn_room *room, int64_t part, int64_t parts)
{
    fbn_walk w;
    fbn_walk_begin(&w, pass, coefs, room, 0, pass->g.channels, 0, part, parts);
    fbn_walk_to_end(&w);
    if (pass->g.family == FBN_COLS && pass->plan.panel > 0 && part == parts - 1) {
        fbn_apply_rest(&w);
    }
    if (pass->plan.stream) {
        pass->kernels->fence();
    }
}

static int64_t fbn_panel_width(const fbn_pass *pass)
{
    return pass->plan.panel * (pass->g.family == FBN_ROWS ? pass->g.inner : pass->g.channels);
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

/* The i-th slab begins here. */
static int64_t fbn_slab_at(const fbn_pass *pass, int64_t i)
{
    const fbn_plan *plan = &pass->plan;
    const int64_t grains = fbn_ceil_div(pass->g.channels, plan->grain);
    return fbn_min(fbn_part(grains, i, plan->slabs) * plan->grain, pass->g.channels);
}

/* Channels [first, last) of all images, as the slab that is applied while the next is reduced. */
static fbn_turn fbn_turn_of(const fbn_pass *pass, const fbn_coefs *coefs, int64_t first, int64_t last, int64_t ahead)
{
    return (fbn_turn){
        .span = fbn_planes(pass, 0, pass->g.outer, 1, first, last, 0, pass->g.inner, ahead),
        .k = fbn_coefs_at(coefs, first),
        .rule = pass->rule,
        .each = pass->plan.turn,
        .backward = pass->backward,
        .beside = pass->plan.beside,
    };
}

/* What is left of it, if there is one. */
static void fbn_turn_to_end(const fbn_pass *pass, fbn_room *room)
{
    if (room->turn != NULL) {
        room->turn->owed = INT64_MAX;
        pass->kernels->apply_some(room->turn);
        room->turn = NULL;
    }
}

void fbn_each_slab(fbn_work *w, const double *mean, const fbn_slab_steps *steps, void *context, int tid, int team)
{
    const fbn_pass *pass = &w->pass;
    const fbn_plan *plan = &pass->plan;
    const int64_t begin = fbn_part(plan->slabs, tid, team);
    const int64_t end = fbn_part(plan->slabs, tid + 1, team);
    const int64_t past = fbn_slab_at(pass, end);
    fbn_room *room = &w->rooms[tid];
    fbn_turn turn; /* here, for a thread writes to it all the time */
    for (int64_t s = begin; s < end; s++) {
        const int64_t first = fbn_slab_at(pass, s);
        const int64_t last = fbn_slab_at(pass, s + 1);
        const int64_t ahead = first + plan->ahead < past ? plan->ahead : 0;
        fbn_coefs own = w->coefs; /* the same arrays, but every slab's own flags */
        if (steps->ready != NULL) {
            steps->ready(context, &own, first, last);
        }
        fbn_reduce(pass, &w->partials, mean, &own, room, first, last, 0, 1);
        fbn_turn_to_end(pass, room);
        fbn_combine(pass, &w->partials, first, last);
        steps->settle(context, &own, first, last);
        if (plan->turn > 0) {
            turn = fbn_turn_of(pass, &own, first, last, ahead);
            room->turn = &turn;
        } else {
            fbn_walk walk;
            fbn_walk_begin(&walk, pass, &own, room, first, last, ahead, 0, 1);
            fbn_walk_to_end(&walk);
        }
    }
    fbn_turn_to_end(pass, room);
    if (plan->stream) {
        pass->kernels->fence();
    }
}
