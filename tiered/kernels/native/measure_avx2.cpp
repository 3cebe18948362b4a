#include "measure.h"

#include <immintrin.h>

namespace tk {

namespace {

constexpr int64_t kAhead = 4096; // bytes; the prefetchers of several processors stop at the end of a page
constexpr int kChains = 10;      // latency times throughput of an fma, with some to spare; 16 registers there are
constexpr int kSteps = 1 << 13;

} // namespace

uint64_t read_avx2(const uint8_t *data, int64_t nbytes) {
    __m256i sums[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int64_t start = 0; start < nbytes; start += sizeof sums) {
        const uint8_t *from = data + start;
        _mm_prefetch(reinterpret_cast<const char *>(from + kAhead), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char *>(from + kAhead + 64), _MM_HINT_T0);
        for (int i = 0; i < 4; i++) {
            const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + i * 32));
            sums[i] = _mm256_add_epi64(sums[i], words);
        }
    }
    uint64_t words[4], sum = 0;
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(words), sums[i]);
        for (uint64_t word : words) sum += word;
    }
    return sum;
}

int64_t multiply_avx2() {
    __m256 sums[kChains];
    for (int i = 0; i < kChains; i++) sums[i] = _mm256_set1_ps(static_cast<float>(i));
    __m256 factor = _mm256_set1_ps(0.5f);
    for (int step = 0; step < kSteps; step++) {
        __asm__ volatile("" : "+x"(factor)); // or the compiler would find the sums by itself
        for (int i = 0; i < kChains; i++) sums[i] = _mm256_fmadd_ps(sums[i], factor, factor);
    }
    for (int i = 0; i < kChains; i++) __asm__ volatile("" : : "x"(sums[i]));
    return int64_t{kSteps} * kChains * 8 * 2;
}

} // namespace tk
