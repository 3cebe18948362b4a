// Attention for AVX2, FMA and F16C; see attention_item.h.

#include "attention_item.h"
#include "vector_avx2.h"

namespace tk {

namespace {

struct Attention2 : Avx2 {
    static constexpr int kQueries = 2; // times four keys: 8 sums
    static constexpr int kSums = 8;    // of 16 registers, in the weighted sum of values

    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F min(F a, F b) { return _mm256_min_ps(a, b); }
    static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F times_power(F a, F n) {
        const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        return mul(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
    }
    static F unless_below(F x, float limit, F value) {
        return _mm256_and_ps(_mm256_cmp_ps(x, set(limit), _CMP_NLT_UQ), value);
    }
    static F choose(uint64_t bits, F value) {
        const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        const __m256i set_bits = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits & 255)), lane);
        return _mm256_blendv_ps(set(-INFINITY), value, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set_bits, lane)));
    }
    static float max_of(F a) {
        __m128 most = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        most = _mm_max_ps(most, _mm_movehl_ps(most, most));
        return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
    }
    static float first_of(F a) { return _mm256_cvtss_f32(a); }
    static float half(uint16_t bits) { return _cvtsh_ss(bits); }

    // A head_dim is a multiple of 8: there are no parts of vectors, except of four nibbles or codes.
    static F widen_part(const uint16_t *bf16, int64_t) { return widen(bf16); }
    static __m256i bytes(const uint8_t *u8, int64_t count) {
        if (count == kLanes) return Avx2::codes(u8);
        int four;
        std::memcpy(&four, u8, sizeof four);
        return _mm256_cvtepu8_epi32(_mm_cvtsi32_si128(four));
    }
    static F codes(const uint8_t *u8, int64_t count) { return _mm256_cvtepi32_ps(bytes(u8, count)); }
    static F nibbles(const uint8_t *u8, int64_t count, bool high) {
        const __m256i both = bytes(u8, count);
        return _mm256_cvtepi32_ps(high ? _mm256_srli_epi32(both, 4) : _mm256_and_si256(both, _mm256_set1_epi32(15)));
    }
    using Nibbles = PlainNibbles<Attention2>;
    static uint64_t nonzero(const uint8_t *u8, int64_t count) {
        uint64_t bits = 0;
        int64_t i = 0;
        for (; i + 32 <= count; i += 32) {
            const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(u8 + i));
            const __m256i zero = _mm256_cmpeq_epi8(bytes, _mm256_setzero_si256());
            bits |= static_cast<uint64_t>(~static_cast<uint32_t>(_mm256_movemask_epi8(zero))) << i;
        }
        for (; i < count; i++) bits |= static_cast<uint64_t>(u8[i] != 0) << i;
        return bits;
    }

    static F fold4(F a, F b) {
        return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    }
    static F fold2(F a, F b) { return add(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee)); }
    static F fold1(F a, F b) { return add(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd)); }

    // Lane i: the sum of the lanes of sums[i], added in halves, whatever i is.
    static F reduce(const F *sums) {
        const F a = fold4(sums[0], sums[4]), b = fold4(sums[2], sums[6]);
        const F c = fold4(sums[1], sums[5]), d = fold4(sums[3], sums[7]);
        return fold1(fold2(a, c), fold2(b, d));
    }
    // Q rows, `ld` apart.
    template <int Q> static void put(float *to, int64_t ld, F value) {
        if constexpr (Q == 1) {
            store(to, value);
        } else {
            _mm_storeu_ps(to, _mm256_castps256_ps128(value));
            _mm_storeu_ps(to + ld, _mm256_extractf128_ps(value, 1));
        }
    }
};

} // namespace

int attention_avx2(const Attention &attention, Pool &pool) { return attention_vector<Attention2>(attention, pool); }

} // namespace tk
