// AVX-512 as the kernels' templates see it: vectors of 16 fp32, and stored weights as such vectors. Internal linkage
// throughout, see pool.h.
#pragma once

#include "codebook_avx512.h"

#include <cstdint>
#include <immintrin.h>

namespace tk {
namespace {

struct Avx512 {
    using F = __m512;
    static constexpr int kLanes = 16;
    static constexpr int kTokens = 6; // times four rows of weights: 24 of 32 registers

    static F zero() { return _mm512_setzero_ps(); }
    static F set(float value) { return _mm512_set1_ps(value); }
    static F load(const float *from) { return _mm512_loadu_ps(from); }
    static void store(float *to, F value) { _mm512_storeu_ps(to, value); }
    static F multiply(F a, F b) { return _mm512_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
    static F widen(const uint16_t *bf16) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(bf16));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }

    // The lanes of each, added, to sums[0..3].
    static void add_sums(float *sums, F a, F b, F c, F d) {
        const F ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const F cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        const __m512d ab2 = _mm512_castps_pd(ab), cd2 = _mm512_castps_pd(cd);
        const F each = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab2, cd2)),
                                     _mm512_castpd_ps(_mm512_unpackhi_pd(ab2, cd2)));
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(each), _mm512_extractf32x8_ps(each, 1));
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), four));
    }

    // Up to 16 groups' scales and zeros in fp32; 0 beyond `count`.
    static F scales(const uint16_t *fp16, int64_t count) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), fp16));
    }
    static F zeros(const uint8_t *u8, int64_t count) {
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(count), u8)));
    }
    static F codebook_scales(const tk_weight &w, int64_t at, int64_t count) {
        return tk::codebook_scales(w, at, first(count));
    }
    static __mmask16 first(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << count) - 1); }

    // A unit's weights vector by vector; vector s holds those from position(s) on.
    template <int group> struct Int4 {
        static constexpr bool kScaled = true, kLookedUp = false;
        static constexpr int kWeights = group, kNbytes = group / 2;
        static constexpr int position(int s) { return s % 2 * (group / 2) + s / 2 * kLanes; }

        const uint8_t *q;
        F table; // what each code stands for

        Int4(const uint8_t *q, float scale, float offset) : q(q) {
            const F codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            table = fma(codes, _mm512_set1_ps(scale), _mm512_set1_ps(offset));
        }
        Int4(const uint8_t *q, F table) : q(q), table(table) {}
        F at(int s) const {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(q + s / 2 * kLanes));
            const __m512i codes = _mm512_cvtepu8_epi32(bytes);
            // The look-up takes the lowest four bits.
            return _mm512_permutexvar_ps(s % 2 ? _mm512_srli_epi32(codes, 4) : codes, table);
        }
    };

    template <int group> struct Codebook : Int4<group> {
        static constexpr bool kLookedUp = true;

        Codebook(const uint8_t *q, float scale, const float *values)
            : Int4<group>(q, multiply(load(values), _mm512_set1_ps(scale))) {}
    };

    struct Int8 {
        static constexpr bool kScaled = true, kLookedUp = false;
        static constexpr int kWeights = 32, kNbytes = 32;
        static constexpr int position(int s) { return s * kLanes; }

        const uint8_t *q;
        F scale, offset;

        Int8(const uint8_t *q, float scale, float offset)
            : q(q), scale(_mm512_set1_ps(scale)), offset(_mm512_set1_ps(offset)) {}
        F at(int s) const {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(q + s * kLanes));
            return fma(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), scale, offset);
        }
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
