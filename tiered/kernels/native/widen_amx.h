// Stored weights to bf16 tiles: scale * (code - zero), exact in fp32 and rounded once to bf16, in the registers.
//
// A format widens one unit of one row: 128 weights along `in`, which become one row of each of four tiles. The order in
// which a tile's words take the unit's weights is the format's own (`source`): activations are packed to match.
#pragma once

#include "tiles_amx.h"

namespace tk {
namespace {

// The order in which a format's codes meet the activations: word w of vector v of a unit of 128 is its activation
// F::source(v, w).
struct WordOrder {
    alignas(64) uint16_t index[4][32]; // place of the activation within its half of the unit
    uint32_t upper[4];                 // a bit per word: whether that is the upper half

    template <class F> void set() {
        for (int v = 0; v < 4; v++) {
            upper[v] = 0;
            for (int w = 0; w < 32; w++) {
                const int at = F::source(v, w);
                index[v][w] = static_cast<uint16_t>(at & 63);
                if (at >= 64) upper[v] |= 1u << w;
            }
        }
    }

    // Vector v of the unit that lies in z.
    TK_INLINE __m512i pick(const __m512i z[4], int v) const {
        const __m512i at = _mm512_load_si512(index[v]);
        const __m512i low = _mm512_permutex2var_epi16(z[0], at, z[1]), high = _mm512_permutex2var_epi16(z[2], at, z[3]);
        return _mm512_mask_blend_epi16(upper[v], low, high);
    }
};

constexpr int kUnit = 128;
constexpr int kSteps = kUnit / 32; // tiles, hence multiplications, per unit
constexpr int kScaleGroups = 16;   // loaded at a time

// Factors of 16 groups of 16 rows. `shift` is -scale * zero, so that a weight is one fused multiply-add of its code:
// exact, because codes, zeros and scales have 8, 8 and 11 bits.
struct alignas(64) Scales {
    float scale[16][kScaleGroups], shift[16][kScaleGroups];
};

// 16 rows of a weight. Beyond the last row that row is repeated; its results are not stored.
struct Rows {
    const uint8_t *q[16];
    int64_t row[16];
};

TK_INLINE Rows rows_at(const Linear &l, int64_t first) {
    Rows rows;
    for (int r = 0; r < 16; r++) {
        rows.row[r] = least(first + r, l.w.out - 1);
        rows.q[r] = static_cast<const uint8_t *>(l.w.q) + rows.row[r] * l.row_nbytes;
    }
    return rows;
}

template <class F> TK_INLINE void load_scales(const Linear &l, const Rows &rows, int64_t group, Scales &out) {
    const __mmask16 mask = first16(l.groups - group);
    for (int r = 0; r < 16; r++) {
        const int64_t at = rows.row[r] * l.groups + group;
        if (F::kLookedUp) {
            _mm512_store_ps(out.scale[r], codebook_scales(l.w, at, mask));
            continue;
        }
        const __m512 scale = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, l.w.scale + at));
        const __m512i zero = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, l.w.zero + at));
        _mm512_store_ps(out.scale[r], scale);
        _mm512_store_ps(out.shift[r], _mm512_fnmadd_ps(scale, _mm512_cvtepi32_ps(zero), _mm512_setzero_ps()));
    }
}

// What goes with the scales of row `r` from `slot` on.
template <class F> TK_INLINE const float *beside(const Linear &l, const Scales &scales, int r, int64_t slot) {
    return F::kLookedUp ? l.w.values : &scales.shift[r][slot];
}

TK_INLINE __m512i pair_bf16(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// Nibbles are looked up: a group's 16 weights are made once and picked by vpermw, two or four groups at a time.
template <int G> struct Int4Tiles {
    static constexpr int kUnitNbytes = 64, kGroups = kUnit / G;
    static constexpr bool kLookedUp = false;

    // Word w of the 64 bytes holds four nibbles; step s takes the s-th of each.
    static constexpr int source(int s, int w) {
        return w / (G / 4) * G + (s & 1) * (G / 2) + 2 * (w % (G / 4)) + (s >> 1);
    }

    static TK_INLINE __m512 values(const float *scale, const float *shift) {
        const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_fmadd_ps(codes, _mm512_set1_ps(*scale), _mm512_set1_ps(*shift));
    }

    // `left`: weights of the row from the unit on. out + s * kTileNbytes receives step s.
    static TK_INLINE void widen(const uint8_t *q, int64_t left, const float *scale, const float *shift, uint8_t *out) {
        pick(q, left, [=](int g) __attribute__((always_inline)) { return values(scale + g, shift + g); }, out);
    }

    // `table(g)`: the 16 weights that a code of group g of the unit may stand for.
    template <class Table> static TK_INLINE void pick(const uint8_t *q, int64_t left, Table table, uint8_t *out) {
        const __m512i w = left >= kUnit ? _mm512_loadu_si512(q) : _mm512_maskz_loadu_epi8(first64(left / 2), q);
        const __m512i words[kSteps] = {w, _mm512_srli_epi16(w, 4), _mm512_srli_epi16(w, 8), _mm512_srli_epi16(w, 12)};
        const __m512 first = table(0);
        const __m512i low = pair_bf16(first, G == 128 ? first : table(1));
        const __m512i high = G == 32 ? pair_bf16(table(2), table(3)) : low;
        // Which table of the pair, and at G == 32 which pair: bits 4 and 5 of each index, by the word's group.
        constexpr int64_t kOne = 0x0010001000100010;
        const __m512i select = G == 32 ? _mm512_setr_epi64(0, 0, kOne, kOne, 2 * kOne, 2 * kOne, 3 * kOne, 3 * kOne)
                                       : _mm512_setr_epi64(0, 0, 0, 0, kOne, kOne, kOne, kOne);
        for (int s = 0; s < kSteps; s++) {
            // At G == 128 both halves of the table are alike, and vpermw looks at five bits only.
            const __m512i nibble_or_select = _mm512_ternarylogic_epi64(words[s], _mm512_set1_epi16(15), select, 0xea);
            const __m512i index = G == 128 ? words[s] : nibble_or_select;
            const __m512i picked = G == 32 ? _mm512_permutex2var_epi16(low, index, high) : _mm512_permutexvar_epi16(index, low);
            _mm512_store_si512(out + s * kTileNbytes, picked);
        }
    }
};

// `values`: what the codes of a codebook stand for, before scaling, in the place of shifts.
template <int G> struct CodebookTiles : Int4Tiles<G> {
    static constexpr bool kLookedUp = true;

    static TK_INLINE void widen(const uint8_t *q, int64_t left, const float *scale, const float *values, uint8_t *out) {
        const __m512 table = _mm512_loadu_ps(values);
        const auto scaled = [=](int g) __attribute__((always_inline)) { return _mm512_mul_ps(table, _mm512_set1_ps(scale[g])); };
        Int4Tiles<G>::pick(q, left, scaled, out);
    }
};

template <int G> struct Int8Tiles {
    static constexpr int kUnitNbytes = 128, kGroups = kUnit / G;
    static constexpr bool kLookedUp = false;

    static constexpr int source(int s, int w) { return 32 * s + w; }

    static TK_INLINE void widen(const uint8_t *q, int64_t left, const float *scale, const float *shift, uint8_t *out) {
        for (int s = 0; s < kSteps; s++) {
            __m512 halves[2];
            for (int h = 0; h < 2; h++) {
                const int at = 32 * s + 16 * h;
                const __m128i codes = left >= kUnit ? _mm_loadu_si128(reinterpret_cast<const __m128i *>(q + at))
                                                    : _mm_maskz_loadu_epi8(first16(left - at), q + at);
                const __m512 wide = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes));
                halves[h] = _mm512_fmadd_ps(wide, _mm512_set1_ps(scale[at / G]), _mm512_set1_ps(shift[at / G]));
            }
            _mm512_store_si512(out + s * kTileNbytes, pair_bf16(halves[0], halves[1]));
        }
    }
};

struct DenseTiles {
    static constexpr int kUnitNbytes = 256, kGroups = 0;
    static constexpr bool kLookedUp = false;

    static constexpr int source(int s, int w) { return 32 * s + w; }

    static TK_INLINE void widen(const uint8_t *q, int64_t left, const float *, const float *, uint8_t *out) {
        for (int s = 0; s < kSteps; s++) {
            const __m512i row = _mm512_maskz_loadu_epi16(first32(left - 32 * s), q + 64 * s);
            _mm512_store_si512(out + s * kTileNbytes, row);
        }
    }
};

} // namespace
} // namespace tk
