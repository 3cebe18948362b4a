// Panels of the AVX-512 kernels whose lanes are 16 rows of the weight: how rows are chosen, loaded, transposed and
// unpacked, and the sizes that the kernels agree on. Internal linkage throughout; see pool.h.
//
// vpdpbusd multiplies quads: four neighbours of each of 16 rows by four activations of one token.
#pragma once

#include "avx512.h"

#include <cstring>

namespace tk {
namespace {

constexpr int kUnit = 128;           // of `in`: unpacked in one go, then used for all tokens
constexpr int kQuads = kUnit / 4;
constexpr int kLanes = 16;           // rows of the weight in a set
constexpr int kBlockGroups = 16;     // groups whose scales are loaded in one go
constexpr int kTile = 8;             // tokens that share loads of codes
constexpr int64_t kAheadNbytes = 512;
constexpr int64_t kItemRows = 64;    // of the weight, in panels that one thread computes one after the other
constexpr int64_t kMostTokens = 256; // more are computed one part after the other, which bounds the scratch

// The rows of a panel. Beyond the weight's last row that row is repeated; its results are not stored.
template <int kSets> struct Rows {
    int64_t row[kSets][kLanes];

    void set(int64_t first, int64_t out) {
        for (int i = 0; i < kSets * kLanes; i++) row[i / kLanes][i % kLanes] = least(first + i, out - 1);
    }
};

// 16 x 16 words of 32 bits.
template <class Word> TK_INLINE void transpose_matrix(Word *matrix) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(matrix + i * 16);
    transpose16(r);
    for (int i = 0; i < 16; i++) _mm512_store_si512(matrix + i * 16, r[i]);
}

// ---- formats: kColumns 32-bit columns of a unit's stored codes; each holds kShifts quads. Weights are scale * (code -
// zero), of codes as `quad` makes them.

struct Integers {
    static constexpr bool kHasZeros = true;

    static TK_INLINE int64_t scale_nbytes(const Linear &) { return 2; }
    static TK_INLINE __m512 scales(const Linear &l, int64_t at, __mmask16 groups) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(groups, l.w.scale + at));
    }
    static TK_INLINE __m512i zeros(const Linear &l, int64_t at, __mmask16 groups) {
        return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(groups, l.w.zero + at));
    }
};

template <int G> struct Int4Quads : Integers {
    static constexpr int kGroup = G, kColumns = 16, kShifts = 2;

    static TK_INLINE __m512i quad(const Linear &, __m512i column, int s) {
        return _mm512_and_si512(s ? _mm512_srli_epi16(column, 4) : column, _mm512_set1_epi8(15));
    }
    // A group of activations, in the order of the quads. Byte i of stored codes holds values i and i + G/2, so quads of
    // the group's halves take turns.
    static TK_INLINE void put(const __m128i *rounded, __m128i *codes) {
        for (int i = 0; i < G / 32; i++) {
            codes[2 * i] = _mm_unpacklo_epi32(rounded[i], rounded[i + G / 32]);
            codes[2 * i + 1] = _mm_unpackhi_epi32(rounded[i], rounded[i + G / 32]);
        }
    }
};

// A codebook's steps, looked up.
struct CodebookQuads : Int4Quads<32> {
    static constexpr bool kHasZeros = false; // that are stored

    static TK_INLINE int64_t scale_nbytes(const Linear &l) {
        return l.w.scale_dtype == TK_F32 ? 4 : l.w.scale_dtype == TK_F16 ? 2 : 1;
    }
    static TK_INLINE __m512 scales(const Linear &l, int64_t at, __mmask16 groups) {
        return _mm512_mul_ps(codebook_scales(l.w, at, groups), _mm512_set1_ps(l.step));
    }
    static TK_INLINE __m512i zeros(const Linear &l, int64_t, __mmask16) { return _mm512_set1_epi32(l.zero_steps); }
    static TK_INLINE __m512i quad(const Linear &l, __m512i column, int s) {
        const __m128i steps = _mm_loadu_si128(reinterpret_cast<const __m128i *>(l.steps));
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(steps), Int4Quads<32>::quad(l, column, s));
    }
};

template <int G> struct Int8Quads : Integers {
    static constexpr int kGroup = G, kColumns = 32, kShifts = 1;

    static TK_INLINE __m512i quad(const Linear &, __m512i column, int) { return column; }
    static TK_INLINE void put(const __m128i *rounded, __m128i *codes) {
        for (int i = 0; i < G / 16; i++) codes[i] = rounded[i];
    }
};

// Calls `run` with an object of the type that stands for the format of l's codes; returns what it returns.
template <class Run> TK_INLINE int with_format(const Linear &l, Run run) {
    if (l.w.format == TK_CODEBOOK) return run(CodebookQuads{});
    if (l.w.format == TK_INT4) {
        if (l.w.group == 32) return run(Int4Quads<32>{});
        return l.w.group == 64 ? run(Int4Quads<64>{}) : run(Int4Quads<128>{});
    }
    if (l.w.group == 32) return run(Int8Quads<32>{});
    return l.w.group == 64 ? run(Int8Quads<64>{}) : run(Int8Quads<128>{});
}

// The next panel's scales and zeros lie right behind this one's; each block fetches its part of them.
template <class F, int kSets> TK_INLINE void fetch_scales(const Linear &l, int64_t block, const Rows<kSets> &rows) {
    constexpr int64_t kCount = kSets * kLanes * kBlockGroups;
    const int64_t at = (rows.row[0][0] + kSets * kLanes) * l.groups + block * kCount, nbytes = F::scale_nbytes(l);
    const char *scales = reinterpret_cast<const char *>(l.w.scale);
    for (int64_t i = at * nbytes; i < (at + kCount) * nbytes; i += 64) __builtin_prefetch(scales + i);
    for (int64_t i = at; F::kHasZeros && i < at + kCount; i += 64) __builtin_prefetch(l.w.zero + i);
}

// ---- codes

// 64 bytes of each of a set's 16 rows from byte `at` on, transposed: vector c holds the rows' c-th 32 bits.
template <int kSets>
TK_INLINE void load_columns(const Linear &l, const Rows<kSets> &rows, int set, int64_t at, __m512i columns[16]) {
    const int64_t left = l.row_nbytes - at;
    for (int r = 0; r < kLanes; r++) {
        const uint8_t *q = static_cast<const uint8_t *>(l.w.q) + rows.row[set][r] * l.row_nbytes + at;
        columns[r] = left >= 64 ? _mm512_loadu_si512(q) : _mm512_maskz_loadu_epi8(first64(left), q);
    }
    transpose16(columns);
}

// One unit of kSets times 16 rows, unpacked: [column][shift].
template <int kSets> struct Codes {
    alignas(64) int32_t quad[kSets][kQuads][kLanes];

    template <class F> TK_INLINE void unpack(const Linear &l, const Rows<kSets> &rows, int64_t unit) {
        for (int set = 0; set < kSets; set++) {
            for (int part = 0; part < F::kColumns / 16; part++) {
                __m512i columns[16];
                load_columns(l, rows, set, unit * F::kColumns * 4 + part * 64, columns);
                for (int c = 0; c < 16; c++) {
                    for (int s = 0; s < F::kShifts; s++) {
                        _mm512_store_si512(quad[set][(part * 16 + c) * F::kShifts + s], F::quad(l, columns[c], s));
                    }
                }
            }
        }
    }
};

// The lines of codes that a later unit of the panel will load, or the first ones of the next panel. Fetched all at once
// they would wait for each other; they are fetched one by one while this unit is multiplied.
template <class F, int kSets> struct Ahead {
    static constexpr int kRowLines = F::kColumns / 16, kLines = kSets * kLanes * kRowLines;

    const uint8_t *q;
    int64_t row_nbytes;

    TK_INLINE Ahead(const Linear &l, const Rows<kSets> &rows, int64_t unit) : row_nbytes(l.row_nbytes) {
        // Beyond a row's end comes the row of the next panel.
        const int64_t at = unit * F::kColumns * 4, further = (kSets * kLanes - 1) * row_nbytes;
        const int64_t ahead = kAheadNbytes + (row_nbytes - at > kAheadNbytes ? 0 : further);
        q = static_cast<const uint8_t *>(l.w.q) + rows.row[0][0] * row_nbytes + at + ahead;
    }
    // To the second level: rows of a power of two bytes share sets of the first one, and sixteen of them push out what was
    // fetched for them. Beyond the weight's end this reads nothing: a prefetch is only a hint.
    TK_INLINE void fetch(int line) const {
        const uint8_t *at = q + line / kRowLines * row_nbytes + line % kRowLines * 64;
        _mm_prefetch(reinterpret_cast<const char *>(at), _MM_HINT_T1);
    }
};

TK_INLINE __m512i broadcast_quad(const int8_t *x) {
    int32_t quad;
    std::memcpy(&quad, x, sizeof quad);
    return _mm512_set1_epi32(quad);
}

} // namespace
} // namespace tk
