// The inner loops of attention: scores of a page's keys, their exponentials, the weighted sum of its values. V is an
// instruction set (attention_avx512.cpp and its neighbours). Internal linkage throughout, see pool.h; the order of
// operations, and why it is that one, is in attention.h.
#pragma once

#include "attention.h"
#include "numbers.h"

#include <cmath>

namespace tk {
namespace {

constexpr int64_t kPage = 64;         // tokens
constexpr float kHeadroom = 8;        // exp(8) times any value of bf16 that occurs is far from overflow
constexpr float kInvisible = -1e30f;  // a lower bias means "not seen", as in additive masks
constexpr float kMost = 88;           // exp of much more is infinite
constexpr float kLeast = -87.3f;      // exp of less is taken for 0; it would not be a normal number

// Rows of a page: `direct` ones are bf16 where the cache keeps them, others fp32 in scratch, padded to whole vectors.
struct Rows {
    const void *row0;
    int64_t stride; // in elements
    int64_t width;
    int64_t from, to; // the rows that are there
};

// Prefetches memory that is needed next, a few lines at a time, while other memory is worked on: many requests at once
// would stall the processor, and its own prefetching ends at each multiple of 4 KiB.
struct Ahead {
    const char *at;
    int64_t step; // bytes

    // `one_line`: a step is no more than that, as it is for direct rows.
    template <bool one_line> void some() {
        __builtin_prefetch(at);
        for (int64_t line = 64; !one_line && line < step; line += 64) __builtin_prefetch(at + line);
        at += step;
    }
};

// e^x within 1.5e-7 of its value (two units in the last place), 0 below kLeast.
template <class V> inline typename V::F exp_of(typename V::F x) {
    using F = typename V::F;
    const F n = V::round(V::mul(V::max(V::set(kLeast), x), V::set(1.44269504f)));
    // ln 2 in two parts, the first of few bits, so that n times it is exact.
    F r = V::fma(n, V::set(-0.693359375f), V::max(V::set(kLeast), x));
    r = V::fma(n, V::set(2.12194440e-4f), r);
    // Fitted to e^r in -ln2/2 .. ln2/2; 1 and r have their exact coefficients.
    F p = V::fma(r, V::set(1.3836794e-3f), V::set(8.3748571e-3f));
    p = V::fma(p, r, V::set(4.1668229e-2f));
    p = V::fma(p, r, V::set(1.6666420e-1f));
    p = V::fma(p, r, V::set(4.9999992e-1f));
    p = V::fma(V::mul(r, r), p, V::add(r, V::set(1)));
    return V::unless_below(x, kLeast, V::times_power(p, n));
}

template <class V> inline typename V::F tanh_of(typename V::F x) {
    const typename V::F limited = V::max(V::set(-10), V::min(V::set(10), x));
    const typename V::F e = exp_of<V>(V::add(limited, limited));
    return V::sub(V::set(1), V::div(V::set(2), V::add(e, V::set(1))));
}

// Vector `c` of a row; lanes past its width are 0.
template <class V, bool direct> inline typename V::F row_at(const void *row, int64_t c) {
    if constexpr (direct) return V::widen(static_cast<const uint16_t *>(row) + c);
    return V::load(static_cast<const float *>(row) + c);
}

// Scores of Q queries (rows of q, `ld` apart, padded with 0) against keys k .. stop, to scores[query][64]; a few more
// may be written, never beyond 64. Instead of direct rows that are not there, neighbours are read.
template <class V, int Q, bool direct>
__attribute__((noinline)) void dots(const float *q, int64_t ld, const Rows &keys, int64_t k, int64_t stop,
                                    float *scores, Ahead &next) {
    using F = typename V::F;
    constexpr int K = V::kLanes / Q;
    Ahead ahead = next;
    const int64_t whole = direct ? keys.width / V::kLanes * V::kLanes : keys.width;
    const int64_t nbytes = keys.stride * (direct ? 2 : 4);
    for (; k < stop; k += K) {
        const char *rows[K];
#pragma GCC unroll 16
        for (int i = 0; i < K; i++) {
            const int64_t row = k + i < keys.from ? keys.from : k + i < keys.to ? k + i : keys.to - 1;
            rows[i] = static_cast<const char *>(keys.row0) + (direct ? row : k + i) * nbytes;
        }
        F sums[V::kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < V::kLanes; i++) sums[i] = V::zero();
        for (int64_t c = 0; c < whole; c += V::kLanes) {
            F x[Q];
#pragma GCC unroll 16
            for (int j = 0; j < Q; j++) x[j] = V::load(q + j * ld + c);
#pragma GCC unroll 16
            for (int i = 0; i < K; i++) {
                if (direct ? i % 2 : !i) ahead.some<direct>();
                const F key = row_at<V, direct>(rows[i], c);
#pragma GCC unroll 16
                for (int j = 0; j < Q; j++) sums[j * K + i] = V::fma(x[j], key, sums[j * K + i]);
            }
        }
        if (direct && whole < keys.width) {
#pragma GCC unroll 16
            for (int i = 0; i < K; i++) {
                const F key = V::widen_part(reinterpret_cast<const uint16_t *>(rows[i]) + whole, keys.width - whole);
#pragma GCC unroll 16
                for (int j = 0; j < Q; j++) sums[j * K + i] = V::fma(V::load(q + j * ld + whole), key, sums[j * K + i]);
            }
        }
        V::template put<Q>(scores + k, kPage, V::reduce(sums));
    }
    next = ahead;
}

// out[query][column ..] += weights[query][k] * values[k][column ..] for k in from .. to, C vectors at once.
template <class V, int Q, int C, bool direct, bool part = false>
__attribute__((noinline)) void weigh(const float *weights, const Rows &values, int64_t from, int64_t to, int64_t column,
                                     float *out, int64_t ld, Ahead &next) {
    using F = typename V::F;
    Ahead ahead = next;
    F sums[Q][C];
#pragma GCC unroll 16
    for (int j = 0; j < Q; j++) {
#pragma GCC unroll 16
        for (int c = 0; c < C; c++) sums[j][c] = V::load(out + j * ld + column + c * V::kLanes);
    }
    const int64_t nbytes = values.stride * (direct ? 2 : 4);
    const char *row = static_cast<const char *>(values.row0) + from * nbytes;
    for (int64_t k = from; k < to; k++, row += nbytes) {
        F value[C];
#pragma GCC unroll 16
        for (int c = 0; c < C; c++) {
            if (direct ? c % 2 == 0 : !c) ahead.some<direct>();
            if constexpr (part) {
                value[c] = V::widen_part(reinterpret_cast<const uint16_t *>(row) + column, values.width - column);
            } else {
                value[c] = row_at<V, direct>(row, column + c * V::kLanes);
            }
        }
#pragma GCC unroll 16
        for (int j = 0; j < Q; j++) {
            const F weight = V::set(weights[j * kPage + k]);
#pragma GCC unroll 16
            for (int c = 0; c < C; c++) sums[j][c] = V::fma(weight, value[c], sums[j][c]);
        }
    }
#pragma GCC unroll 16
    for (int j = 0; j < Q; j++) {
#pragma GCC unroll 16
        for (int c = 0; c < C; c++) V::store(out + j * ld + column + c * V::kLanes, sums[j][c]);
    }
    next = ahead;
}

// Nibbles with one scale and zero, computed one by one: for levels that have no table of sixteen.
template <class V> struct PlainNibbles {
    typename V::F scale, zero;

    PlainNibbles(const typename V::F &s, const typename V::F &z) : scale(s), zero(z) {}
    typename V::F at(const uint8_t *u8, int64_t count, bool high) const {
        return V::mul(V::sub(V::nibbles(u8, count, high), zero), scale);
    }
};

// What has been added up for a query so far.
struct Running {
    float reference;
    float sum;
    uint64_t moves; // keys of the present page at which the reference moved
};

// Adds a page's weights to the sums of Q queries whose reference does not move. Each sum is a chain of additions;
// chains side by side wait least.
template <int Q> inline void add_up(const float *weights, int64_t from, int64_t to, Running *running) {
    float sums[Q];
    for (int j = 0; j < Q; j++) sums[j] = running[j].sum;
    for (int64_t k = from; k < to; k++) {
#pragma GCC unroll 16
        for (int j = 0; j < Q; j++) sums[j] += weights[j * kPage + k];
    }
    for (int j = 0; j < Q; j++) running[j].sum = sums[j];
}

// A page's 64 scores, times `scaling`, become weights, 0 where `visible` has no bit. Where the reference moves, a bit
// of running.moves and an element of `factors` say so.
template <class V>
__attribute__((noinline)) void soften(float *scores, float scaling, uint64_t visible, Running &running, float *factors,
                                      float *references) {
    using F = typename V::F;
    running.moves = 0;
    F most = V::set(-INFINITY);
    for (int64_t k = 0; k < kPage; k += V::kLanes) {
        const F seen = V::choose(visible >> k, V::mul(V::load(scores + k), V::set(scaling)));
        V::store(scores + k, seen);
        most = V::max(most, seen);
    }
    if (!visible) {
        for (int64_t k = 0; k < kPage; k += V::kLanes) V::store(scores + k, V::zero());
        return;
    }
    if (running.reference == -INFINITY) running.reference = scores[__builtin_ctzll(visible)];
    F reference = V::set(running.reference);
    if (V::max_of(most) <= running.reference + kHeadroom) {
        for (int64_t k = 0; k < kPage; k += V::kLanes) {
            V::store(scores + k, exp_of<V>(V::sub(V::load(scores + k), reference)));
        }
        return;
    }
    for (int64_t k = 0; k < kPage; k++) {
        if (scores[k] > running.reference + kHeadroom) {
            running.moves |= uint64_t(1) << k;
            factors[k] = V::first_of(exp_of<V>(V::set(running.reference - scores[k])));
            running.reference = scores[k];
        }
        references[k] = running.reference;
    }
    for (int64_t k = 0; k < kPage; k += V::kLanes) {
        V::store(scores + k, exp_of<V>(V::sub(V::load(scores + k), V::load(references + k))));
    }
}

} // namespace
} // namespace tk
