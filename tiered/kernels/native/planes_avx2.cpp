// Decoding frames with AVX2 and BMI2; see planes.h.

#include "planes.h"

#include <immintrin.h>

namespace tk {

namespace {

struct PlanesAvx2 {
    struct Table {
        __m256i highs;
        explicit Table(const uint8_t *table)
            : highs(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(table)))) {}
    };

    static uint64_t spread(uint64_t bits, uint64_t mask) { return _pdep_u64(bits, mask); }

    // Byte i: `value` where bit i of `bits` is set, else 0.
    static __m256i bytes(uint32_t bits, int value) {
        const __m256i places = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
        const __m256i each = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
        const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), places);
        const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, each), each);
        return _mm256_and_si256(set, _mm256_set1_epi8(static_cast<char>(value)));
    }

    static __m256i rotated(__m256i words) {
        return _mm256_or_si256(_mm256_srli_epi16(words, 1), _mm256_slli_epi16(words, 15));
    }

    static void group(const Table &table, const uint8_t *low, const uint64_t *bits, int extra, uint16_t *out) {
        constexpr int kValues[] = {1, 2, 1, 2, 4}; // a longer code is 3, from its first two bits, and the other three
        for (int half = 0; half < 2; ++half) {
            __m256i code = _mm256_setzero_si256();
            for (int i = 0; i < 5; ++i) {
                code = _mm256_add_epi8(code, bytes(static_cast<uint32_t>(bits[i] >> 32 * half), kValues[i]));
            }
            __m256i high = _mm256_shuffle_epi8(table.highs, code);
            for (int i = 0; i < extra; ++i) {
                high = _mm256_or_si256(high, bytes(static_cast<uint32_t>(bits[5 + i] >> 32 * half), 1 << i));
            }
            const __m256i lows = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(low + 32 * half));
            const __m256i even = rotated(_mm256_unpacklo_epi8(lows, high));
            const __m256i odd = rotated(_mm256_unpackhi_epi8(lows, high));
            __m256i *to = reinterpret_cast<__m256i *>(out + 32 * half);
            _mm256_storeu_si256(to, _mm256_permute2x128_si256(even, odd, 0x20));
            _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(even, odd, 0x31));
        }
    }
};

} // namespace

bool decode_planes_avx2(const Planes &planes, uint16_t *out) { return decode_planes_with<PlanesAvx2>(planes, out); }

} // namespace tk
