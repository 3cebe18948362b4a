// What the processor, the kernel and this build can run.
#pragma once

#include "tiered_kernels.h"

namespace tk {

// Null where `level` can run here, else the reason in a few words. AMX asks the kernel for its permission, which holds
// for threads started afterwards: call it before making a Pool.
const char *refusal(int level);

} // namespace tk
