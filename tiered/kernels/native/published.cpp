// Codes as published checkpoints pack them, put in the order of a store or made numbers: entries of the C interface
// that need neither a context nor a level. Portable: eight bytes at a time in one register keep up with any disk.
//
// The reference is tiered/quant/published.py.

#include "tiered_kernels.h"

#include <cstring>
#include <unistd.h>

namespace {

constexpr int kTile = 16; // words of 4 bytes in a cache line

// Which rows the nibbles of a word of AWQ's are of, the lowest first.
constexpr int kAwqRows[8] = {0, 2, 4, 6, 1, 3, 5, 7};

uint32_t word_at(const uint8_t *data) {
    uint32_t word;
    std::memcpy(&word, data, sizeof word);
    return word;
}

// The nibbles of a word in 8 bytes, the lowest first.
uint64_t spread(uint32_t word) {
    uint64_t bytes = word;
    bytes = (bytes | bytes << 16) & 0x0000ffff0000ffffu;
    bytes = (bytes | bytes << 8) & 0x00ff00ff00ff00ffu;
    return (bytes | bytes << 4) & 0x0f0f0f0f0f0f0f0fu;
}

uint32_t changed_over(uint32_t word) { return (word >> 4 & 0x0f0f0f0fu) | (word & 0x0f0f0f0fu) << 4; }

struct Repack {
    const uint8_t *data;
    int64_t stride; // bytes from one row of `data` to the next
    int64_t rows, in;
    int32_t bits, half; // of a group
    uint8_t *q;
    int64_t row_nbytes; // of q
};

// Words hold consecutive codes of a row: word `at` of row `row`.
template <int kPacking> const uint8_t *place_of(const Repack &job, int64_t row, int64_t at) {
    return kPacking == TK_COLUMNS ? job.data + at * job.stride + row * 4 : job.data + row * job.stride + at * 4;
}

template <int kPacking> uint32_t word_of(const Repack &job, int64_t row, int64_t at) {
    const uint32_t word = word_at(place_of<kPacking>(job, row, at));
    return kPacking == TK_ROWS_HIGH_FIRST ? changed_over(word) : word;
}

// Words as they are, which are those of a store in 8 bits, or pairs of neighbours.
template <int kPacking> void turn_words(const Repack &job) {
    const int64_t words = job.row_nbytes / 4;
    for (int64_t row = 0; row < job.rows; row += kTile) {
        const int64_t stop = row + kTile < job.rows ? row + kTile : job.rows;
        for (int64_t at = 0; at < words; at += kTile) {
            const int64_t end = at + kTile < words ? at + kTile : words;
            for (int64_t r = row; r < stop; r++) {
                for (int64_t i = at; i < end; i++) {
                    const uint32_t word = word_of<kPacking>(job, r, i);
                    std::memcpy(job.q + r * job.row_nbytes + i * 4, &word, sizeof word);
                }
            }
        }
    }
}

// Bytes of a group of 16 codes or more: those of a word in the first half with those of one in the second.
template <int kPacking> void planar_words(const Repack &job) {
    const int64_t half = job.half / 8, groups = job.in / (2 * job.half);
    for (int64_t row = 0; row < job.rows; row += kTile) {
        const int64_t stop = row + kTile < job.rows ? row + kTile : job.rows;
        for (int64_t group = 0; group < groups; group++) {
            const int64_t first = group * 2 * half;
            for (int64_t r = row; r < stop; r++) {
                uint8_t *const to = job.q + r * job.row_nbytes + group * job.half;
                for (int64_t i = 0; i < half; i++) {
                    const uint64_t low = spread(word_of<kPacking>(job, r, first + i));
                    const uint64_t both = low | spread(word_of<kPacking>(job, r, first + half + i)) << 4;
                    std::memcpy(to + 8 * i, &both, sizeof both);
                }
            }
        }
    }
}

// Bytes k of word n <-> n of word k.
void transpose(uint64_t *words) {
    for (int i = 0; i < 4; i++) {
        const uint64_t other = (words[i] >> 32 ^ words[i + 4]) & 0x00000000ffffffffu;
        words[i] ^= other << 32;
        words[i + 4] ^= other;
    }
    for (int i = 0; i < 6; i += i == 1 ? 3 : 1) {
        const uint64_t other = (words[i] >> 16 ^ words[i + 2]) & 0x0000ffff0000ffffu;
        words[i] ^= other << 16;
        words[i + 2] ^= other;
    }
    for (int i = 0; i < 8; i += 2) {
        const uint64_t other = (words[i] >> 8 ^ words[i + 1]) & 0x00ff00ff00ff00ffu;
        words[i] ^= other << 8;
        words[i + 1] ^= other;
    }
}

// A word holds one code of each of 8 rows: of 8 bytes of 8 rows, the 16 words that hold them.
void eight_rows(const Repack &job, int64_t word, int64_t at) {
    uint64_t bytes[8];
    for (int64_t k = 0; k < 8; k++) {
        const int64_t column = (at + k) / job.half * 2 * job.half + (at + k) % job.half;
        const uint8_t *const from = job.data + column * job.stride + word * 4;
        bytes[k] = spread(word_at(from)) | spread(word_at(from + job.half * job.stride)) << 4;
    }
    transpose(bytes);
    for (int k = 0; k < 8; k++) {
        const int64_t row = word * 8 + kAwqRows[k];
        if (row < job.rows) std::memcpy(job.q + row * job.row_nbytes + at, &bytes[k], sizeof bytes[k]);
    }
}

void words_of_eight_rows(const Repack &job) {
    const int64_t words = (job.rows + 7) / 8;
    constexpr int64_t kBytes = 64; // of a row: a cache line
    for (int64_t word = 0; word < words; word += kTile) {
        const int64_t stop = word + kTile < words ? word + kTile : words;
        for (int64_t at = 0; at < job.row_nbytes; at += kBytes) {
            const int64_t end = at + kBytes < job.row_nbytes ? at + kBytes : job.row_nbytes;
            for (int64_t i = at; i < end; i += 8) {
                for (int64_t w = word; w < stop; w++) eight_rows(job, w, i);
            }
        }
    }
}

template <int kPacking> void repack_words(const Repack &job) {
    if (job.bits == 8 || job.half == 1) return turn_words<kPacking>(job);
    planar_words<kPacking>(job);
}

template <int kBits, bool kHasZero, bool kInOrder>
void widen_rows(const uint8_t *codes, const float *table, int64_t rows, int64_t in, const float *scale,
                const float *zero, int64_t group, int64_t groups, const int32_t *group_of, float *out) {
    for (int64_t row = 0; row < rows; row++, scale += groups, zero += kHasZero ? groups : 0, out += in) {
        const uint8_t *const from = codes + row * in * kBits / 8;
        for (int64_t g = 0, begin = 0; begin < in; g++) {
            const int64_t end = kInOrder && begin + group < in ? begin + group : in;
            const auto value = [&](float entry, int64_t i) {
                const int64_t of = kInOrder ? g : group_of[i];
                return (kHasZero ? entry - zero[of] : entry) * scale[of];
            };
            if constexpr (kBits == 8) {
                for (int64_t i = begin; i < end; i++) out[i] = value(table[from[i]], i);
            } else { // two values for each byte
                for (int64_t i = begin; i < end; i += 2) {
                    float both[2];
                    std::memcpy(both, table + 2 * from[i / 2], sizeof both);
                    out[i] = value(both[0], i);
                    out[i + 1] = value(both[1], i + 1);
                }
            }
            begin = end;
        }
    }
}

template <int kBits> auto widen_of(bool has_zero, bool in_order) {
    if (in_order) return has_zero ? widen_rows<kBits, true, true> : widen_rows<kBits, false, true>;
    return has_zero ? widen_rows<kBits, true, false> : widen_rows<kBits, false, false>;
}

} // namespace

int32_t tk_repack(const void *data, int64_t stride, int32_t packing, int64_t rows, int64_t in, int32_t bits,
                  int32_t group, uint8_t *q) {
    const bool is_group = group == 2 || group == 32 || group == 64 || group == 128;
    if (rows < 0 || in < 1 || (bits != 4 && bits != 8) || (bits == 4 && !is_group)) return TK_BAD_ARGUMENT;
    if (in * bits % 32 || (bits == 4 && in % (group == 2 ? 16 : group))) return TK_BAD_ARGUMENT;
    if (packing < TK_ROWS || packing > TK_AWQ || (bits == 8 && packing != TK_COLUMNS && packing != TK_ROWS)) {
        return TK_BAD_ARGUMENT;
    }
    if (rows == 0) return TK_OK;
    if (!data || !q) return TK_BAD_ARGUMENT;
    const auto *from = static_cast<const uint8_t *>(data);
    const Repack job = {from, stride, rows, in, bits, bits == 4 ? group / 2 : 1, q, in * bits / 8};
    switch (packing) {
        case TK_ROWS: repack_words<TK_ROWS>(job); break;
        case TK_ROWS_HIGH_FIRST: repack_words<TK_ROWS_HIGH_FIRST>(job); break;
        case TK_COLUMNS: repack_words<TK_COLUMNS>(job); break;
        default: words_of_eight_rows(job);
    }
    return TK_OK;
}

int32_t tk_widen(const uint8_t *codes, int32_t bits, const float *table, int64_t rows, int64_t in, const float *scale,
                 const float *zero, int64_t group, int64_t groups, const int32_t *group_of, float *out) {
    if (rows < 0 || in < 1 || (bits != 4 && bits != 8) || groups < 1) return TK_BAD_ARGUMENT;
    if (!group_of && (group < 1 || (in + group - 1) / group != groups)) return TK_BAD_ARGUMENT;
    if (bits == 4 && (in % 2 || (!group_of && group % 2))) return TK_BAD_ARGUMENT;
    if (rows == 0) return TK_OK;
    if (!codes || !table || !scale || !out) return TK_BAD_ARGUMENT;
    for (int64_t i = 0; group_of && i < in; i++) {
        if (group_of[i] < 0 || group_of[i] >= groups) return TK_BAD_ARGUMENT;
    }
    const bool in_order = !group_of;
    if (bits == 8) {
        widen_of<8>(zero, in_order)(codes, table, rows, in, scale, zero, group, groups, group_of, out);
        return TK_OK;
    }
    float pairs[512];
    for (int i = 0; i < 256; i++) {
        pairs[2 * i] = table[i & 15];
        pairs[2 * i + 1] = table[i >> 4];
    }
    widen_of<4>(zero, in_order)(codes, pairs, rows, in, scale, zero, group, groups, group_of, out);
    return TK_OK;
}

int64_t tk_read_rows(int32_t fd, int64_t offset, int64_t stride, int64_t rows, int64_t nbytes, uint8_t *out) {
    for (int64_t row = 0; row < rows; row++, offset += stride, out += nbytes) {
        if (pread(fd, out, static_cast<size_t>(nbytes), offset) != nbytes) return row;
    }
    return rows;
}
