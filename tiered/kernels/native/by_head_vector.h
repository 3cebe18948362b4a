// The loops of by_head.h. V is an instruction set's vector of kLanes fp32. A result is a sum in one fixed order, whatever
// is computed beside it: tiles only share what they load.
#pragma once

#include "by_head.h"
#include "numbers.h"
#include "tiered_kernels.h"
#include "vector_plain.h"

namespace tk {
namespace {

constexpr int64_t kTokens = 16; // in a work item: they share each row of a matrix while it is in the cache
constexpr int kTile = 4;        // of tokens, or of rows of a matrix

inline float load_bf16(const uint16_t *from) {
    uint16_t bits;
    std::memcpy(&bits, from, sizeof bits);
    return from_bf16(bits);
}

inline void store_bf16(float value, uint16_t *to) {
    const uint16_t bits = to_bf16(value);
    std::memcpy(to, &bits, sizeof bits);
}

struct HeadItem {
    const float *w, *x; // [rows, in]; the tokens' x, widened, `width` apart
    uint16_t *y;
    int64_t rows, in, width, y_stride;
};

// T tokens' numbers i to i + N * kLanes: sums over rows r of x[r] * w[r][i], in ascending order of r.
template <class V, int T, int N> inline void add_rows(const HeadItem &h, int64_t token, int64_t i) {
    typename V::F sums[T][N];
    for (int t = 0; t < T; t++) {
        for (int n = 0; n < N; n++) sums[t][n] = V::zero();
    }
    const float *x = h.x + token * h.width;
    for (int64_t r = 0; r < h.rows; r++) {
        typename V::F w[N];
        for (int n = 0; n < N; n++) w[n] = V::load(h.w + r * h.in + i + n * V::kLanes);
        for (int t = 0; t < T; t++) {
            const typename V::F factor = V::set(x[t * h.width + r]);
            for (int n = 0; n < N; n++) sums[t][n] = V::fma(w[n], factor, sums[t][n]);
        }
    }
    for (int t = 0; t < T; t++) {
        for (int n = 0; n < N; n++) {
            float lanes[V::kLanes];
            V::store(lanes, sums[t][n]);
            uint16_t *y = h.y + (token + t) * h.y_stride + i + n * V::kLanes;
            for (int lane = 0; lane < V::kLanes; lane++) store_bf16(lanes[lane], y + lane);
        }
    }
}

template <class V, int T> inline void add_all(const HeadItem &h, int64_t token) {
    int64_t i = 0;
    for (; i + 2 * V::kLanes <= h.in; i += 2 * V::kLanes) add_rows<V, T, 2>(h, token, i);
    for (; i + V::kLanes <= h.in; i += V::kLanes) add_rows<V, T, 1>(h, token, i);
    for (; i < h.in; i++) add_rows<One, T, 1>(h, token, i);
}

// T tokens' products with rows r to r + R.
template <class V, int T, int R> inline void dot_rows(const HeadItem &h, int64_t token, int64_t r) {
    typename V::F sums[T][R];
    for (int t = 0; t < T; t++) {
        for (int n = 0; n < R; n++) sums[t][n] = V::zero();
    }
    const float *x = h.x + token * h.width, *w = h.w + r * h.in;
    int64_t i = 0;
    for (; i + V::kLanes <= h.in; i += V::kLanes) {
        typename V::F some[R];
        for (int n = 0; n < R; n++) some[n] = V::load(w + n * h.in + i);
        for (int t = 0; t < T; t++) {
            const typename V::F factor = V::load(x + t * h.width + i);
            for (int n = 0; n < R; n++) sums[t][n] = V::fma(some[n], factor, sums[t][n]);
        }
    }
    for (int t = 0; t < T; t++) {
        for (int n = 0; n < R; n++) {
            float sum = sum_of<V>(sums[t][n]);
            for (int64_t left = i; left < h.in; left++) sum += x[t * h.width + left] * w[n * h.in + left];
            store_bf16(sum, h.y + (token + t) * h.y_stride + r + n);
        }
    }
}

template <class V, int T> inline void dot_all(const HeadItem &h, int64_t token) {
    constexpr int kRows = T == 1 ? kTile : 2; // sums that are independent
    int64_t r = 0;
    for (; r + kRows <= h.rows; r += kRows) dot_rows<V, T, kRows>(h, token, r);
    for (; r < h.rows; r++) dot_rows<V, T, 1>(h, token, r);
}

struct HeadShared {
    const ByHead *by_head;
    Pool *pool;
    size_t nbytes;
};

template <class V> void head_item(void *argument, int worker, int64_t item) {
    const HeadShared &shared = *static_cast<const HeadShared *>(argument);
    const ByHead &b = *shared.by_head;
    const int64_t head = item % b.heads, first = item / b.heads * kTokens;
    const int64_t tokens = first + kTokens < b.tokens ? kTokens : b.tokens - first;
    const int64_t width = b.transposed ? b.rows : b.in;
    const uint16_t *x = b.x + first * b.x_stride[0] + head * b.x_stride[1];
    // The scratch has this size already, so the call neither moves it nor fails.
    float *widened = static_cast<float *>(shared.pool->scratch(worker, shared.nbytes));
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t i = 0; i < width; i++) widened[t * width + i] = load_bf16(x + t * b.x_stride[0] + i);
    }
    uint16_t *y = b.y + first * b.y_stride[0] + head * b.y_stride[1];
    const HeadItem h = {b.w + head * b.w_stride, widened, y, b.rows, b.in, width, b.y_stride[0]};
    int64_t token = 0;
    for (; token + kTile <= tokens; token += kTile) {
        b.transposed ? add_all<V, kTile>(h, token) : dot_all<V, kTile>(h, token);
    }
    for (; token < tokens; token++) b.transposed ? add_all<V, 1>(h, token) : dot_all<V, 1>(h, token);
}

template <class V> int by_head_of(const ByHead &by_head, Pool &pool) {
    const int64_t tokens = by_head.tokens < kTokens ? by_head.tokens : kTokens;
    const int64_t width = by_head.transposed ? by_head.rows : by_head.in;
    HeadShared shared = {&by_head, &pool, static_cast<size_t>(tokens * width) * sizeof(float)};
    for (int worker = 0; worker < pool.threads(); worker++) {
        if (!pool.scratch(worker, shared.nbytes)) return TK_NO_MEMORY;
    }
    const int64_t items = by_head.heads * ((by_head.tokens + kTokens - 1) / kTokens);
    return pool.run(items, head_item<V>, &shared, by_head.cancel) ? TK_OK : TK_CANCELLED;
}

} // namespace
} // namespace tk
