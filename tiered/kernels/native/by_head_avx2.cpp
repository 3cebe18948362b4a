// Products with a matrix for each head for AVX2 and FMA; see by_head_vector.h.

#include "by_head_vector.h"
#include "vector_avx2.h"

namespace tk {

namespace {

struct Head : Avx2 {
    static F set(float value) { return _mm256_set1_ps(value); }
};

} // namespace

int by_head_avx2(const ByHead &by_head, Pool &pool) { return by_head_of<Head>(by_head, pool); }

} // namespace tk
