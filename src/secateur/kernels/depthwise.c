/* Depth-wise convolution over the taps that are left, float32, NCHW.
 *
 * An output row is a sum of a few shifted input rows. Nothing is padded, copied or made into
 * columns: a tap that looks past an edge reads whatever lies there in memory, and a mask of lanes
 * keeps that out of the sum. Masks depend on the shape alone and are made once a shape. There is
 * one straight-line kernel per number of taps, and a plane is walked in one of three ways:
 *
 *   flat  stride 1 and as wide as its input: the plane is one long row (no vector is wasted on the
 *         ends of rows), with masks for every tap and vector of it;
 *   full  with a stride: row by row, masks for every tap and vector of the plane;
 *   rows  where those masks would fill the cache: row by row, masks for every kernel column and
 *         vector of a row; rows in which some taps look outside are walked with the others.
 *
 * A vector that runs over the end of a narrow row spills into the next row, which is written
 * after it. Planes whose reads would leave the tensor are copied aside first.
 *
 * With AVX-512 a vector is 16 or 8 floats and a mask is bits; elsewhere it is 8 floats of the
 * extension that GCC and Clang share, and a mask is 8 integers that are ANDed with what was read.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t i8 __attribute__((vector_size(32), aligned(4), may_alias));

/* The two loads: consecutive floats, and every second one. */
#if defined(__clang__)
#define EVEN8(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14)
#define EVEN16(a, b) \
    __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#else
#define EVEN8(a, b) __builtin_shuffle(a, b, (i8){0, 2, 4, 6, 8, 10, 12, 14})
#define EVEN16(a, b) \
    __builtin_shuffle(a, b, (i16){0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30})
#endif
static inline v8 load_v8_1(const float *p) { return *(const v8 *)p; }
static inline v8 load_v8_2(const float *p) { return EVEN8(*(const v8 *)p, *(const v8 *)(p + 8)); }

/* PORTABLE: for tests of the other half on a machine that has AVX-512. */
#if defined(__AVX512F__) && defined(__AVX512VL__) && !defined(PORTABLE)
#include <immintrin.h>
#define WIDE 1
typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t mask_t;
static inline v16 load_v16_1(const float *p) { return *(const v16 *)p; }
static inline v16 load_v16_2(const float *p)
{
    return EVEN16(*(const v16 *)p, *(const v16 *)(p + 16));
}
/* sum + w * x in the lanes of the mask: a zeroing load is cheaper than a masked sum. */
static inline v16 add_v16(v16 sum, float w, v16 x, const mask_t *m)
{
    return sum + w * (v16)_mm512_maskz_mov_ps(*m, (__m512)x);
}
static inline v8 add_v8(v8 sum, float w, v8 x, const mask_t *m)
{
    return sum + w * (v8)_mm256_maskz_mov_ps((__mmask8)*m, (__m256)x);
}
/* The second operand wins when it is NaN. */
static inline v16 clamp_v16(v16 x, float low, float high)
{
    x = (v16)_mm512_max_ps(_mm512_set1_ps(low), (__m512)x);
    return (v16)_mm512_min_ps(_mm512_set1_ps(high), (__m512)x);
}
static inline v8 clamp_v8(v8 x, float low, float high)
{
    x = (v8)_mm256_max_ps(_mm256_set1_ps(low), (__m256)x);
    return (v8)_mm256_min_ps(_mm256_set1_ps(high), (__m256)x);
}
static void set_lane(mask_t *m, int64_t lane) { *m |= (mask_t)(1u << lane); }
#else
#define WIDE 0
typedef i8 mask_t;
static inline v8 add_v8(v8 sum, float w, v8 x, const mask_t *m)
{
    return sum + w * (v8)((i8)x & *m);
}
/* min and max that let NaN through. */
static inline v8 clamp_v8(v8 x, float low, float high)
{
    v8 a = (v8){0} + low, b = (v8){0} + high;
    i8 under = x < a;
    x = (v8)((under & (i8)a) | (~under & (i8)x));
    i8 over = x > b;
    return (v8)((over & (i8)b) | (~over & (i8)x));
}
static void set_lane(mask_t *m, int64_t lane) { ((int32_t *)m)[lane] = -1; }
#endif

typedef struct {
    int64_t images, channels, multiplier; /* channels of the input; of the output times multiplier */
    int64_t height, width, out_height, out_width;
    int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, top, left;
    float low, high; /* what the output is clamped to */
} shape;

enum { TABLE = 24576, STRAIGHT = 9, MOST_SEGMENTS = 129 };

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* What a kernel walks over: `rows` rows of `width` outputs from `out` on, contiguous, in
 * `vectors` vectors each. Tap t reads at in[t], `pitch` further for each row; its masks are at
 * mask[t], `mask_pitch` further for each row. The first `safe` rows may be run over. */
typedef struct {
    int64_t rows, width, vectors, safe, pitch, mask_pitch, taps, stride;
    float bias, low, high;
    float *out;
    const float **in;
    const mask_t **mask;
    float *weight;
} work;

#define TAKE(T)                                                                        \
    const float *p##T = k->in[T];                                                      \
    const mask_t *m##T = k->mask[T];                                                   \
    const float w##T = k->weight[T];
#define MOVE(T) p##T += pitch, m##T += mask_pitch;
#define TAP(V, S, T) sum = add_##V(sum, w##T, load_##V##_##S(p##T + S * x), m##T + j);

#define ROWS(N, V, L, S, TAKES, MOVES, TAPS)                                           \
    static void rows##N##_##V##_##S(const work *k)                                     \
    {                                                                                  \
        const int64_t width = k->width, pitch = k->pitch, mask_pitch = k->mask_pitch;  \
        const int64_t vectors = k->vectors, rows = k->rows;                            \
        const float bias = k->bias, low = k->low, high = k->high;                      \
        float *out = k->out;                                                           \
        TAKES if (width >= L) for (int64_t y = 0; y < rows; y++)                       \
        {                                                                              \
            for (int64_t j = 0; j < vectors; j++) {                                    \
                const int64_t x = least(j * L, width - L);                             \
                V sum = (V){0} + bias;                                                 \
                TAPS *(V *)(out + x) = clamp_##V(sum, low, high);                      \
            }                                                                          \
            out += width;                                                              \
            MOVES                                                                      \
        }                                                                              \
        else for (int64_t y = 0; y < rows; y++)                                        \
        {                                                                              \
            const int64_t x = 0, j = 0;                                                \
            V sum = (V){0} + bias;                                                     \
            TAPS sum = clamp_##V(sum, low, high);                                      \
            if (y < k->safe) *(V *)out = sum;                                          \
            else memcpy(out, &sum, sizeof(float) * (size_t)width);                     \
            out += width;                                                              \
            MOVES                                                                      \
        }                                                                              \
    }

#define M1(M) M(0)
#define M2(M) M1(M) M(1)
#define M3(M) M2(M) M(2)
#define M4(M) M3(M) M(3)
#define M5(M) M4(M) M(4)
#define M6(M) M5(M) M(5)
#define M7(M) M6(M) M(6)
#define M8(M) M7(M) M(7)
#define M9(M) M8(M) M(8)
#define A1(V, S) TAP(V, S, 0)
#define A2(V, S) A1(V, S) TAP(V, S, 1)
#define A3(V, S) A2(V, S) TAP(V, S, 2)
#define A4(V, S) A3(V, S) TAP(V, S, 3)
#define A5(V, S) A4(V, S) TAP(V, S, 4)
#define A6(V, S) A5(V, S) TAP(V, S, 5)
#define A7(V, S) A6(V, S) TAP(V, S, 6)
#define A8(V, S) A7(V, S) TAP(V, S, 7)
#define A9(V, S) A8(V, S) TAP(V, S, 8)

/* More taps: four vectors at a time, below each other or, in a flat plane, side by side, so that a
 * weight is fetched once for the four. */
#define MANY(V, L, S)                                                                  \
    static void many_##V##_##S(const work *k)                                          \
    {                                                                                  \
        const int64_t width = k->width, last = most(width - L, 0), taps = k->taps;     \
        const int64_t flat = k->rows == 1;                                             \
        for (int64_t y = 0; y < k->rows; y += flat ? 1 : 4)                            \
            for (int64_t v = 0; v < k->vectors; v += flat ? 4 : 1) {                   \
                int64_t i[4], m[4], o[4];                                              \
                for (int64_t c = 0; c < 4; c++) {                                      \
                    int64_t row = flat ? 0 : least(y + c, k->rows - 1);                \
                    int64_t j = flat ? least(v + c, k->vectors - 1) : v;               \
                    int64_t x = least(j * L, last);                                    \
                    i[c] = row * k->pitch + S * x;                                     \
                    m[c] = row * k->mask_pitch + j;                                    \
                    o[c] = row * width + x;                                            \
                }                                                                      \
                V s0 = (V){0} + k->bias, s1 = s0, s2 = s0, s3 = s0;                    \
                for (int64_t t = 0; t < taps; t++) {                                   \
                    const float *p = k->in[t], w = k->weight[t];                       \
                    const mask_t *q = k->mask[t];                                      \
                    s0 = add_##V(s0, w, load_##V##_##S(p + i[0]), q + m[0]);           \
                    s1 = add_##V(s1, w, load_##V##_##S(p + i[1]), q + m[1]);           \
                    s2 = add_##V(s2, w, load_##V##_##S(p + i[2]), q + m[2]);           \
                    s3 = add_##V(s3, w, load_##V##_##S(p + i[3]), q + m[3]);           \
                }                                                                      \
                V sum[4] = {s0, s1, s2, s3};                                           \
                for (int64_t c = 0; c < 4; c++) {                                      \
                    V value = clamp_##V(sum[c], k->low, k->high);                      \
                    if (width >= L || y + 3 < k->safe) *(V *)(k->out + o[c]) = value;  \
                    else memcpy(k->out + o[c], &value, sizeof(float) * (size_t)width); \
                }                                                                      \
            }                                                                          \
    }

typedef void (*kernel)(const work *);
#define FAMILY(V, L, S)                                                                \
    ROWS(1, V, L, S, M1(TAKE), M1(MOVE), A1(V, S))                                     \
    ROWS(2, V, L, S, M2(TAKE), M2(MOVE), A2(V, S))                                     \
    ROWS(3, V, L, S, M3(TAKE), M3(MOVE), A3(V, S))                                     \
    ROWS(4, V, L, S, M4(TAKE), M4(MOVE), A4(V, S))                                     \
    ROWS(5, V, L, S, M5(TAKE), M5(MOVE), A5(V, S))                                     \
    ROWS(6, V, L, S, M6(TAKE), M6(MOVE), A6(V, S))                                     \
    ROWS(7, V, L, S, M7(TAKE), M7(MOVE), A7(V, S))                                     \
    ROWS(8, V, L, S, M8(TAKE), M8(MOVE), A8(V, S))                                     \
    ROWS(9, V, L, S, M9(TAKE), M9(MOVE), A9(V, S))                                     \
    MANY(V, L, S)                                                                      \
    static const kernel kernels_##V##_##S[] = {                                        \
        rows1_##V##_##S, rows2_##V##_##S, rows3_##V##_##S, rows4_##V##_##S,            \
        rows5_##V##_##S, rows6_##V##_##S, rows7_##V##_##S, rows8_##V##_##S,            \
        rows9_##V##_##S, many_##V##_##S};
FAMILY(v8, 8, 1)
FAMILY(v8, 8, 2)
#if WIDE
FAMILY(v16, 16, 1)
FAMILY(v16, 16, 2)
#endif

/* Rows [from, upto) of the output in which the kernel rows in `rows` look inside. */
typedef struct {
    int64_t from, upto;
    uint64_t rows;
} segment;

/* What depends on the shape alone. */
typedef struct {
    shape s;
    int flat, full;
    const kernel *kernels; /* NULL: a stride longer than 2, plain loops */
    int64_t lanes, width, vectors, mask_pitch, before, after, segments;
    segment segment[MOST_SEGMENTS];
    int64_t *offset; /* of each tap, from the first float of a plane */
    mask_t *mask;
    const mask_t **mask_of;
} layout;

static int within(int64_t at, int64_t n) { return at >= 0 && at < n; }

static void choose(layout *at)
{
    at->lanes = 8;
    at->kernels = at->s.stride_w == 1 ? kernels_v8_1 : at->s.stride_w == 2 ? kernels_v8_2 : NULL;
#if WIDE
    /* Three vectors of 8 rather than two of 16. */
    if (at->kernels && at->width > 8 && !(at->width > 16 && at->width <= 24)) {
        at->lanes = 16;
        at->kernels = at->s.stride_w == 1 ? kernels_v16_1 : kernels_v16_2;
    }
#endif
    at->vectors = (at->width + at->lanes - 1) / at->lanes;
}

void secateur_depthwise_free(layout *at)
{
    if (at) free(at->mask), free(at->mask_of), free(at->offset);
    free(at);
}

/* Once a shape; NULL when there is no memory or the kernel is too tall. */
layout *secateur_depthwise_make(const shape *s)
{
    layout *at = calloc(1, sizeof(layout));
    if (!at) return NULL;
    at->s = *s;
    int64_t taps = s->kernel_h * s->kernel_w, area = s->out_height * s->out_width;
    at->flat = s->stride_h == 1 && s->stride_w == 1 && s->out_width == s->width;
    at->width = at->flat ? area : s->out_width;
    choose(at);
    int64_t lines = at->flat ? 1 : s->out_height;
    at->full = taps * lines * at->vectors * (int64_t)sizeof(mask_t) <= TABLE;
    if (!at->full) {
        at->flat = 0, at->width = s->out_width, lines = 1;
        choose(at);
    }
    at->mask_pitch = at->full ? at->vectors : 0;
    int64_t tables = at->full ? taps : s->kernel_w;
    at->mask = calloc((size_t)(tables * lines * at->vectors), sizeof(mask_t));
    at->mask_of = malloc(sizeof(*at->mask_of) * (size_t)taps);
    at->offset = malloc(sizeof(*at->offset) * (size_t)taps);
    if (!at->mask || !at->mask_of || !at->offset || s->kernel_h > 64) goto failed;
    for (int64_t k = 0; k < taps; k++) {
        int64_t dy = k / s->kernel_w * s->dilation_h - s->top;
        int64_t dx = k % s->kernel_w * s->dilation_w - s->left;
        at->offset[k] = dy * s->width + dx;
        at->mask_of[k] = at->mask + (at->full ? k : k % s->kernel_w) * lines * at->vectors;
        for (int64_t line = 0; line < lines; line++)
            for (int64_t j = 0; j < at->vectors; j++) {
                mask_t *mask = (mask_t *)at->mask_of[k] + line * at->vectors + j;
                int64_t first = most(0, least(j * at->lanes, at->width - at->lanes));
                for (int64_t i = first; i < least(first + at->lanes, at->width); i++) {
                    int64_t y = at->flat ? i / s->out_width : line;
                    int64_t x = at->flat ? i % s->out_width : i;
                    if ((!at->full || within(y * s->stride_h + dy, s->height))
                        && within(x * s->stride_w + dx, s->width))
                        set_lane(mask, i - first);
                }
            }
    }
    /* Runs of rows with the same kernel rows inside. */
    for (int64_t y = 0; y < s->out_height; y++) {
        uint64_t rows = 0;
        for (int64_t k = 0; k < s->kernel_h; k++)
            if (at->full || within(y * s->stride_h + k * s->dilation_h - s->top, s->height))
                rows |= (uint64_t)1 << k;
        segment *last = at->segment + at->segments - 1;
        if (at->segments && last->rows == rows) last->upto = y + 1;
        else if (at->segments == MOST_SEGMENTS) goto failed;
        else at->segment[at->segments++] = (segment){y, y + 1, rows};
    }
    int64_t end = at->offset[taps - 1] + (s->out_height - 1) * s->stride_h * s->width
                  + (s->out_width + 15) * s->stride_w + 16;
    at->before = most(0, -at->offset[0]);
    at->after = most(0, end - s->height * s->width);
    return at;
failed:
    secateur_depthwise_free(at);
    return NULL;
}

/* Any stride. */
static void plainly(const work *k)
{
    for (int64_t y = 0; y < k->rows; y++)
        for (int64_t x = 0; x < k->width; x++) {
            float sum = k->bias;
            int64_t j = x / 8, first = most(0, least(j * 8, k->width - 8));
            for (int64_t t = 0; t < k->taps; t++) {
                const mask_t *m = k->mask[t] + y * k->mask_pitch + j;
#if WIDE
                int inside = *m >> (x - first) & 1;
#else
                int inside = ((const int32_t *)m)[x - first];
#endif
                if (inside) sum += k->weight[t] * k->in[t][y * k->pitch + x * k->stride];
            }
            k->out[y * k->width + x] = sum < k->low ? k->low : sum > k->high ? k->high : sum;
        }
}

/* One output plane. `in` may be read from `before` floats before it to `after` behind it. */
static void plane(const layout *at, const float *in, const int32_t *tap, const float *weight,
                  int64_t taps, float bias, float *out, work *k)
{
    const shape *s = &at->s;
    k->bias = bias;
    /* What a row spills past its end must lie inside this plane. */
    int64_t spilt = at->lanes > k->width ? (at->lanes - 1) / k->width : 0;
    for (int64_t g = 0; g < at->segments; g++) {
        const segment *part = at->segment + g;
        const float *from = in + part->from * k->pitch;
        int64_t n = 0;
        for (int64_t t = 0; t < taps; t++) {
            int64_t place = tap[t];
            if (!at->full && !(part->rows >> (place / s->kernel_w) & 1)) continue;
            k->in[n] = from + at->offset[place];
            k->mask[n] = at->mask_of[place];
            k->weight[n++] = weight[t];
        }
        k->taps = n;
        k->rows = at->flat ? 1 : part->upto - part->from;
        k->safe = at->flat ? 0 : s->out_height - spilt - part->from;
        k->out = out + part->from * s->out_width;
        if (!n) {
            float value = bias < s->low ? s->low : bias > s->high ? s->high : bias;
            for (int64_t i = 0; i < k->rows * k->width; i++) k->out[i] = value;
        } else if (!at->kernels) plainly(k);
        else at->kernels[least(n, STRAIGHT + 1) - 1](k);
    }
}

/* in (images, channels, height, width), out (images, channels * multiplier, out_height, out_width),
 * both contiguous; taps of output channel o are tap[start[o]] ... (ky * kernel_w + kx). Returns 0,
 * or 1 when there was no memory. */
int secateur_depthwise(const layout *at, const float *in, const float *bias, const int32_t *start,
                       const int32_t *tap, const float *weight, float *out, int64_t images,
                       int threads)
{
    const shape *s = &at->s;
    int64_t outputs = s->channels * s->multiplier, total = images * outputs;
    int64_t kernel = s->kernel_h * s->kernel_w, area = s->height * s->width;
    int64_t out_area = s->out_height * s->out_width;
    const float *end = in + images * s->channels * area;
    int failed = 0;
    threads = (int)most(1, least(threads, total));
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
#endif
    for (int part = 0; part < threads; part++) {
        work k = {.width = at->width, .vectors = at->vectors, .pitch = s->stride_h * s->width,
                  .mask_pitch = at->mask_pitch, .stride = s->stride_w, .low = s->low,
                  .high = s->high};
        float *aside = malloc(sizeof(float) * (size_t)(at->before + area + at->after));
        k.in = malloc(sizeof(*k.in) * (size_t)kernel);
        k.mask = malloc(sizeof(*k.mask) * (size_t)kernel);
        k.weight = malloc(sizeof(*k.weight) * (size_t)kernel);
        if (!aside || !k.in || !k.mask || !k.weight) failed = 1;
        else
            for (int64_t i = total * part / threads; i < total * (part + 1) / threads; i++) {
                int64_t image = i / outputs, o = i - image * outputs;
                const float *from = in + (image * s->channels + o / s->multiplier) * area;
                if (from - in < at->before || end - from < area + at->after)
                    from = (float *)memcpy(aside + at->before, from, sizeof(float) * (size_t)area);
                plane(at, from, tap + start[o], weight + start[o], start[o + 1] - start[o],
                      bias ? bias[o] : 0.0f, out + (image * outputs + o) * out_area, &k);
            }
        free(aside), free(k.in), free(k.mask), free(k.weight);
    }
    return failed;
}
