// The linear kernel for AVX-512; see linear_vector.h.

#include "linear_vector.h"
#include "vector_avx512.h"

namespace tk {

int linear_avx512(const Linear &linear, Pool &pool) {
    const bool in_steps = linear.w.format != TK_CODEBOOK || linear.step != 0;
    if (linear.w.format == TK_DENSE_BF16 || !in_steps) return linear_vector<Avx512>(linear, pool);
    return linear.mode == TK_FAST ? linear_fast_avx512(linear, pool) : linear_int16_avx512(linear, pool);
}

} // namespace tk
