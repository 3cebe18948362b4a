// Dequantization for AVX-512; see dequantize_rows.h.

#include "dequantize_rows.h"

#include <immintrin.h>

namespace tk {

namespace {

struct DequantizeAvx512 {
    using Codes = __m512i;
    static constexpr int kLanes = 16;

    struct Factors {
        __m512 scale, zero;
        Factors(float scale, float zero) : scale(_mm512_set1_ps(scale)), zero(_mm512_set1_ps(zero)) {}
        __m512 weights(Codes codes) const {
            return _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(codes), zero), scale);
        }
    };

    struct Table {
        __m512 values;
        Table(const float *values, float scale) : values(_mm512_mul_ps(_mm512_loadu_ps(values), _mm512_set1_ps(scale))) {}
        __m512 weights(Codes codes) const { return _mm512_permutexvar_ps(codes, values); }
    };

    static Codes codes(const uint8_t *q) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(q)));
    }
    static Codes low(Codes both) { return _mm512_and_si512(both, _mm512_set1_epi32(15)); }
    static Codes high(Codes both) { return _mm512_srli_epi32(both, 4); }
    static void store(float *out, __m512 values) { _mm512_storeu_ps(out, values); }
    static void store(uint16_t *out, __m512 values) {
        const __m512i bits = _mm512_castps_si512(values);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i even = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd); // halves to even
        const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
        const __m512i kept = _mm512_mask_or_epi32(even, nan, bits, _mm512_set1_epi32(0x400000));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
    }
};

} // namespace

void dequantize_avx512(Dequantize &dequantize, Pool &pool) { dequantize_with<DequantizeAvx512>(dequantize, pool); }

} // namespace tk
