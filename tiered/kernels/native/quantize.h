// Weights to codes as the levels see it, and the levels' entries. See pool.h about inline functions.
//
// The arithmetic is that of tiered/quant/quantize.py, bit for bit: fp32, every operation rounded on its own.
#pragma once

#include "pool.h"
#include "tiered_kernels.h"

namespace tk {

// Of TK_CODE8, where the table has the numbers of E4M3: computed, as looking up 8 or 16 at once in a table of 256 takes
// a load for each. Every level's e4m3 does what this says: a NaN for the codes of all ones.
constexpr int32_t kE4m3 = TK_CODE4 + 1;

struct Quantize {
    const unsigned char *weight;
    int32_t dtype; // tk_dtype, or kE4m3
    int64_t row_nbytes; // from one row of `weight` to the next
    tk_lookup lookup;   // of codes
    int32_t shift;      // of a column's number to that of its scale
    int64_t groups;     // per row
    int64_t all_groups; // of all rows; outputs have them one behind the other
    int32_t bits, group;
    bool clip; // try every factor, not only the first
    uint8_t *q;
    uint16_t *scale;
    uint8_t *zero;
    const int32_t *cancel;
    int32_t not_finite; // set, by any worker, where a scale is no finite fp16 number
};

// Bytes of `count` consecutive values.
static inline int64_t nbytes_of(int32_t dtype, int64_t count) {
    switch (dtype) {
        case TK_F32: return 4 * count;
        case TK_CODE8:
        case kE4m3: return count;
        case TK_CODE4: return count / 2;
        default: return 2 * count;
    }
}

// Each returns a tk_status.
int quantize_scalar(Quantize &quantize, Pool &pool);
int quantize_avx2(Quantize &quantize, Pool &pool);
int quantize_avx512(Quantize &quantize, Pool &pool);

} // namespace tk
