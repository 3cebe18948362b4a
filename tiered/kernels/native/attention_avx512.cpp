// Attention for AVX-512; see attention_item.h.

#include "attention_item.h"
#include "vector_avx512.h"

namespace tk {

namespace {

struct Attention512 : Avx512 {
    static constexpr int kQueries = 4; // times four keys: 16 sums
    static constexpr int kSums = 16;   // of 32 registers, in the weighted sum of values

    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F times_power(F a, F n) { return _mm512_scalef_ps(a, n); }
    static F unless_below(F x, float limit, F value) {
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, set(limit), _CMP_NLT_UQ), value);
    }
    static F choose(uint64_t bits, F value) {
        return _mm512_mask_mov_ps(set(-INFINITY), static_cast<__mmask16>(bits), value);
    }
    static float max_of(F a) { return _mm512_reduce_max_ps(a); }
    static float first_of(F a) { return _mm512_cvtss_f32(a); }
    static float half(uint16_t bits) { return _cvtsh_ss(bits); }

    static F widen_part(const uint16_t *bf16, int64_t count) {
        const __m256i bits = _mm256_maskz_loadu_epi16(first(count), bf16);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static F codes(const uint8_t *u8, int64_t count) {
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(count), u8)));
    }
    static F nibbles(const uint8_t *u8, int64_t count, bool high) {
        const __m512i both = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(count), u8));
        return _mm512_cvtepi32_ps(high ? _mm512_srli_epi32(both, 4) : _mm512_and_si512(both, _mm512_set1_epi32(15)));
    }
    // Of a group's nibbles with one scale and zero: a look-up takes the lowest four bits.
    struct Nibbles {
        F table;

        Nibbles(F scale, F zero) {
            const F codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            table = mul(sub(codes, zero), scale);
        }
        F at(const uint8_t *u8, int64_t count, bool high) const {
            const __m512i both = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(count), u8));
            return _mm512_permutexvar_ps(high ? _mm512_srli_epi32(both, 4) : both, table);
        }
    };
    static uint64_t nonzero(const uint8_t *u8, int64_t count) {
        const __m512i bytes = _mm512_maskz_loadu_epi8(~uint64_t(0) >> (64 - count), u8);
        return _mm512_test_epi8_mask(bytes, bytes);
    }

    // Each adds one half of a's lanes to the other, into the lower half, and b's into the upper half.
    static F fold8(F a, F b) {
        return add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    static F fold4(F a, F b) {
        return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    static F fold2(F a, F b) { return add(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee)); }
    static F fold1(F a, F b) { return add(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd)); }

    // Lane i: the sum of the lanes of sums[i], added in halves, whatever i is.
    static F reduce(const F *sums) {
        const F a = fold4(fold8(sums[0], sums[4]), fold8(sums[8], sums[12]));
        const F b = fold4(fold8(sums[2], sums[6]), fold8(sums[10], sums[14]));
        const F c = fold4(fold8(sums[1], sums[5]), fold8(sums[9], sums[13]));
        const F d = fold4(fold8(sums[3], sums[7]), fold8(sums[11], sums[15]));
        return fold1(fold2(a, c), fold2(b, d));
    }
    // Q rows, `ld` apart.
    template <int Q> static void put(float *to, int64_t ld, F value) {
        if constexpr (Q == 1) {
            store(to, value);
        } else if constexpr (Q == 2) {
            _mm256_storeu_ps(to, _mm512_castps512_ps256(value));
            _mm256_storeu_ps(to + ld, _mm512_extractf32x8_ps(value, 1));
        } else {
            _mm_storeu_ps(to, _mm512_castps512_ps128(value));
            _mm_storeu_ps(to + ld, _mm512_extractf32x4_ps(value, 1));
            _mm_storeu_ps(to + 2 * ld, _mm512_extractf32x4_ps(value, 2));
            _mm_storeu_ps(to + 3 * ld, _mm512_extractf32x4_ps(value, 3));
        }
    }
};

} // namespace

int attention_avx512(const Attention &attention, Pool &pool) { return attention_vector<Attention512>(attention, pool); }

} // namespace tk
