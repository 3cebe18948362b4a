#include "measure.h"

#include <immintrin.h>

namespace tk {

namespace {

constexpr int64_t kAhead = 4096; // bytes; the prefetchers of several processors stop at the end of a page
constexpr int kChains = 16;
constexpr int kSteps = 1 << 12;

} // namespace

uint64_t read_avx512(const uint8_t *data, int64_t nbytes) {
    __m512i sums[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t start = 0; start < nbytes; start += sizeof sums) {
        for (int i = 0; i < 4; i++) {
            const uint8_t *from = data + start + i * 64;
            _mm_prefetch(reinterpret_cast<const char *>(from + kAhead), _MM_HINT_T0);
            sums[i] = _mm512_add_epi64(sums[i], _mm512_loadu_si512(from));
        }
    }
    const __m512i sum = _mm512_add_epi64(_mm512_add_epi64(sums[0], sums[1]), _mm512_add_epi64(sums[2], sums[3]));
    return static_cast<uint64_t>(_mm512_reduce_add_epi64(sum));
}

int64_t multiply_avx512() {
    __m512 sums[kChains];
    for (int i = 0; i < kChains; i++) sums[i] = _mm512_set1_ps(static_cast<float>(i));
    __m512 factor = _mm512_set1_ps(0.5f);
    for (int step = 0; step < kSteps; step++) {
        __asm__ volatile("" : "+v"(factor)); // or the compiler would find the sums by itself
        for (int i = 0; i < kChains; i++) sums[i] = _mm512_fmadd_ps(sums[i], factor, factor);
    }
    for (int i = 0; i < kChains; i++) __asm__ volatile("" : : "v"(sums[i]));
    return int64_t{kSteps} * kChains * 16 * 2;
}

} // namespace tk
