// Rows of a quantized weight in plain numbers, as the levels see it, and the levels' entries. See pool.h about inline
// functions.
#pragma once

#include "pool.h"
#include "tiered_kernels.h"

namespace tk {

struct Dequantize {
    tk_weight w;
    int64_t row_nbytes; // of w.q
    int64_t groups;     // per row
    int64_t first, rows;
    void *out; // [rows, in]
    int32_t dtype;
    int64_t item_rows;
};

// Each value is scale * (code - zero) in fp32, which is exact, or scale * values[code], rounded once more to bf16 where
// that is asked for: the bits of tiered.quant.dequantize.
void dequantize_scalar(Dequantize &dequantize, Pool &pool);
void dequantize_avx2(Dequantize &dequantize, Pool &pool);
void dequantize_avx512(Dequantize &dequantize, Pool &pool);

} // namespace tk
