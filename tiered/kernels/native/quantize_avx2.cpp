// Quantizing 8 groups at a time.

#include "quantize_lanes.h"

#include <immintrin.h>

namespace tk {

namespace {

struct Avx2 {
    using F = __m256;
    using Words = __m256i;
    static constexpr int kLanes = 8;

    static TK_INLINE F set(float value) { return _mm256_set1_ps(value); }
    static TK_INLINE F load(const float *from) { return _mm256_load_ps(from); }
    static TK_INLINE void store(float *to, F a) { _mm256_store_ps(to, a); }
    static TK_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
    static TK_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static TK_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static TK_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
    static TK_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
    static TK_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
    static TK_INLINE F subtract_product(F w, F a, F b) { return _mm256_fnmadd_ps(a, b, w); }
    static TK_INLINE F less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
    static TK_INLINE F select(F mask, F a, F b) { return _mm256_blendv_ps(b, a, mask); }
    static TK_INLINE bool all_finite(F a) {
        const F zeros = _mm256_setzero_ps();
        return _mm256_movemask_ps(_mm256_cmp_ps(_mm256_mul_ps(a, zeros), zeros, _CMP_EQ_OQ)) == 0xff;
    }

    static TK_INLINE Words zero_words() { return _mm256_setzero_si256(); }
    static TK_INLINE F as_float(Words a) { return _mm256_castsi256_ps(a); }
    static TK_INLINE Words difference(F a, F b) {
        return _mm256_sub_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b));
    }
    template <int kBits> static TK_INLINE Words shift_in(Words word, Words code) {
        return _mm256_or_si256(_mm256_slli_epi32(word, kBits), code);
    }
    static TK_INLINE Words to_fp16(F a) {
        return _mm256_cvtepu16_epi32(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static TK_INLINE F from_fp16(Words a) { return _mm256_cvtph_ps(low16(a)); }
    template <int kDtype> static TK_INLINE F first(Words a) {
        return kDtype == TK_BF16 ? as_float(_mm256_slli_epi32(a, 16)) : from_fp16(a);
    }
    template <int kDtype> static TK_INLINE F second(Words a) {
        return kDtype == TK_BF16 ? as_float(_mm256_and_si256(a, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))
                                 : from_fp16(_mm256_srli_epi32(a, 16));
    }
    static TK_INLINE Words shift_left(Words a, int bits) { return _mm256_slli_epi32(a, bits); }
    static TK_INLINE Words bits_of(Words a, int mask) { return _mm256_and_si256(a, _mm256_set1_epi32(mask)); }
    static TK_INLINE Words plus(Words a, int b) { return _mm256_add_epi32(a, _mm256_set1_epi32(b)); }
    static TK_INLINE F nan_where(Words a, int b, F c) {
        return _mm256_or_ps(as_float(_mm256_cmpeq_epi32(a, _mm256_set1_epi32(b))), c);
    }
    static TK_INLINE F with_sign(F a, Words sign) { return _mm256_or_ps(a, as_float(sign)); }
    static TK_INLINE Words shift_right(Words a, int bits) { return _mm256_srli_epi32(a, bits); }
    template <int kBits> static TK_INLINE F look_up(const float *table, Words a) {
        if (kBits == 8) return _mm256_i32gather_ps(table, _mm256_and_si256(a, _mm256_set1_epi32(255)), 4);
        const F low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), a);
        const F high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), a);
        return select(as_float(_mm256_slli_epi32(a, 28)), high, low);
    }
    static TK_INLINE void store_low16(uint16_t *to, Words a) {
        _mm_storeu_si128(reinterpret_cast<__m128i *>(to), low16(a));
    }
    static TK_INLINE void store_low8(uint8_t *to, Words a) {
        const __m128i narrow = low16(a);
        _mm_storel_epi64(reinterpret_cast<__m128i *>(to), _mm_packus_epi16(narrow, narrow));
    }
    static TK_INLINE __m128i low16(Words a) {
        const Words masked = _mm256_and_si256(a, _mm256_set1_epi32(0xffff));
        return _mm_packus_epi32(_mm256_castsi256_si128(masked), _mm256_extracti128_si256(masked, 1));
    }

    // Words [4][4] within each 128-bit lane, transposed.
    static TK_INLINE void transpose(const Words in[4], Words out[4]) {
        const Words a = _mm256_unpacklo_epi32(in[0], in[1]), b = _mm256_unpackhi_epi32(in[0], in[1]);
        const Words c = _mm256_unpacklo_epi32(in[2], in[3]), d = _mm256_unpackhi_epi32(in[2], in[3]);
        out[0] = _mm256_unpacklo_epi64(a, c);
        out[1] = _mm256_unpackhi_epi64(a, c);
        out[2] = _mm256_unpacklo_epi64(b, d);
        out[3] = _mm256_unpackhi_epi64(b, d);
    }
    static TK_INLINE void gather4(const unsigned char *const *rows, int at, Words out[4]) {
        Words in[4];
        for (int i = 0; i < 4; i++) { // rows i and i + 4
            in[i] = _mm256_castsi128_si256(words_at(rows[i] + at));
            in[i] = _mm256_inserti128_si256(in[i], words_at(rows[i + 4] + at), 1);
        }
        transpose(in, out);
    }
    static TK_INLINE void scatter4(const Words words[4], uint8_t *to, int stride) {
        Words out[4];
        transpose(words, out);
        for (int i = 0; i < 4; i++) {
            put(to + i * stride, _mm256_castsi256_si128(out[i]));
            put(to + (i + 4) * stride, _mm256_extracti128_si256(out[i], 1));
        }
    }
    static TK_INLINE __m128i words_at(const unsigned char *from) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
    }
    static TK_INLINE void put(uint8_t *to, __m128i a) { _mm_storeu_si128(reinterpret_cast<__m128i *>(to), a); }
};

} // namespace

int quantize_avx2(Quantize &quantize, Pool &pool) { return quantize_lanes<Avx2>(quantize, pool); }

} // namespace tk
