// Codebooks for AVX2: 16 fp32 values looked up by nibbles. Internal linkage throughout, see pool.h.
#pragma once

#include <immintrin.h>

namespace tk {
namespace {

struct NibbleTable {
    __m256 low, high; // of codes below 8, and of the others

    NibbleTable(const float *values, float scale)
        : low(_mm256_mul_ps(_mm256_loadu_ps(values), _mm256_set1_ps(scale))),
          high(_mm256_mul_ps(_mm256_loadu_ps(values + 8), _mm256_set1_ps(scale))) {}

    // A look-up takes the lowest three bits; the fourth chooses between two.
    __m256 weights(__m256i codes) const {
        const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes), is_high);
    }
};

} // namespace
} // namespace tk
