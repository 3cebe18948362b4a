// Products with a matrix for each head, of numbers that are dense already: what latent attention makes of its queries,
// and of what attention returns. See pool.h about inline functions.
#pragma once

#include "pool.h"

namespace tk {

struct ByHead {
    const float *w; // [heads, rows, in], from one head to the next `w_stride`
    int64_t heads, rows, in, w_stride;
    bool transposed;
    const uint16_t *x; // [tokens, heads, rows] where transposed, else [tokens, heads, in]
    int64_t tokens, x_stride[2];
    uint16_t *y; // [tokens, heads, in] where transposed, else [tokens, heads, rows]
    int64_t y_stride[2];
    const int32_t *cancel;
};

// Each returns a tk_status.
int by_head_scalar(const ByHead &by_head, Pool &pool);
int by_head_avx2(const ByHead &by_head, Pool &pool);
int by_head_avx512(const ByHead &by_head, Pool &pool);

// At `level`.
int by_head(const ByHead &by_head, int level, Pool &pool);

} // namespace tk
