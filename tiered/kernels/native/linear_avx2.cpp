// The linear kernel for AVX2 with FMA and F16C; see linear_vector.h.

#include "linear_vector.h"
#include "vector_avx2.h"

namespace tk {

int linear_avx2(const Linear &linear, Pool &pool) {
    // The fast kernel has been measured to be faster at up to 64 rows; more were not compared.
    const bool fast = linear.mode == TK_FAST && (linear.w.format == TK_INT4 || linear.w.format == TK_INT8);
    return fast ? linear_fast_avx2(linear, pool) : linear_vector<Avx2>(linear, pool);
}

} // namespace tk
