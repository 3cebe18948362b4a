// Products with a matrix for each head for AVX-512; see by_head_vector.h.

#include "by_head_vector.h"
#include "vector_avx512.h"

namespace tk {

namespace {

struct Head : Avx512 {
    static F set(float value) { return _mm512_set1_ps(value); }
};

} // namespace

int by_head_avx512(const ByHead &by_head, Pool &pool) { return by_head_of<Head>(by_head, pool); }

} // namespace tk
