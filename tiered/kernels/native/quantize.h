// Weights to codes as the levels see it, and the levels' entries. See pool.h about inline functions.
//
// The arithmetic is that of tiered/quant/quantize.py, bit for bit: fp32, every operation rounded on its own.
#pragma once

#include "pool.h"
#include "tiered_kernels.h"

namespace tk {

struct Quantize {
    const unsigned char *weight;
    int32_t dtype;
    int64_t row_nbytes; // from one row of `weight` to the next
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

// Each returns a tk_status.
int quantize_scalar(Quantize &quantize, Pool &pool);
int quantize_avx2(Quantize &quantize, Pool &pool);
int quantize_avx512(Quantize &quantize, Pool &pool);

} // namespace tk
