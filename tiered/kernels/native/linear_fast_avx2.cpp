// The fast mode's linear kernel for AVX2; see linear_fast_vector.h.

#include "linear_fast_vector.h"
#include "vector_avx2.h"

namespace tk {

namespace {

struct FastAvx2 : Avx2 {
    static constexpr int kFastTokens = 2; // times four rows of weights: 8 of 16 registers

    // The first of `n` numbers in the first n-th of the lanes, and so on.
    template <int n> static F spread(const float *from) {
        static_assert(n <= 2, "32 bytes of codes are two groups at most");
        if constexpr (n == 1) return _mm256_set1_ps(*from);
        const __m256 both = _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double *>(from)));
        return _mm256_permutevar_ps(both, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
    }

    static __m256i load(const void *from) { return _mm256_loadu_si256(static_cast<const __m256i *>(from)); }
    static F load(const float *from) { return Avx2::load(from); }
    static __m128i load_half(const void *from) { return _mm_loadu_si128(static_cast<const __m128i *>(from)); }
};

// A vector of codes; `place` puts 16 activations where the dot product with these codes expects them.
struct Codes4 {
    static constexpr int kWeights = 64, kNbytes = 32, kParts = 2, kActivationNbytes = 64;

    __m256i low, high;

    Codes4(const uint8_t *q, int64_t left) {
        // What is left of a row is a whole vector, or half of one.
        const __m256i both = left >= kNbytes ? FastAvx2::load(static_cast<const void *>(q))
                                             : _mm256_zextsi128_si256(FastAvx2::load_half(q));
        const __m256i mask = _mm256_set1_epi8(15);
        low = _mm256_and_si256(both, mask);
        high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
    }
    __m256 dot(const uint8_t *x) const {
        // Four products of at most 15 * 127 fit 16 bits.
        const __m256i pairs =
            _mm256_add_epi16(_mm256_maddubs_epi16(low, FastAvx2::load(static_cast<const void *>(x))),
                             _mm256_maddubs_epi16(high, FastAvx2::load(static_cast<const void *>(x + 32))));
        return _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static void place(const int8_t *from, uint8_t *strip, int part, int byte) {
        std::memcpy(strip + part * kNbytes + byte, from, 16);
    }
};

// Codes up to 255 would saturate a sum of two products in 16 bits: here both sides are 16 bits wide.
struct Codes8 {
    static constexpr int kWeights = 32, kNbytes = 32, kParts = 1, kActivationNbytes = 64;

    __m256i first, second;

    Codes8(const uint8_t *q, int64_t)
        : first(_mm256_cvtepu8_epi16(FastAvx2::load_half(q))),
          second(_mm256_cvtepu8_epi16(FastAvx2::load_half(q + 16))) {}
    __m256 dot(const uint8_t *x) const {
        return _mm256_cvtepi32_ps(
            _mm256_add_epi32(_mm256_madd_epi16(first, FastAvx2::load(static_cast<const void *>(x))),
                             _mm256_madd_epi16(second, FastAvx2::load(static_cast<const void *>(x + 32)))));
    }
    static void place(const int8_t *from, uint8_t *strip, int, int byte) {
        const __m256i wide = _mm256_cvtepi8_epi16(FastAvx2::load_half(from));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(strip + byte * 2), wide);
    }
};

} // namespace

int linear_fast_avx2(const Linear &linear, Pool &pool) {
    if (linear.w.format == TK_INT4) return linear_fast_vector<FastAvx2, Codes4>(linear, pool);
    if (linear.w.format == TK_INT8) return linear_fast_vector<FastAvx2, Codes8>(linear, pool);
    Linear exact = linear; // weights without groups, or looked up
    exact.mode = TK_INVARIANT;
    return linear_avx2(exact, pool);
}

} // namespace tk
