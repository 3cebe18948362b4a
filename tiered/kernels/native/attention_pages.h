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

// The codes of one group, as scale * (code - zero). Writes whole vectors: what comes after in `out` is overwritten.
template <class V>
inline void widen_group(const uint8_t *codes, bool nibbles, int64_t group, float scale, float zero, float *out) {
    using F = typename V::F;
    const F s = V::set(scale), z = V::set(zero);
    if (!nibbles) {
        for (int64_t i = 0; i < group; i += V::kLanes) {
            const int64_t n = group - i < V::kLanes ? group - i : V::kLanes;
            V::store(out + i, V::mul(V::sub(V::codes(codes + i, n), z), s));
        }
        return;
    }
    const int64_t half = group / 2;
    for (int high = 0; high < 2; high++) {
        for (int64_t i = 0; i < half; i += V::kLanes) {
            const int64_t n = half - i < V::kLanes ? half - i : V::kLanes;
            V::store(out + high * half + i, V::mul(V::sub(V::nibbles(codes + i, n, high), z), s));
        }
    }
}

inline bool is_nibbles(int32_t format) { return format == TK_KV_INT4 || format == TK_KV_INT4_CHANNEL; }
inline bool is_per_channel(int32_t format) { return format == TK_KV_INT8_CHANNEL || format == TK_KV_INT4_CHANNEL; }

// Where a page is quantized per channel: the scales of all channels, then the zeros, `ld` apart.
template <class V> inline void widen_channels(const Source &source, int64_t width, float *channels, int64_t ld) {
    for (int64_t i = 0; i < ld && is_per_channel(source.format); i++) {
        channels[i] = i < width ? V::half(load16(source.scale + i * 2)) : 0;
        channels[ld + i] = i < width ? static_cast<uint8_t>(source.zero[i]) : 0;
    }
}

// One token's channels begin .. end in fp32, to out; `begin` is a multiple of 64. Vectors are written whole.
template <class V>
inline void widen_codes(const Source &source, int64_t group, int64_t k, int64_t begin, int64_t end, float *out,
                        const float *channels, int64_t channels_ld) {
    const bool nibbles = is_nibbles(source.format), per_channel = is_per_channel(source.format);
    const uint8_t *codes = reinterpret_cast<const uint8_t *>(source.codes) + k * source.token_stride;
    for (int64_t c = begin; c < end; c += group) {
        float scale = 1, zero = 0;
        if (!per_channel) {
            scale = V::half(load16(source.scale + (k * source.scale_stride + c / group) * 2));
            zero = static_cast<uint8_t>(source.zero[k * source.zero_stride + c / group]);
        }
        widen_group<V>(codes + (nibbles ? c / 2 : c), nibbles, group, scale, zero, out + c - begin);
    }
    for (int64_t c = begin; c < end && per_channel; c += V::kLanes) {
        const auto less = V::sub(V::load(out + c - begin), V::load(channels + channels_ld + c));
        V::store(out + c - begin, V::mul(less, V::load(channels + c)));
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
