// The fast mode's linear kernel for AVX-512 with VNNI, up to four tokens; see linear_fast_vector.h, and
// linear_int8_avx512.cpp for more of them.

#include "linear_fast_vector.h"
#include "vector_avx512.h"

namespace tk {

namespace {

struct FastAvx512 : Avx512 {
    static constexpr int kFastTokens = 4; // times four rows of weights: 16 of 32 registers

    // The first of `n` numbers in the first n-th of the lanes, and so on.
    template <int n> static F spread(const float *from) {
        if constexpr (n == 1) return _mm512_set1_ps(*from);
        if constexpr (n == 2) {
            const __m128 both = _mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double *>(from)));
            return _mm512_permutevar_ps(_mm512_broadcast_f32x2(both),
                                        _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1));
        }
        return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(from)),
                                    _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3));
    }

    static __m512i load_codes(const uint8_t *q, int64_t left) {
        return _mm512_maskz_loadu_epi8(left >= 64 ? ~0ull : (1ull << left) - 1, q);
    }
    static __m512i load_activations(const uint8_t *x) { return _mm512_loadu_si512(x); }
};

// A vector of codes; `place` puts 16 activations where the dot product with these codes expects them.
struct Codes4 {
    static constexpr int kWeights = 128, kNbytes = 64, kParts = 2, kActivationNbytes = 128;

    __m512i low, high;

    Codes4(const uint8_t *q, int64_t left) {
        const __m512i both = FastAvx512::load_codes(q, left), mask = _mm512_set1_epi8(15);
        low = _mm512_and_si512(both, mask);
        high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
    }
    __m512 dot(const uint8_t *x) const {
        const __m512i part = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low, FastAvx512::load_activations(x));
        return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(part, high, FastAvx512::load_activations(x + 64)));
    }
    static void place(const int8_t *from, uint8_t *strip, int part, int byte) {
        std::memcpy(strip + part * kNbytes + byte, from, 16);
    }
};

struct Codes8 {
    static constexpr int kWeights = 64, kNbytes = 64, kParts = 1, kActivationNbytes = 64;

    __m512i codes;

    Codes8(const uint8_t *q, int64_t left) : codes(FastAvx512::load_codes(q, left)) {}
    __m512 dot(const uint8_t *x) const {
        return _mm512_cvtepi32_ps(
            _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, FastAvx512::load_activations(x)));
    }
    static void place(const int8_t *from, uint8_t *strip, int, int byte) { std::memcpy(strip + byte, from, 16); }
};

} // namespace

int linear_fast_avx512(const Linear &linear, Pool &pool) {
    // From here on transposing the codes pays.
    const bool transposed = linear.w.format != TK_DENSE_BF16 && linear.rows > FastAvx512::kFastTokens;
    if (transposed) return linear_int8_avx512(linear, pool);
    if (linear.w.format == TK_INT4) return linear_fast_vector<FastAvx512, Codes4>(linear, pool);
    if (linear.w.format == TK_INT8) return linear_fast_vector<FastAvx512, Codes8>(linear, pool);
    Linear exact = linear; // weights without groups, or looked up
    exact.mode = TK_INVARIANT;
    return linear_avx512(exact, pool);
}

} // namespace tk
