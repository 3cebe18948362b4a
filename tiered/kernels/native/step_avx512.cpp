// Steps of recurrences for AVX-512; see step_vector.h.

#include "step_vector.h"
#include "vector_avx512.h"

namespace tk {

namespace {

struct Step512 : Avx512 {
    static constexpr int kColumns = 8; // vectors of sums and as many of changes, of 32 registers
};

} // namespace

int delta_step_avx512(const tk_delta_args &args, Pool &pool, const int32_t *cancel) {
    return delta_step_of<Step512>(args, pool, cancel);
}

int scan_step_avx512(const tk_scan_args &args, Pool &pool, const int32_t *cancel) {
    return scan_step_of<Step512>(args, pool, cancel);
}

} // namespace tk
