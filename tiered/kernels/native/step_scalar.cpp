// Steps of recurrences in plain C++.

#include "step_vector.h"

namespace tk {

namespace {

struct Step : Plain {
    static constexpr int kColumns = 2;
};

} // namespace

int delta_step_scalar(const tk_delta_args &args, Pool &pool, const int32_t *cancel) {
    return delta_step_of<Step>(args, pool, cancel);
}

int scan_step_scalar(const tk_scan_args &args, Pool &pool, const int32_t *cancel) {
    return scan_step_of<Step>(args, pool, cancel);
}

} // namespace tk
