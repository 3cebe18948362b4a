// Steps of recurrences for AVX2 and FMA; see step_vector.h.

#include "step_vector.h"
#include "vector_avx2.h"

namespace tk {

namespace {

struct Step2 : Avx2 {
    static constexpr int kColumns = 4; // vectors of sums and as many of changes, of 16 registers
};

} // namespace

int delta_step_avx2(const tk_delta_args &args, Pool &pool, const int32_t *cancel) {
    return delta_step_of<Step2>(args, pool, cancel);
}

int scan_step_avx2(const tk_scan_args &args, Pool &pool, const int32_t *cancel) {
    return scan_step_of<Step2>(args, pool, cancel);
}

} // namespace tk
