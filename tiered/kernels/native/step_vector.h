// The loops of step.h. V is an instruction set's vector of kLanes fp32; what is left of a row goes one by one.
#pragma once

#include "step.h"
#include "vector_plain.h"

namespace tk {
namespace {

// `count` numbers times `factor`, which is divided by their length where they are to be normalized.
template <class V> inline void scaled(const float *from, int64_t count, bool normalized, float factor, float *to) {
    if (normalized) {
        typename V::F squares = V::zero();
        int64_t i = 0;
        for (; i + V::kLanes <= count; i += V::kLanes) {
            const typename V::F some = V::load(from + i);
            squares = V::fma(some, some, squares);
        }
        float sum = sum_of<V>(squares);
        for (; i < count; i++) sum += from[i] * from[i];
        factor /= __builtin_sqrtf(sum + 1e-6f); // std::sqrt might be shared with code for older processors
    }
    for (int64_t i = 0; i < count; i++) to[i] = from[i] * factor;
}

struct DeltaHead {
    int64_t keys, ld;
    const float *q, *k;
    float decay, beta;
};

// N vectors of columns of a head's state, from its first row on.
template <class V, int N> inline void delta_columns(const DeltaHead &head, float *state, const float *v, float *out) {
    using F = typename V::F;
    F sums[N], change[N];
    for (int n = 0; n < N; n++) sums[n] = V::zero();
    for (int64_t i = 0; i < head.keys; i++) {
        const float *row = state + i * head.ld;
        const F k = V::set(head.k[i]);
        for (int n = 0; n < N; n++) sums[n] = V::fma(V::load(row + n * V::kLanes), k, sums[n]);
    }
    const F decay = V::set(head.decay), beta = V::set(head.beta);
    for (int n = 0; n < N; n++) {
        change[n] = V::multiply(V::fnma(sums[n], decay, V::load(v + n * V::kLanes)), beta);
        sums[n] = V::zero();
    }
    for (int64_t i = 0; i < head.keys; i++) {
        float *row = state + i * head.ld;
        const F k = V::set(head.k[i]), q = V::set(head.q[i]);
        for (int n = 0; n < N; n++) {
            float *at = row + n * V::kLanes;
            const F now = V::fma(change[n], k, V::multiply(V::load(at), decay));
            V::store(at, now);
            sums[n] = V::fma(now, q, sums[n]);
        }
    }
    for (int n = 0; n < N; n++) V::store(out + n * V::kLanes, sums[n]);
}

struct DeltaShared {
    const tk_delta_args *args;
    Pool *pool;
    size_t nbytes;
};

template <class V> void delta_item(void *argument, int worker, int64_t item) {
    const DeltaShared &shared = *static_cast<const DeltaShared *>(argument);
    const tk_delta_args &s = *shared.args;
    const int64_t sequence = item / s.heads, head = item % s.heads;
    const int64_t of_keys = (sequence * s.key_heads + head / (s.heads / s.key_heads)) * s.keys;
    // The scratch has this size already, so the call neither moves it nor fails.
    float *q = static_cast<float *>(shared.pool->scratch(worker, shared.nbytes)), *k = q + s.keys;
    scaled<V>(s.q + of_keys, s.keys, s.normalized != 0, s.scaling, q);
    scaled<V>(s.k + of_keys, s.keys, s.normalized != 0, 1, k);
    const DeltaHead one = {s.keys, s.values, q, k, s.decay[item], s.beta[item]};
    float *state = s.state + sequence * s.state_stride + head * s.keys * s.values;
    const float *v = s.v + item * s.values;
    float *out = s.out + item * s.values;
    int64_t i = 0;
    constexpr int64_t kWide = V::kColumns * V::kLanes;
    for (; i + kWide <= s.values; i += kWide) delta_columns<V, V::kColumns>(one, state + i, v + i, out + i);
    for (; i + V::kLanes <= s.values; i += V::kLanes) delta_columns<V, 1>(one, state + i, v + i, out + i);
    for (; i < s.values; i++) delta_columns<One, 1>(one, state + i, v + i, out + i);
}

template <class V> int delta_step_of(const tk_delta_args &args, Pool &pool, const int32_t *cancel) {
    DeltaShared shared = {&args, &pool, static_cast<size_t>(2 * args.keys) * sizeof(float)};
    for (int worker = 0; worker < pool.threads(); worker++) {
        if (!pool.scratch(worker, shared.nbytes)) return TK_NO_MEMORY;
    }
    return pool.run(args.sequences * args.heads, delta_item<V>, &shared, cancel) ? TK_OK : TK_CANCELLED;
}

// Columns `i` to `size` of a row, V::kLanes at a time; returns the first that is left.
template <class V, bool by_column>
inline int64_t scan_columns(float *state, const float *decay, float x, const float *b, const float *c, int64_t i,
                            int64_t size, float *sum) {
    typename V::F total = V::zero();
    const typename V::F factor = V::set(x), same = V::set(*decay);
    for (; i + V::kLanes <= size; i += V::kLanes) {
        const typename V::F old = V::multiply(V::load(state + i), by_column ? V::load(decay + i) : same);
        const typename V::F now = V::fma(V::load(b + i), factor, old);
        V::store(state + i, now);
        total = V::fma(now, V::load(c + i), total);
    }
    *sum += sum_of<V>(total);
    return i;
}

template <class V, bool by_column>
inline float scan_row(float *state, const float *decay, float x, const float *b, const float *c, int64_t size) {
    float sum = 0;
    const int64_t left = scan_columns<V, by_column>(state, decay, x, b, c, 0, size, &sum);
    if (left < size) scan_columns<One, by_column>(state, decay, x, b, c, left, size, &sum);
    return sum;
}

struct ScanShared {
    const tk_scan_args *args;
    int64_t rows, items; // of an item; of a sequence
};

template <class V> void scan_item(void *argument, int, int64_t item) {
    const ScanShared &shared = *static_cast<const ScanShared *>(argument);
    const tk_scan_args &s = *shared.args;
    const int64_t sequence = item / shared.items, begin = item % shared.items * shared.rows;
    const int64_t end = begin + shared.rows < s.rows ? begin + shared.rows : s.rows;
    const int64_t groups = s.rows / s.group_rows, decays = s.rows / s.decay_rows;
    for (int64_t r = begin; r < end; r++) {
        const float *decay = s.decay + (sequence * decays + r / s.decay_rows) * s.decay_size;
        const int64_t of_group = (sequence * groups + r / s.group_rows) * s.size, at = sequence * s.rows + r;
        float *state = s.state + sequence * s.state_stride + r * s.size;
        const auto row = s.decay_size > 1 ? scan_row<V, true> : scan_row<V, false>;
        s.out[at] = row(state, decay, s.x[at], s.b + of_group, s.c + of_group, s.size);
    }
}

template <class V> int scan_step_of(const tk_scan_args &args, Pool &pool, const int32_t *cancel) {
    constexpr int64_t kNumbers = 8192; // of an item
    const int64_t rows = args.size < kNumbers ? kNumbers / args.size : 1;
    ScanShared shared = {&args, rows, (args.rows + rows - 1) / rows};
    return pool.run(args.sequences * shared.items, scan_item<V>, &shared, cancel) ? TK_OK : TK_CANCELLED;
}

} // namespace
} // namespace tk
