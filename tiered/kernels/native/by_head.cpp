// Products with a matrix for each head in plain C++, and the choice of a level.

#include "by_head_vector.h"

namespace tk {

int by_head_scalar(const ByHead &by_head, Pool &pool) { return by_head_of<Plain>(by_head, pool); }

int by_head(const ByHead &by_head, int level, Pool &pool) {
    switch (level) {
#if defined(__x86_64__)
        case TK_AVX2: return by_head_avx2(by_head, pool);
        case TK_AVX512:
        case TK_AMX: return by_head_avx512(by_head, pool);
#endif
        default: return by_head_scalar(by_head, pool);
    }
}

} // namespace tk
