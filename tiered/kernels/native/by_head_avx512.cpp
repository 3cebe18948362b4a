// Products with a matrix for each head for AVX-512; see by_head_vector.h.

#include "by_head_vector.h"
#include "vector_avx512.h"

namespace tk {

int by_head_avx512(const ByHead &by_head, Pool &pool) { return by_head_of<Avx512>(by_head, pool); }

} // namespace tk
