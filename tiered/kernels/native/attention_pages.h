// Pages of a cache as the levels read them: found by the tables, and widened to fp32. V is an instruction set. Internal
// linkage throughout, see pool.h.
#pragma once

#include "attention.h"
#include "numbers.h"

namespace tk {
namespace {

// One kv head of one page, where it lies.
struct Source {
    int32_t format;
    const char *codes, *scale, *zero;
    int64_t token_stride, scale_stride, zero_stride; // elements
};

inline const char *block_of(const tk_table &table, int64_t at) {
    return table.offsets && table.offsets[at] >= 0 ? static_cast<const char *>(table.base) + table.offsets[at] : nullptr;
}

// A head's part of a block.
inline const char *part_of(const char *block, const tk_plane &plane, int64_t h, int64_t element_nbytes) {
    return block + plane.start + h * plane.head_stride * element_nbytes;
}

inline Source source_of(const tk_attention_args &a, const tk_pages &pages, int64_t s, int64_t h, int64_t page,
                        bool own) {
    const int64_t at = s * a.table_stride + page;
    Source source = {};
    const char *block = block_of(pages.blocks, at), *recent = own || !block ? block_of(pages.recent, at) : nullptr;
    if (recent) {
        source.codes = part_of(recent, pages.exact, h, 2);
        source.token_stride = pages.exact.token_stride;
        return source; // TK_KV_BF16 is 0
    }
    source.format = pages.format;
    source.codes = part_of(block, pages.codes, h, pages.format == TK_KV_BF16 ? 2 : 1);
    source.token_stride = pages.codes.token_stride;
    if (pages.format == TK_KV_BF16) return source;
    source.scale = part_of(block, pages.scale, h, 2);
    source.zero = part_of(block, pages.zero, h, 1);
    source.scale_stride = pages.scale.token_stride;
    source.zero_stride = pages.zero.token_stride;
    return source;
}

inline uint16_t load16(const char *from) {
    uint16_t bits;
    std::memcpy(&bits, from, sizeof bits);
    return bits;
}

inline bool is_nibbles(int32_t format) { return format == TK_KV_INT4 || format == TK_KV_INT4_CHANNEL; }
inline bool is_per_channel(int32_t format) { return format == TK_KV_INT8_CHANNEL || format == TK_KV_INT4_CHANNEL; }

// scale * (code - zero) for codes of a token and group of channels, which share both.
template <class V> struct TokenGrid {
    typename V::F scale, zero;
    typename V::Nibbles table;

    TokenGrid(float s, float z) : scale(V::set(s)), zero(V::set(z)), table(scale, zero) {}
    typename V::F of_codes(const uint8_t *codes, int64_t count, int64_t) const {
        return V::mul(V::sub(V::codes(codes, count), zero), scale);
    }
    typename V::F of_nibbles(const uint8_t *codes, int64_t count, bool high, int64_t) const {
        return table.at(codes, count, high);
    }
};

// The same where every channel has its own, in fp32 from `scales` and `zeros` on.
template <class V> struct ChannelGrid {
    const float *scales, *zeros;

    typename V::F of_codes(const uint8_t *codes, int64_t count, int64_t c) const {
        return V::mul(V::sub(V::codes(codes, count), V::load(zeros + c)), V::load(scales + c));
    }
    typename V::F of_nibbles(const uint8_t *codes, int64_t count, bool high, int64_t c) const {
        return V::mul(V::sub(V::nibbles(codes, count, high), V::load(zeros + c)), V::load(scales + c));
    }
};

// The codes of one group. Writes whole vectors: what comes after in `out` is overwritten.
template <class V, class Grid>
inline void widen_group(const uint8_t *codes, bool nibbles, int64_t group, const Grid &grid, float *out) {
    const int64_t stop = nibbles ? group / 2 : group;
    for (int64_t i = 0; i < stop; i += V::kLanes) {
        const int64_t n = stop - i < V::kLanes ? stop - i : V::kLanes;
        V::store(out + i, nibbles ? grid.of_nibbles(codes + i, n, false, i) : grid.of_codes(codes + i, n, i));
    }
    if (!nibbles) return;
    // A loop of its own: one over both halves takes a tenth longer.
    for (int64_t i = 0; i < stop; i += V::kLanes) {
        const int64_t n = stop - i < V::kLanes ? stop - i : V::kLanes;
        V::store(out + stop + i, grid.of_nibbles(codes + i, n, true, stop + i));
    }
}

// Where a page is quantized per channel: the scales of all channels, then the zeros, `ld` apart; 0 beyond `width`, up to
// `ld`, which is a vector more than whole vectors of channels take.
template <class V> inline void widen_channels(const Source &source, int64_t width, float *channels, int64_t ld) {
    if (!is_per_channel(source.format)) return;
    const uint16_t *scale = reinterpret_cast<const uint16_t *>(source.scale);
    const uint8_t *zero = reinterpret_cast<const uint8_t *>(source.zero);
    for (int64_t i = 0; i < ld; i += V::kLanes) {
        const bool is_there = i < width;
        V::store(channels + i, is_there ? V::scales(scale + i, width - i) : V::zero());
        V::store(channels + ld + i, is_there ? V::zeros(zero + i, width - i) : V::zero());
    }
}

// One token's channels begin .. end in fp32, to out; `begin` is a multiple of 64. Vectors are written whole.
template <class V>
inline void widen_codes(const Source &source, int64_t group, int64_t k, int64_t begin, int64_t end, float *out,
                        const float *channels, int64_t channels_ld) {
    const bool nibbles = is_nibbles(source.format);
    const uint8_t *codes = reinterpret_cast<const uint8_t *>(source.codes) + k * source.token_stride;
    for (int64_t c = begin; c < end; c += group) {
        const uint8_t *from = codes + (nibbles ? c / 2 : c);
        if (is_per_channel(source.format)) {
            const ChannelGrid<V> grid = {channels + c, channels + channels_ld + c};
            widen_group<V>(from, nibbles, group, grid, out + c - begin);
        } else {
            const float scale = V::half(load16(source.scale + (k * source.scale_stride + c / group) * 2));
            const float zero = static_cast<uint8_t>(source.zero[k * source.zero_stride + c / group]);
            widen_group<V>(from, nibbles, group, TokenGrid<V>(scale, zero), out + c - begin);
        }
    }
}

// Channels begin .. end of tokens from .. to, rows `ld` apart. What a row's last vector holds beyond is finite.
template <class V>
__attribute__((noinline)) void widen(const Source &source, int64_t width, int64_t from, int64_t to, int64_t begin,
                                     int64_t end, float *out, int64_t ld, const float *channels, int64_t channels_ld) {
    const int64_t group = width & -width & 63 ? width & -width : 64; // gcd(width, 64)
    for (int64_t k = from; k < to; k++, out += ld) {
        if (source.format != TK_KV_BF16) {
            widen_codes<V>(source, group, k, begin, end, out, channels, channels_ld);
            continue;
        }
        const uint16_t *bf16 = reinterpret_cast<const uint16_t *>(source.codes) + k * source.token_stride;
        int64_t c = begin;
        for (; c + V::kLanes <= end; c += V::kLanes) V::store(out + c - begin, V::widen(bf16 + c));
        if (c < end) V::store(out + c - begin, V::widen_part(bf16 + c, end - c));
    }
}

} // namespace
} // namespace tk
