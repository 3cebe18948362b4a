// Products with a matrix for each head: what latent attention makes of its queries, and of what attention returns.
//
// One loop for all instruction sets, in plain C++ that any compiler turns into the vectors of the least of them: beside
// the rest of a layer this is little. A result is a sum in one fixed order, whatever else is computed with it.

#include "by_head.h"
#include "numbers.h"
#include "tiered_kernels.h"

#include <cstring>

namespace tk {

namespace {

constexpr int64_t kTokens = 16; // in a work item: they share each row of a matrix while it is in the cache
constexpr int kLanes = 16;      // partial sums of a product of two rows

inline float load_bf16(const uint16_t *from) {
    uint16_t bits;
    std::memcpy(&bits, from, sizeof bits);
    return from_bf16(bits);
}

inline void store_bf16(float value, uint16_t *to) {
    const uint16_t bits = to_bf16(value);
    std::memcpy(to, &bits, sizeof bits);
}

// y[token][i] = sum over rows r of x[token][r] * w[r][i], in ascending order of r.
void add_rows(const ByHead &b, const float *w, const uint16_t *x, uint16_t *y, int64_t tokens, float *sums) {
    for (int64_t i = 0; i < tokens * b.in; i++) sums[i] = 0;
    for (int64_t r = 0; r < b.rows; r++) {
        const float *row = w + r * b.in;
        for (int64_t t = 0; t < tokens; t++) {
            const float factor = load_bf16(x + t * b.x_stride[0] + r);
            float *sum = sums + t * b.in;
            for (int64_t i = 0; i < b.in; i++) sum[i] += factor * row[i];
        }
    }
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t i = 0; i < b.in; i++) store_bf16(sums[t * b.in + i], y + t * b.y_stride[0] + i);
    }
}

float dot(const float *a, const float *b, int64_t count) {
    float sums[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (int lane = 0; lane < kLanes; lane++) sums[lane] += a[i + lane] * b[i + lane];
    }
    for (int lane = 0; i + lane < count; lane++) sums[lane] += a[i + lane] * b[i + lane];
    for (int half = kLanes / 2; half; half /= 2) {
        for (int lane = 0; lane < half; lane++) sums[lane] += sums[lane + half];
    }
    return sums[0];
}

// y[token][r] = x[token] . w[r]; `widened` holds the tokens' x.
void dot_rows(const ByHead &b, const float *w, const uint16_t *x, uint16_t *y, int64_t tokens, float *widened) {
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t i = 0; i < b.in; i++) widened[t * b.in + i] = load_bf16(x + t * b.x_stride[0] + i);
    }
    for (int64_t r = 0; r < b.rows; r++) {
        const float *row = w + r * b.in;
        for (int64_t t = 0; t < tokens; t++) store_bf16(dot(widened + t * b.in, row, b.in), y + t * b.y_stride[0] + r);
    }
}

struct Shared {
    const ByHead *by_head;
    Pool *pool;
    size_t nbytes;
};

void one_item(void *argument, int worker, int64_t item) {
    const Shared &shared = *static_cast<const Shared *>(argument);
    const ByHead &b = *shared.by_head;
    const int64_t head = item % b.heads, first = item / b.heads * kTokens;
    const int64_t tokens = first + kTokens < b.tokens ? kTokens : b.tokens - first;
    const float *w = b.w + head * b.w_stride;
    const uint16_t *x = b.x + first * b.x_stride[0] + head * b.x_stride[1];
    uint16_t *y = b.y + first * b.y_stride[0] + head * b.y_stride[1];
    // The scratch has this size already, so the call neither moves it nor fails.
    float *memory = static_cast<float *>(shared.pool->scratch(worker, shared.nbytes));
    (b.transposed ? add_rows : dot_rows)(b, w, x, y, tokens, memory);
}

} // namespace

int by_head(ByHead &by_head, Pool &pool) {
    const int64_t tokens = by_head.tokens < kTokens ? by_head.tokens : kTokens;
    Shared shared = {&by_head, &pool, static_cast<size_t>(tokens * by_head.in) * sizeof(float)};
    for (int worker = 0; worker < pool.threads(); worker++) {
        if (!pool.scratch(worker, shared.nbytes)) return TK_NO_MEMORY;
    }
    const int64_t items = by_head.heads * ((by_head.tokens + kTokens - 1) / kTokens);
    return pool.run(items, one_item, &shared, by_head.cancel) ? TK_OK : TK_CANCELLED;
}

} // namespace tk
