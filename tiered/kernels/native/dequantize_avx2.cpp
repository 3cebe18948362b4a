// Dequantization for AVX2; see dequantize_rows.h.

#include "codebook_avx2.h"
#include "dequantize_rows.h"

#include <immintrin.h>

namespace tk {

namespace {

struct DequantizeAvx2 {
    using Codes = __m256i;
    static constexpr int kLanes = 8;

    struct Factors {
        __m256 scale, zero;
        Factors(float scale, float zero) : scale(_mm256_set1_ps(scale)), zero(_mm256_set1_ps(zero)) {}
        __m256 weights(Codes codes) const {
            return _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(codes), zero), scale);
        }
    };

    using Table = NibbleTable;

    static Codes codes(const uint8_t *q) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(q)));
    }
    static Codes low(Codes both) { return _mm256_and_si256(both, _mm256_set1_epi32(15)); }
    static Codes high(Codes both) { return _mm256_srli_epi32(both, 4); }
    static void store(float *out, __m256 values) { _mm256_storeu_ps(out, values); }
    static void store(uint16_t *out, __m256 values) {
        const __m256i bits = _mm256_castps_si256(values);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i even = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd); // halves to even
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
        const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(even, quiet, nan), 16);
        const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(out), packed);
    }
};

} // namespace

void dequantize_avx2(Dequantize &dequantize, Pool &pool) { dequantize_with<DequantizeAvx2>(dequantize, pool); }

} // namespace tk
