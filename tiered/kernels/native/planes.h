// Frames of 16-bit floats with their exponents coded: what a frame holds, and the levels' entries. See pool.h about
// inline functions.
//
// A value's bits, rotated left by one, are its exponent, its mantissa and its sign. Their low byte is stored as it is.
// Of the high byte the upper 8 - extra bits are the symbol (bf16: all 8, fp16: the 5 bits of the exponent); the lower
// `extra` bits are stored as they are. The frame's ten most frequent symbols have codes: 0 to 2 by two bits, 3 to 9 by
// the bits 11 and three more; 10, which ends in three ones, says that the high byte is among the escapes.
//
//   u8  table[10], 6 of zero   the high byte, lower bits 0, of codes 0 to 9
//   u32 kind                   0: the values follow as they are, and nothing else; 1: what is below
//   u32 longer, u32 escapes    how many values have a code from 3 on, and how many are escapes
//   u32 of zero
//   u8  low[64 * groups]       groups of 64 values; the last is filled up with code 0
//   u64 bits[groups][2 + extra]  bit i of a word is value i's: the two bits of its code, then the lower bits
//   u64 more[3][longer / 64 + 2] the three bits of each longer code, one behind the other
//   u8  escaped[escapes]
//
// A frame may be followed by bytes that mean nothing. Numbers are little-endian.
#pragma once

#include "tiered_kernels.h"

#include <cstdint>
#include <cstring>

namespace tk {

constexpr int64_t kHeaderNbytes = 32;
constexpr int kSymbols = 10;

struct Planes {
    int64_t values, groups, longer, escapes;
    int extra;
    const uint8_t *table, *low, *bits, *escaped;
    const uint8_t *more[3];
};

// Both return false where more longer codes or escapes are found than the frame has: it is damaged.
bool decode_planes_scalar(const Planes &planes, uint16_t *out);
bool decode_planes_avx2(const Planes &planes, uint16_t *out);

// The frame of `values` as kind 1 in `room` bytes at `frame`; its size, or 0 where it has no room.
int64_t encode_planes(const uint16_t *values, int64_t count, int extra, uint8_t *frame, int64_t room);

namespace {

[[maybe_unused]] inline uint64_t load_word(const uint8_t *from) {
    uint64_t word;
    std::memcpy(&word, from, sizeof word);
    return word;
}

// Bits `at` and following of a stream.
[[maybe_unused]] inline uint64_t bits_at(const uint8_t *stream, int64_t at) {
    const uint8_t *from = stream + at / 64 * 8;
    return load_word(from) >> (at & 63) | load_word(from + 8) << 1 << (63 - (at & 63));
}

[[maybe_unused]] inline uint16_t value_of(unsigned high, unsigned low) {
    const unsigned rotated = high << 8 | low;
    return static_cast<uint16_t>(rotated >> 1 | rotated << 15);
}

// For each group: the level's Group makes its values of the low bytes, the words and the spread bits of longer codes.
template <class Level> bool decode_planes_with(const Planes &planes, uint16_t *out) {
    const typename Level::Table table(planes.table);
    int64_t longer = 0, escapes = 0;
    for (int64_t group = 0; group < planes.groups; ++group) {
        const uint8_t *low = planes.low + 64 * group, *words = planes.bits + 8 * (2 + planes.extra) * group;
        uint64_t bits[8] = {load_word(words), load_word(words + 8)};
        const uint64_t mask = bits[0] & bits[1];
        const int count = __builtin_popcountll(mask);
        if (longer + count > planes.longer) return false;
        for (int i = 0; i < 3; ++i) bits[2 + i] = Level::spread(bits_at(planes.more[i], longer), mask);
        for (int i = 0; i < planes.extra; ++i) bits[5 + i] = load_word(words + 16 + 8 * i);
        longer += count;
        const int64_t first = 64 * group, here = planes.values - first < 64 ? planes.values - first : 64;
        uint16_t tail[64], *values = here == 64 ? out + first : tail;
        Level::group(table, low, bits, planes.extra, values);
        for (uint64_t escaped = bits[2] & bits[3] & bits[4]; escaped; escaped &= escaped - 1) {
            if (escapes == planes.escapes) return false;
            const int i = __builtin_ctzll(escaped);
            values[i] = value_of(planes.escaped[escapes++], low[i]);
        }
        if (here < 64) std::memcpy(out + first, tail, static_cast<size_t>(here) * sizeof *out);
    }
    return longer == planes.longer && escapes == planes.escapes;
}

} // namespace
} // namespace tk
