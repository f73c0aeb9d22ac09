/* The loops over elements, included by native.c once for each instruction set: TARGET is the function attribute that
 * selects it, NAMED(f) the function's name with its suffix. Plain loops that the compiler turns into vectors. */

#define TILE 512  /* elements converted at a time where a parameter or gradient is bfloat16: 2 KiB, in the first cache */
#define WIDTH 8   /* vectors of partial sums in flight, each with a stream of elements of its own */
#define FLUSH 32  /* additions of float32 before they go into a float64: a relative error of 32 * 2^-24 at most */

static inline TARGET void NAMED(widen)(float *restrict out, const uint16_t *restrict in, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        union { uint32_t bits; float value; } u = {.bits = (uint32_t)in[i] << 16};
        out[i] = u.value;
    }
}

/* To the nearest bfloat16, ties to even, as torch rounds. */
static inline TARGET void NAMED(narrow)(uint16_t *restrict out, const float *restrict in, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        union { float value; uint32_t bits; } u = {.value = in[i]};
        uint32_t rounded = (u.bits + 0x7fff + ((u.bits >> 16) & 1)) >> 16;
        out[i] = in[i] == in[i] ? (uint16_t)rounded : (uint16_t)0x7fc0;
    }
}

/* A hash of 32 bits; rounding.py has it too, and says whose it is. */
static inline TARGET uint32_t NAMED(mix)(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352dU;
    x ^= x >> 15;
    x *= 0x846ca68bU;
    return x ^ x >> 16;
}

/* To bfloat16, up with the probability of the distance from below: by 16 of the 32 random bits of each element. */
static inline TARGET void NAMED(narrow_at_random)(
    uint16_t *restrict out, const float *restrict in, int64_t n, uint32_t first, int shift) {
    for (int64_t i = 0; i < n; i++) {
        union { float value; uint32_t bits; } u = {.value = in[i]};
        uint32_t rounded = (u.bits + (NAMED(mix)(first + (uint32_t)i) >> shift & 0xffff)) >> 16;
        out[i] = in[i] == in[i] ? (uint16_t)rounded : (uint16_t)0x7fc0;
    }
}

/* Kahan's compensation: what was not kept of a parameter, in bfloat16. */
static inline TARGET void NAMED(keep_rest)(
    uint16_t *restrict out, float *restrict wide, const uint16_t *restrict kept, int64_t n) {
    float back[TILE];
    NAMED(widen)(back, kept, n);
    for (int64_t i = 0; i < n; i++) back[i] = wide[i] - back[i];
    NAMED(narrow)(out, back, n);
}

static inline TARGET void NAMED(add_rest)(float *restrict wide, const uint16_t *restrict rest, int64_t n) {
    float tile[TILE];
    NAMED(widen)(tile, rest, n);
    for (int64_t i = 0; i < n; i++) wide[i] += tile[i];
}

/* sum |x| or |scale g + l2 p|, and sum g^2, of n elements, in WIDTH accumulators that stay in registers. They are float32
 * and go into float64 every FLUSH additions; where they overflow although every element is finite, `precise` counts again. */
static inline __attribute__((always_inline)) TARGET void NAMED(lanes)(
    const float *g, const float *p, int64_t n, float scale, float l2, int coupled, int squares, double *norm,
    double *square) {
    /* With two sums an element, half as many streams: the accumulators of both must fit the registers. */
    const int width = squares ? WIDTH / 2 : WIDTH;
    double norms[8] = {0}, squared[8] = {0};
    /* Eight streams, an eighth of the elements apart: one is too few to keep the memory busy. */
    int64_t stream = n / (8 * width) * 8;
    for (int64_t start = 0; start < stream; start += 8 * FLUSH) {
        int64_t end = start + 8 * FLUSH < stream ? start + 8 * FLUSH : stream;
        vector_t a[WIDTH] = {{0}}, b[WIDTH] = {{0}};
        for (int64_t i = start; i < end; i += 8) {
#pragma GCC unroll 8
            for (int k = 0; k < width; k++) {
                vector_t x = *(const vector_t *)(g + i + k * stream);
                if (squares) b[k] += x * x;
                if (coupled) x = scale * x + l2 * *(const vector_t *)(p + i + k * stream);
                a[k] += (vector_t)((bits_t)x & 0x7fffffff);
            }
        }
        for (int k = 0; k < width; k++)
            for (int l = 0; l < 8; l++) {
                norms[l] += a[k][l];
                if (squares) squared[l] += b[k][l];
            }
    }
    for (int64_t i = stream * width; i < n; i++) {
        *norm += coupled ? fabsf(scale * g[i] + l2 * p[i]) : fabsf(g[i]);
        if (squares) *square += (double)g[i] * g[i];
    }
    for (int l = 0; l < 8; l++) {
        *norm += norms[l];
        *square += squared[l];
    }
}

static TARGET void NAMED(sum_chunk)(const chunk_t *c, int squares, double *norm, double *square) {
    float p_tile[TILE], g_tile[TILE];
    int tiled = c->grad_is_bf16 || (c->coupled && c->param_is_bf16);
    int64_t piece = tiled ? TILE : c->n;
    *norm = *square = 0;
    for (int64_t at = 0; at < c->n; at += piece) {
        int64_t n = c->n - at < piece ? c->n - at : piece;
        const float *g = (const float *)c->grad + at, *p = (const float *)c->param + at;
        if (c->grad_is_bf16) NAMED(widen)(g_tile, (const uint16_t *)c->grad + at, n), g = g_tile;
        if (c->coupled && c->param_is_bf16) {
            NAMED(widen)(p_tile, (const uint16_t *)c->param + at, n), p = p_tile;
            if (c->rest) NAMED(add_rest)(p_tile, c->rest + at, n);
        }
        if (c->coupled) NAMED(lanes)(g, p, n, c->scale, c->l2, 1, 0, norm, square);
        else if (squares) NAMED(lanes)(g, p, n, 1, 0, 0, 1, norm, square);
        else NAMED(lanes)(g, p, n, 1, 0, 0, 0, norm, square);
    }
    if (!isfinite(*norm) || (squares && !isfinite(*square))) precise(c, squares, norm, square);
    /* |scale g| = |scale| |g|, so where nothing is added to it the sum is scaled once. */
    if (!c->coupled) *norm *= fabs(c->scale);
}

/* Psi(x) = x (1 - |x| / S). The share is |x| up, times 1 / (S up): `up` is a power of two that keeps both in range. */
#define PSI(x, up, share) ((x) - (x) * ((fabsf(x) * (up)) * (share)))

/* m = b1 m + (1-b1) Psi(x);  v = b2 v + (1-b2) z^2, z = x or Psi(x);  p = p decay - step m / (sqrt(v) correction + eps).
 * m is written as m + (1-b1) (Psi(x) - m), as torch's lerp does. AGR paper, algorithm 2. */
static inline __attribute__((always_inline)) TARGET void NAMED(adam_loop)(
    float *restrict p, const float *restrict g, float *restrict m, float *restrict v, int64_t n, const adam_t a, int psi,
    int regularized, int coupled) {
    for (int64_t i = 0; i < n; i++) {
        float x = a.scale * g[i];
        if (coupled) x += a.l2 * p[i];
        float y = psi ? PSI(x, a.up, a.share) : x;
        float z = regularized ? y : x;
        float mean = m[i] + a.one_minus_b1 * (y - m[i]);
        float square = a.b2 * v[i] + a.one_minus_b2 * z * z;
        m[i] = mean;
        v[i] = square;
        p[i] = p[i] * a.decay - a.step_size * mean / (sqrtf(square) * a.correction + a.eps);
    }
}

static inline TARGET void NAMED(adam)(float *p, const float *g, float *const s[], int64_t n, const update_t *u) {
    const adam_t a = u->adam;
#define CASE(k) case k: NAMED(adam_loop)(p, g, s[0], s[1], n, a, (k) & 1, ((k) >> 1) & 1, ((k) >> 2) & 1); break
    int psi = u->kind == RAW || u->kind == REGULARIZED;
    switch (psi + 2 * (u->kind == REGULARIZED) + 4 * u->coupled) {
        CASE(0); CASE(1); CASE(3); CASE(4); CASE(5); CASE(7);
    }
#undef CASE
}

/* Adan in the order of its published code; q holds minus the previous gradient. `kind` says what feeds the moments:
 * PLAIN x itself; RAW Psi(x) the momentum and Psi(x) - Psi(x_prev) the momentum of differences, each with the norm of its
 * own step, and x the second moment (AGR paper, algorithm 1); REGULARIZED Psi(x) in the place of x; UNUSABLE as RAW where
 * the norm of this step is 0 or not finite, so that Psi(x) = x. */
static inline __attribute__((always_inline)) TARGET void NAMED(adan_loop)(
    float *restrict p, const float *restrict g, float *restrict m, float *restrict v, float *restrict d, float *restrict q,
    int64_t n, const adan_t a, int kind, int first) {
    for (int64_t i = 0; i < n; i++) {
        float x = a.scale * g[i];
        float y = kind == RAW || kind == REGULARIZED ? PSI(x, a.up, a.share) : x;
        if (kind == REGULARIZED) x = y;
        float before = first ? -x : q[i];
        float change = x + before;
        float y_change = change;
        if (kind == RAW || kind == UNUSABLE) y_change = first ? 0 : y + PSI(before, a.up_before, a.share_before);
        float mean = m[i] + a.one_minus_b1 * (y - m[i]);
        float difference = a.b2 * d[i] + a.one_minus_b2 * y_change;
        float ahead = x + a.b2 * change;
        float square = a.b3 * v[i] + a.one_minus_b3 * ahead * ahead;
        float denominator = sqrtf(square) * a.correction + a.eps;
        m[i] = mean;
        d[i] = difference;
        v[i] = square;
        q[i] = -x;
        p[i] = (p[i] * a.decay - (a.step_size * mean + a.difference_step_size * difference) / denominator) * a.shrink;
    }
}

static inline TARGET void NAMED(adan)(float *p, const float *g, float *const s[], int64_t n, const update_t *u) {
    const adan_t a = u->adan;
#define CASE(kind, first) \
    case (kind) + 4 * (first): NAMED(adan_loop)(p, g, s[0], s[1], s[2], s[3], n, a, kind, first); break
    switch (u->kind + 4 * a.first) {
        CASE(PLAIN, 0); CASE(RAW, 0); CASE(REGULARIZED, 0); CASE(UNUSABLE, 0);
        CASE(PLAIN, 1); CASE(RAW, 1); CASE(REGULARIZED, 1); CASE(UNUSABLE, 1);
    }
#undef CASE
}

static TARGET void NAMED(update_chunk)(const chunk_t *c, const update_t *u) {
    float p_tile[TILE], g_tile[TILE], m_tile[TILE];
    int64_t piece = c->grad_is_bf16 || c->param_is_bf16 || c->moment_is_bf16 ? TILE : c->n;
    for (int64_t at = 0; at < c->n; at += piece) {
        int64_t n = c->n - at < piece ? c->n - at : piece;
        float *p = (float *)c->param + at, *s[STATES];
        const float *g = (const float *)c->grad + at;
        for (int k = 0; k < STATES; k++) s[k] = c->state[k] + at;
        if (c->grad_is_bf16) NAMED(widen)(g_tile, (const uint16_t *)c->grad + at, n), g = g_tile;
        uint16_t *p_kept = (uint16_t *)c->param + at, *m_kept = (uint16_t *)c->state[0] + at;
        if (c->param_is_bf16) NAMED(widen)(p_tile, p_kept, n), p = p_tile;
        if (c->rest) NAMED(add_rest)(p_tile, c->rest + at, n);
        if (c->moment_is_bf16) NAMED(widen)(m_tile, m_kept, n), s[0] = m_tile;
        if (u->rule == ADAN) NAMED(adan)(p, g, s, n, u);
        else NAMED(adam)(p, g, s, n, u);
        uint32_t first = c->first_random + (uint32_t)at;
        if (c->param_is_bf16 && c->at_random) NAMED(narrow_at_random)(p_kept, p, n, first, 0);
        else if (c->param_is_bf16) NAMED(narrow)(p_kept, p, n);
        if (c->rest) NAMED(keep_rest)(c->rest + at, p, p_kept, n);
        if (c->moment_is_bf16 && c->at_random) NAMED(narrow_at_random)(m_kept, m_tile, n, first, 16);
        else if (c->moment_is_bf16) NAMED(narrow)(m_kept, m_tile, n);
    }
}

#undef TILE
#undef WIDTH
#undef FLUSH
#undef PSI
