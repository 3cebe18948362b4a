// Small pieces that the AVX-512 and AMX files share. Internal linkage throughout; see pool.h.
#pragma once

#include "codebook_avx512.h"
#include "linear.h"

#include <cstdint>
#include <immintrin.h>

#define TK_INLINE inline __attribute__((always_inline))

namespace tk {
namespace {

[[maybe_unused]] TK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
[[maybe_unused]] TK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Masks of the first `count` lanes.
[[maybe_unused]] TK_INLINE __mmask16 first16(int64_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}
[[maybe_unused]] TK_INLINE __mmask32 first32(int64_t count) {
    return count >= 32 ? ~0u : count <= 0 ? 0 : static_cast<__mmask32>((1u << count) - 1);
}
[[maybe_unused]] TK_INLINE __mmask64 first64(int64_t count) {
    return count >= 64 ? ~0ull : count <= 0 ? 0 : (1ull << count) - 1;
}

[[maybe_unused]] TK_INLINE __m512 widen_bf16(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Rounded to nearest, ties to even; without the BF16 instructions, which treat subnormals as zero.
[[maybe_unused]] TK_INLINE __m256i narrow_bf16(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}

// Results o .. o + 15 of row `row` of y: bias added, rounded if y is bf16.
[[maybe_unused]] TK_INLINE void put16(const Linear &l, int64_t row, int64_t o, __m512 value) {
    const __mmask16 mask = first16(l.w.out - o);
    if (l.bias && l.bias_dtype == TK_F32) {
        value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, static_cast<const float *>(l.bias) + o));
    } else if (l.bias) {
        const __m256i bits = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t *>(l.bias) + o);
        value = _mm512_add_ps(value, widen_bf16(bits));
    }
    const int64_t at = row * l.ldy + o;
    if (l.y_dtype == TK_F32) {
        _mm512_mask_storeu_ps(static_cast<float *>(l.y) + at, mask, value);
    } else {
        _mm256_mask_storeu_epi16(static_cast<uint16_t *>(l.y) + at, mask, narrow_bf16(value));
    }
}

// `run` on at most `most` rows of x at a time, which bounds the scratch; ends with the first status that is not TK_OK.
template <class Run> TK_INLINE int in_parts(const Linear &whole, int64_t most, Run run) {
    Linear part = whole;
    for (int64_t row = 0; row < whole.rows; row += most) {
        part.rows = least(most, whole.rows - row);
        part.x = whole.x + row * whole.ldx;
        part.y = static_cast<uint8_t *>(whole.y) + row * whole.ldy * (whole.y_dtype == TK_F32 ? 4 : 2);
        if (const int status = run(part)) return status;
    }
    return TK_OK;
}

// 16 vectors of 16 words as a matrix, transposed in place.
[[maybe_unused]] TK_INLINE void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i + 0] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

} // namespace
} // namespace tk
