// Quantizing 16 groups at a time.

#include "quantize_lanes.h"

#include <immintrin.h>

namespace tk {

namespace {

struct Avx512 {
    using F = __m512;
    using Words = __m512i;
    using Mask = __mmask16;
    static constexpr int kLanes = 16;

    static TK_INLINE F set(float value) { return _mm512_set1_ps(value); }
    static TK_INLINE F load(const float *from) { return _mm512_load_ps(from); }
    static TK_INLINE void store(float *to, F a) { _mm512_store_ps(to, a); }
    static TK_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
    static TK_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static TK_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static TK_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
    static TK_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
    static TK_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
    static TK_INLINE F subtract_product(F w, F a, F b) { return _mm512_fnmadd_ps(a, b, w); }
    static TK_INLINE Mask less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
    static TK_INLINE F select(Mask mask, F a, F b) { return _mm512_mask_blend_ps(mask, b, a); }
    static TK_INLINE bool all_finite(F a) {
        const F zeros = _mm512_setzero_ps();
        return _mm512_cmp_ps_mask(_mm512_mul_ps(a, zeros), zeros, _CMP_EQ_OQ) == 0xffff;
    }

    static TK_INLINE Words zero_words() { return _mm512_setzero_si512(); }
    static TK_INLINE F as_float(Words a) { return _mm512_castsi512_ps(a); }
    static TK_INLINE Words difference(F a, F b) {
        return _mm512_sub_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b));
    }
    template <int kBits> static TK_INLINE Words shift_in(Words word, Words code) {
        return _mm512_or_si512(_mm512_slli_epi32(word, kBits), code);
    }
    static TK_INLINE Words to_fp16(F a) {
        return _mm512_cvtepu16_epi32(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static TK_INLINE F from_fp16(Words a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); }
    template <int kDtype> static TK_INLINE F first(Words a) {
        return kDtype == TK_BF16 ? as_float(_mm512_slli_epi32(a, 16)) : from_fp16(a);
    }
    template <int kDtype> static TK_INLINE F second(Words a) {
        return kDtype == TK_BF16 ? as_float(_mm512_and_si512(a, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))
                                 : from_fp16(_mm512_srli_epi32(a, 16));
    }
    static TK_INLINE Words shift_left(Words a, int bits) { return _mm512_slli_epi32(a, static_cast<unsigned>(bits)); }
    static TK_INLINE Words bits_of(Words a, int mask) { return _mm512_and_si512(a, _mm512_set1_epi32(mask)); }
    static TK_INLINE Words plus(Words a, int b) { return _mm512_add_epi32(a, _mm512_set1_epi32(b)); }
    static TK_INLINE F nan_where(Words a, int b, F c) {
        return select(_mm512_cmpeq_epi32_mask(a, _mm512_set1_epi32(b)), as_float(_mm512_set1_epi32(-1)), c);
    }
    static TK_INLINE F with_sign(F a, Words sign) { return _mm512_or_ps(a, as_float(sign)); }
    static TK_INLINE Words shift_right(Words a, int bits) { return _mm512_srli_epi32(a, static_cast<unsigned>(bits)); }
    template <int kBits> static TK_INLINE F look_up(const float *table, Words a) {
        if (kBits == 8) return _mm512_i32gather_ps(_mm512_and_si512(a, _mm512_set1_epi32(255)), table, 4);
        return _mm512_permutexvar_ps(a, _mm512_loadu_ps(table)); // which looks at the lowest 4 bits alone
    }
    static TK_INLINE void store_low16(uint16_t *to, Words a) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), _mm512_cvtepi32_epi16(a));
    }
    static TK_INLINE void store_low8(uint8_t *to, Words a) {
        _mm_storeu_si128(reinterpret_cast<__m128i *>(to), _mm512_cvtepi32_epi8(a));
    }

    // Words [4][4] within each 128-bit lane, transposed.
    static TK_INLINE void transpose(const Words in[4], Words out[4]) {
        const Words a = _mm512_unpacklo_epi32(in[0], in[1]), b = _mm512_unpackhi_epi32(in[0], in[1]);
        const Words c = _mm512_unpacklo_epi32(in[2], in[3]), d = _mm512_unpackhi_epi32(in[2], in[3]);
        out[0] = _mm512_unpacklo_epi64(a, c);
        out[1] = _mm512_unpackhi_epi64(a, c);
        out[2] = _mm512_unpacklo_epi64(b, d);
        out[3] = _mm512_unpackhi_epi64(b, d);
    }
    static TK_INLINE void gather4(const unsigned char *const *rows, int at, Words out[4]) {
        Words in[4];
        for (int i = 0; i < 4; i++) { // rows i, i + 4, i + 8, i + 12
            Words a = _mm512_castsi128_si512(words_at(rows[i] + at));
            a = _mm512_inserti32x4(a, words_at(rows[i + 4] + at), 1);
            a = _mm512_inserti32x4(a, words_at(rows[i + 8] + at), 2);
            in[i] = _mm512_inserti32x4(a, words_at(rows[i + 12] + at), 3);
        }
        transpose(in, out);
    }
    static TK_INLINE void scatter4(const Words words[4], uint8_t *to, int stride) {
        Words out[4];
        transpose(words, out);
        for (int i = 0; i < 4; i++) {
            put(to + i * stride, _mm512_castsi512_si128(out[i]));
            put(to + (i + 4) * stride, _mm512_extracti32x4_epi32(out[i], 1));
            put(to + (i + 8) * stride, _mm512_extracti32x4_epi32(out[i], 2));
            put(to + (i + 12) * stride, _mm512_extracti32x4_epi32(out[i], 3));
        }
    }
    static TK_INLINE __m128i words_at(const unsigned char *from) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
    }
    static TK_INLINE void put(uint8_t *to, __m128i a) { _mm_storeu_si128(reinterpret_cast<__m128i *>(to), a); }
};

} // namespace

int quantize_avx512(Quantize &quantize, Pool &pool) { return quantize_lanes<Avx512>(quantize, pool); }

} // namespace tk
