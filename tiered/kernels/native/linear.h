// One linear layer as the levels see it, and the levels' entries. See pool.h about inline functions.
#pragma once

#include "pool.h"
#include "tiered_kernels.h"

namespace tk {

struct Linear {
    tk_weight w;
    int64_t row_nbytes; // of w.q
    int64_t groups;     // per row; 0 for TK_DENSE_BF16
    const uint16_t *x;
    int64_t rows, ldx;
    const void *bias;
    int32_t bias_dtype;
    void *y;
    int64_t ldy;
    int32_t y_dtype;
    int32_t mode;
    const int32_t *cancel;
    // Of TK_CODEBOOK in groups of 32 whose values are small multiples of one step, which integer kernels multiply:
    // values[i] is step * (steps[i] - zero_steps). Of any other the step is 0.
    float step;
    uint8_t steps[16], zero_steps;
};

// Each returns a tk_status.
int linear_scalar(const Linear &linear, Pool &pool);
int linear_avx2(const Linear &linear, Pool &pool);
int linear_avx512(const Linear &linear, Pool &pool);
int linear_amx(const Linear &linear, Pool &pool);

// With activations in 8 bits per group, see linear_fast_vector.h; for any number of rows, best for few.
int linear_fast_avx2(const Linear &linear, Pool &pool);
int linear_fast_avx512(const Linear &linear, Pool &pool);

// The same for more than a few rows, quantized weights only.
int linear_int8_avx512(const Linear &linear, Pool &pool);

// The invariant kernel of TK_AVX512 for quantized weights.
int linear_int16_avx512(const Linear &linear, Pool &pool);

} // namespace tk
