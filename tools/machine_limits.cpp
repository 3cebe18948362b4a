// Memory read as fast as a processor can, and arithmetic that waits for no memory: one thread's share of either.
// Compiled and called by machine_limits.py. `level` is a tk_level of the package's kernels that can run here.

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

enum { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

uint64_t read_scalar(const uint8_t *data, int64_t nbytes) {
    uint64_t sums[8] = {};
    for (int64_t start = 0; start < nbytes; start += sizeof sums) {
        for (int i = 0; i < 8; i++) {
            uint64_t word;
            std::memcpy(&word, data + start + i * 8, sizeof word);
            sums[i] += word;
        }
    }
    uint64_t sum = 0;
    for (uint64_t each : sums) sum += each;
    return sum;
}

#if defined(__x86_64__)

constexpr int64_t kAhead = 4096; // bytes; the prefetchers of several processors stop at the end of a page

__attribute__((target("avx2"))) uint64_t read_avx2(const uint8_t *data, int64_t nbytes) {
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

__attribute__((target("avx512f"))) uint64_t read_avx512(const uint8_t *data, int64_t nbytes) {
    __m512i sums[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t start = 0; start < nbytes; start += sizeof sums) {
        for (int i = 0; i < 4; i++) {
            const uint8_t *from = data + start + i * 64;
            _mm_prefetch(reinterpret_cast<const char *>(from + kAhead), _MM_HINT_T0);
            sums[i] = _mm512_add_epi64(sums[i], _mm512_loadu_si512(from));
        }
    }
    uint64_t words[8], sum = 0;
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(words, sums[i]);
        for (uint64_t word : words) sum += word;
    }
    return sum;
}

// Each returns how many floating-point operations it did, in some microseconds.

__attribute__((target("avx2,fma"))) int64_t multiply_avx2() {
    constexpr int kChains = 10; // latency times throughput of an fma, with some to spare; 16 registers there are
    constexpr int kSteps = 1 << 13;
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

__attribute__((target("avx512f"))) int64_t multiply_avx512() {
    constexpr int kChains = 16;
    constexpr int kSteps = 1 << 12;
    __m512 sums[kChains];
    for (int i = 0; i < kChains; i++) sums[i] = _mm512_set1_ps(static_cast<float>(i));
    __m512 factor = _mm512_set1_ps(0.5f);
    for (int step = 0; step < kSteps; step++) {
        __asm__ volatile("" : "+v"(factor));
        for (int i = 0; i < kChains; i++) sums[i] = _mm512_fmadd_ps(sums[i], factor, factor);
    }
    for (int i = 0; i < kChains; i++) __asm__ volatile("" : : "v"(sums[i]));
    return int64_t{kSteps} * kChains * 16 * 2;
}

struct TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t columns_nbytes[16];
    uint8_t rows[16];
};

__attribute__((target("amx-tile,amx-bf16"))) int64_t multiply_amx() {
    constexpr int kSteps = 1 << 10;
    alignas(64) TileConfig config = {};
    alignas(64) uint16_t values[512];
    for (int i = 0; i < 512; i++) values[i] = static_cast<uint16_t>(0x3f80 + i % 128); // 1 to 2; zeros cost less power
    config.palette = 1;
    for (int tile = 0; tile < 8; tile++) {
        config.columns_nbytes[tile] = 64;
        config.rows[tile] = 16;
    }
    // GCC 12 does not know that the next lines read all of `config` and `values`.
    __asm__ volatile("" : : "r"(&config), "r"(values) : "memory");
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, values, 64);
    _tile_loadd(5, values, 64);
    _tile_loadd(6, values, 64);
    _tile_loadd(7, values, 64);
    for (int step = 0; step < kSteps; step++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return int64_t{kSteps} * 4 * (16 * 16 * 32 * 2);
}

#endif

} // namespace

// The sum of the 64-bit words of `nbytes` at `data`, a multiple of 4096.
extern "C" uint64_t read_words(const uint8_t *data, int64_t nbytes, int32_t level) {
#if defined(__x86_64__)
    if (level >= kAvx512) return read_avx512(data, nbytes);
    if (level == kAvx2) return read_avx2(data, nbytes);
#endif
    (void)level;
    return read_scalar(data, nbytes);
}

// Multiplies and adds in registers, `items` times; returns the operations done, 0 where the level has no instructions.
extern "C" int64_t multiply(int64_t items, int32_t level) {
    int64_t operations = 0;
#if defined(__x86_64__)
    for (; items > 0; items--) {
        if (level == kAvx2) operations += multiply_avx2();
        if (level == kAvx512) operations += multiply_avx512();
        if (level == kAmx) operations += multiply_amx();
    }
#endif
    (void)items, (void)level;
    return operations;
}
