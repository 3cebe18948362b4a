// A single token through layers that keep a state of fixed size, as the levels see it. See pool.h about inline functions.
//
// Each step reads and writes a state once, which is all that it costs: what is small (decays, gates) comes ready in fp32.
#pragma once

#include "pool.h"
#include "tiered_kernels.h"

namespace tk {

bool is_valid(const tk_delta_args &args);
bool is_valid(const tk_scan_args &args);
bool is_valid(const tk_conv_args &args);

// Each returns a tk_status.
int delta_step_scalar(const tk_delta_args &args, Pool &pool, const int32_t *cancel);
int delta_step_avx2(const tk_delta_args &args, Pool &pool, const int32_t *cancel);
int delta_step_avx512(const tk_delta_args &args, Pool &pool, const int32_t *cancel);
int scan_step_scalar(const tk_scan_args &args, Pool &pool, const int32_t *cancel);
int scan_step_avx2(const tk_scan_args &args, Pool &pool, const int32_t *cancel);
int scan_step_avx512(const tk_scan_args &args, Pool &pool, const int32_t *cancel);

// At `level`; the convolution is the same at every level.
int delta_step(const tk_delta_args &args, int level, Pool &pool, const int32_t *cancel);
int scan_step(const tk_scan_args &args, int level, Pool &pool, const int32_t *cancel);
int conv(const tk_conv_args &args, Pool &pool, const int32_t *cancel);

} // namespace tk
