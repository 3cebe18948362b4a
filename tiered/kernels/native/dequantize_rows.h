// The loop over rows and groups of dequantization, one template for all levels. `V` stores values of up to 8 bits or
// nibbles of them: V::kLanes weights at a time. Internal linkage throughout, see pool.h.
#pragma once

#include "dequantize.h"
#include "numbers.h"

namespace tk {
namespace {

constexpr int64_t kItemWeights = 1 << 15;

template <class V, class Factors, class Out>
void dequantize_nibbles(const uint8_t *q, int half, const Factors &factors, Out *out) {
    for (int i = 0; i < half; i += V::kLanes) {
        const typename V::Codes both = V::codes(q + i);
        V::store(out + i, factors.weights(V::low(both)));
        V::store(out + half + i, factors.weights(V::high(both)));
    }
}

// Group `g` of all, whose codes begin at `q`.
template <class V, class Out> void dequantize_group(const Dequantize &d, const uint8_t *q, int64_t g, Out *out) {
    const float scale = scale_at(d.w, g);
    if (d.w.format == TK_CODEBOOK) {
        dequantize_nibbles<V>(q, d.w.group / 2, typename V::Table(d.w.values, scale), out);
        return;
    }
    const typename V::Factors factors(scale, d.w.zero[g]);
    if (d.w.format == TK_INT4) return dequantize_nibbles<V>(q, d.w.group / 2, factors, out);
    for (int i = 0; i < d.w.group; i += V::kLanes) V::store(out + i, factors.weights(V::codes(q + i)));
}

template <class V, class Out> void dequantize_row(const Dequantize &d, int64_t row, Out *out) {
    const uint8_t *q = static_cast<const uint8_t *>(d.w.q) + row * d.row_nbytes;
    const int64_t group_nbytes = d.row_nbytes / d.groups;
    for (int64_t g = 0; g < d.groups; g++) {
        dequantize_group<V>(d, q + g * group_nbytes, row * d.groups + g, out + g * d.w.group);
    }
}

template <class V> void dequantize_item(void *argument, int, int64_t item) {
    const Dequantize &d = *static_cast<const Dequantize *>(argument);
    const int64_t begin = item * d.item_rows, end = begin + d.item_rows < d.rows ? begin + d.item_rows : d.rows;
    for (int64_t row = begin; row < end; row++) {
        if (d.dtype == TK_F32) {
            dequantize_row<V>(d, d.first + row, static_cast<float *>(d.out) + row * d.w.in);
        } else {
            dequantize_row<V>(d, d.first + row, static_cast<uint16_t *>(d.out) + row * d.w.in);
        }
    }
}

template <class V> void dequantize_with(Dequantize &d, Pool &pool) {
    d.item_rows = d.w.in < kItemWeights ? kItemWeights / d.w.in : 1;
    pool.run((d.rows + d.item_rows - 1) / d.item_rows, dequantize_item<V>, &d, nullptr);
}

} // namespace
} // namespace tk
