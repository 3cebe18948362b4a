// Scales of codebooks for AVX-512. Internal linkage throughout, see pool.h.
#pragma once

#include "tiered_kernels.h"

#include <immintrin.h>

namespace tk {
namespace {

// Those of groups `at` on in fp32, as their dtype says; 0 where the mask has none.
[[maybe_unused]] inline __m512 codebook_scales(const tk_weight &w, int64_t at, __mmask16 mask) {
    if (w.scale_dtype == TK_F16) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, w.scale + at));
    if (w.scale_dtype == TK_F32) return _mm512_maskz_loadu_ps(mask, reinterpret_cast<const float *>(w.scale) + at);
    const __m128i bytes = _mm_maskz_loadu_epi8(mask, reinterpret_cast<const uint8_t *>(w.scale) + at);
    const __m512i exponent = _mm512_cvtepu8_epi32(bytes), shifted = _mm512_slli_epi32(exponent, 23);
    const __mmask16 least = _mm512_mask_cmpeq_epi32_mask(mask, exponent, _mm512_setzero_si512()); // subnormal
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(exponent, _mm512_set1_epi32(255));
    const __m512i bits = _mm512_mask_mov_epi32(shifted, least, _mm512_set1_epi32(1 << 22));
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(0x7fc00000)));
}

} // namespace
} // namespace tk
