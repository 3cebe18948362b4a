// The processor's limits as the levels reach them, for benchmarks. See pool.h about inline functions.
#pragma once

#include <cstdint>

namespace tk {

// Sum of the 64-bit words of `nbytes` at `data`, a multiple of 4096.
using ReadFunction = uint64_t (*)(const uint8_t *data, int64_t nbytes);
uint64_t read_scalar(const uint8_t *data, int64_t nbytes);
uint64_t read_avx2(const uint8_t *data, int64_t nbytes);
uint64_t read_avx512(const uint8_t *data, int64_t nbytes);

// Multiplies and adds registers for some microseconds; returns how many floating-point operations that were.
using MultiplyFunction = int64_t (*)();
int64_t multiply_avx2();
int64_t multiply_avx512();
int64_t multiply_amx();

class Pool;

// All of it with all threads.
uint64_t read_all(Pool &pool, ReadFunction function, const uint8_t *data, int64_t nbytes);
int64_t multiply_all(Pool &pool, MultiplyFunction function, int64_t items);

} // namespace tk
