// How the vector kernels divide a layer's rows into items, and how they store an item's sums: bias added, rounded.
// Internal linkage throughout, see pool.h.
#pragma once

#include "linear.h"
#include "numbers.h"

namespace tk {
namespace {

constexpr int kStrip = 4;             // weight rows that a kernel multiplies at once
constexpr int64_t kMostItemRows = 64; // weight rows of an item

inline int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

// Weight rows per item: whole strips, in enough items that threads end together.
inline int64_t item_rows_of(const Linear &l, const Pool &pool) {
    const int64_t even = (l.w.out / (8 * pool.threads()) + kStrip - 1) / kStrip * kStrip;
    return even < kStrip ? kStrip : at_most(even, kMostItemRows);
}

inline void load_bias(const Linear &l, int64_t o, int64_t rows, float *bias) {
    for (int64_t r = 0; r < rows; r++) {
        if (l.bias_dtype == TK_F32) {
            std::memcpy(bias + r, static_cast<const char *>(l.bias) + (o + r) * 4, 4);
        } else {
            uint16_t bits;
            std::memcpy(&bits, static_cast<const char *>(l.bias) + (o + r) * 2, 2);
            bias[r] = from_bf16(bits);
        }
    }
}

// Columns o .. o + rows of y's rows `first` .. `first + tokens`. sums: [tokens][stride].
inline void store_sums(const Linear &l, int64_t first, int64_t tokens, int64_t o, int64_t rows, const float *sums,
                       int64_t stride) {
    float bias[kMostItemRows] = {};
    if (l.bias) load_bias(l, o, rows, bias);
    for (int64_t t = 0; t < tokens; t++) {
        const float *row = sums + t * stride;
        const int64_t at = (first + t) * l.ldy + o;
        if (l.y_dtype == TK_F32) {
            float values[kMostItemRows];
            for (int64_t r = 0; r < rows; r++) values[r] = row[r] + bias[r];
            std::memcpy(static_cast<char *>(l.y) + at * 4, values, static_cast<size_t>(rows) * 4);
        } else {
            uint16_t values[kMostItemRows];
            for (int64_t r = 0; r < rows; r++) values[r] = to_bf16(row[r] + bias[r]);
            std::memcpy(static_cast<char *>(l.y) + at * 2, values, static_cast<size_t>(rows) * 2);
        }
    }
}

} // namespace
} // namespace tk
