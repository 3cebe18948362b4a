// Products with a matrix for each head for AVX2 and FMA; see by_head_vector.h.

#include "by_head_vector.h"
#include "vector_avx2.h"

namespace tk {

int by_head_avx2(const ByHead &by_head, Pool &pool) { return by_head_of<Avx2>(by_head, pool); }

} // namespace tk
