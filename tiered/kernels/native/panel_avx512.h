// Panels of the AVX-512 kernels whose lanes are 16 rows of the weight: how rows are chosen, loaded and transposed, and
// the sizes that the kernels agree on. Internal linkage throughout; see pool.h.
#pragma once

#include "avx512.h"

namespace tk {
namespace {

constexpr int kUnit = 128;           // of `in`: unpacked in one go, then used for all tokens
constexpr int kLanes = 16;           // rows of the weight in a set
constexpr int kBlockGroups = 16;     // groups whose scales are loaded in one go
constexpr int kTile = 8;             // tokens that share loads of codes
constexpr int64_t kAheadNbytes = 512;
constexpr int64_t kItemRows = 64;    // of the weight, in panels that one thread computes one after the other
constexpr int64_t kMostTokens = 256; // more are computed one part after the other, which bounds the scratch

// The rows of a panel; beyond the last, that one again; what comes of it is not stored.
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

// The next panel's scales and zeros lie right behind this one's; each block fetches its part of them.
template <int kSets> TK_INLINE void fetch_scales(const Linear &l, int64_t block, const Rows<kSets> &rows) {
    constexpr int64_t kCount = kSets * kLanes * kBlockGroups;
    const int64_t at = (rows.row[0][0] + kSets * kLanes) * l.groups + block * kCount;
    for (int64_t i = at; i < at + kCount; i += 32) __builtin_prefetch(l.w.scale + i);
    for (int64_t i = at; i < at + kCount; i += 64) __builtin_prefetch(l.w.zero + i);
}

// 64 bytes of each of a set's 16 rows from byte `at` on, transposed: vector c holds the rows' c-th 32 bits.
template <int kSets>
TK_INLINE void load_columns(const Linear &l, const Rows<kSets> &rows, int set, int64_t at, __m512i columns[16]) {
    // Beyond a row's end comes the row of the next panel.
    const int64_t left = l.row_nbytes - at, further = (kSets * kLanes - 1) * l.row_nbytes;
    const int64_t ahead = kAheadNbytes + (left > kAheadNbytes ? 0 : further);
    for (int r = 0; r < kLanes; r++) {
        const uint8_t *q = static_cast<const uint8_t *>(l.w.q) + rows.row[set][r] * l.row_nbytes + at;
        columns[r] = left >= 64 ? _mm512_loadu_si512(q) : _mm512_maskz_loadu_epi8(first64(left), q);
        _mm_prefetch(reinterpret_cast<const char *>(q + ahead), _MM_HINT_T0);
    }
    transpose16(columns);
}

} // namespace
} // namespace tk
