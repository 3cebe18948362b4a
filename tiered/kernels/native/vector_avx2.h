// AVX2 with FMA and F16C as the kernels' templates see it: vectors of 8 fp32, and stored weights as such vectors.
// Internal linkage throughout, see pool.h.
#pragma once

#include "codebook_avx2.h"
#include "numbers.h"

#include <immintrin.h>

namespace tk {
namespace {

struct Avx2 {
    using F = __m256;
    static constexpr int kLanes = 8;
    static constexpr int kTokens = 3; // times four rows of weights: 12 of 16 registers

    static F zero() { return _mm256_setzero_ps(); }
    static F set(float value) { return _mm256_set1_ps(value); }
    static F load(const float *from) { return _mm256_loadu_ps(from); }
    static void store(float *to, F value) { _mm256_storeu_ps(to, value); }
    static F multiply(F a, F b) { return _mm256_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
    static F widen(const uint16_t *bf16) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i *>(bf16));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }

    // The lanes of each, added, to sums[0..3].
    static void add_sums(float *sums, F a, F b, F c, F d) {
        const F each = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(each), _mm256_extractf128_ps(each, 1));
        _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), four));
    }

    static __m256i codes(const uint8_t *u8) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(u8)));
    }

    // Up to 8 groups' scales and zeros in fp32; 0 beyond `count`.
    static F scales(const uint16_t *fp16, int64_t count) {
        uint16_t some[kLanes] = {};
        if (count < kLanes) std::memcpy(some, fp16, static_cast<size_t>(count) * sizeof(uint16_t));
        const void *from = count < kLanes ? some : fp16;
        return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i *>(from)));
    }
    static F zeros(const uint8_t *u8, int64_t count) {
        uint8_t some[kLanes] = {};
        if (count < kLanes) std::memcpy(some, u8, static_cast<size_t>(count));
        return _mm256_cvtepi32_ps(codes(count < kLanes ? some : u8));
    }

    // Of a codebook's weight those of groups `at` on, as its dtype says.
    static F codebook_scales(const tk_weight &w, int64_t at, int64_t count) {
        if (w.scale_dtype == TK_F16) return scales(w.scale + at, count);
        if (w.scale_dtype == TK_F32) {
            float some[kLanes] = {};
            const float *from = reinterpret_cast<const float *>(w.scale) + at;
            if (count < kLanes) std::memcpy(some, from, static_cast<size_t>(count) * sizeof(float));
            return load(count < kLanes ? some : from);
        }
        uint8_t some[kLanes] = {};
        const uint8_t *from = reinterpret_cast<const uint8_t *>(w.scale) + at;
        if (count < kLanes) std::memcpy(some, from, static_cast<size_t>(count));
        const __m256i exponent = codes(count < kLanes ? some : from);
        const __m256i is_least = _mm256_cmpeq_epi32(exponent, _mm256_setzero_si256()); // which is subnormal
        const __m256i is_nan = _mm256_cmpeq_epi32(exponent, _mm256_set1_epi32(255));
        const __m256i bits = _mm256_blendv_epi8(_mm256_slli_epi32(exponent, 23), _mm256_set1_epi32(1 << 22), is_least);
        return _mm256_castsi256_ps(_mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7fc00000), is_nan));
    }

    // A unit's weights vector by vector; vector s holds those from position(s) on.
    template <int group> struct Int4 {
        static constexpr bool kScaled = true, kLookedUp = false;
        static constexpr int kWeights = group, kNbytes = group / 2;
        static constexpr int position(int s) { return s % 2 * (group / 2) + s / 2 * kLanes; }

        const uint8_t *q;
        F scale, offset;

        Int4(const uint8_t *q, float scale, float offset)
            : q(q), scale(_mm256_set1_ps(scale)), offset(_mm256_set1_ps(offset)) {}
        F at(int s) const {
            const __m256i both = codes(q + s / 2 * kLanes);
            const __m256i one = s % 2 ? _mm256_srli_epi32(both, 4) : _mm256_and_si256(both, _mm256_set1_epi32(15));
            return fma(_mm256_cvtepi32_ps(one), scale, offset);
        }
    };

    template <int group> struct Codebook {
        static constexpr bool kScaled = true, kLookedUp = true;
        static constexpr int kWeights = group, kNbytes = group / 2;
        static constexpr int position(int s) { return Int4<group>::position(s); }

        const uint8_t *q;
        NibbleTable table;

        Codebook(const uint8_t *q, float scale, const float *values) : q(q), table(values, scale) {}
        F at(int s) const {
            const __m256i both = codes(q + s / 2 * kLanes);
            return table.weights(s % 2 ? _mm256_srli_epi32(both, 4) : both);
        }
    };

    struct Int8 {
        static constexpr bool kScaled = true, kLookedUp = false;
        static constexpr int kWeights = 32, kNbytes = 32;
        static constexpr int position(int s) { return s * kLanes; }

        const uint8_t *q;
        F scale, offset;

        Int8(const uint8_t *q, float scale, float offset)
            : q(q), scale(_mm256_set1_ps(scale)), offset(_mm256_set1_ps(offset)) {}
        F at(int s) const { return fma(_mm256_cvtepi32_ps(codes(q + s * kLanes)), scale, offset); }
    };

    struct Bf16 {
        static constexpr bool kScaled = false, kLookedUp = false;
        static constexpr int kWeights = 32, kNbytes = 64;
        static constexpr int position(int s) { return s * kLanes; }

        const uint8_t *q;

        Bf16(const uint8_t *q, float, float) : q(q) {}
        F at(int s) const { return widen(reinterpret_cast<const uint16_t *>(q + s * kLanes * 2)); }
    };
};

} // namespace
} // namespace tk
