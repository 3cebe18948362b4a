// The fast mode's linear kernel of the vector levels: activations in 8 bits. In: a linear layer of quantized weights,
// and a level's vectors, codes included. Included by linear_fast_LEVEL.cpp alone; internal linkage, see pool.h.
//
// Each group of a token's activations is rounded to int8 with a scale of its own, largest magnitude / 127: codes are
// multiplied by codes, and a group's sum by the product of the two scales. Zero points are subtracted by way of the sum
// of the group's rounded activations. Relative error against exact activations, in = 12288: 6e-3 on normal ones, 1.4e-2
// where 6 channels are 60 times larger (one scale per token would make that 1.4e-1).
#pragma once

#include "linear_output.h"

namespace tk {
namespace {

constexpr int64_t kMostFastTokens = 256;  // at a time; bounds scratch
constexpr int64_t kFastAheadNbytes = 1024; // of each row are prefetched
constexpr float kLeastMagnitude = 1e-30f; // a group below it counts as zero: 127 / it must be finite

// One pass over the weights for some of x's rows, and a job's argument.
struct FastPass {
    const Linear *l;
    Pool *pool;
    uint8_t *codes;  // of x, per tile: [strips][tile's tokens][a strip's activations]
    float *scales;   // of x's groups, per tile: [spans][tile's tokens][2][lanes]: scale, scale * sum of codes
    int64_t first;   // row of x
    int64_t tokens;  // rows of x
    int64_t tiles;   // that these are divided into
    int64_t strips;  // per row of weights; a strip is what one vector of codes holds
    int64_t spans;   // per row of weights; a span is as many groups as a vector has lanes
    int64_t item_rows;

    int64_t tile(int64_t i) const { return tokens * i / tiles; }
    size_t sums_nbytes() const { return static_cast<size_t>(item_rows * tokens) * sizeof(float); }
};

// Four rows times T tokens. sums: [T][stride].
template <class V, class Codes, int group, int T>
void multiply_fast(const FastPass &pass, int64_t o, int64_t first, float *sums, int64_t stride) {
    using F = typename V::F;
    constexpr int kSpanStrips = V::kLanes * group / Codes::kWeights;
    constexpr int kShared = Codes::kWeights > group ? Codes::kWeights / group : 1; // scales of a strip
    const Linear &l = *pass.l;
    const uint8_t *q[kStrip];
    int64_t groups_of[kStrip];
    F acc[kStrip][T];
    for (int r = 0; r < kStrip; r++) {
        const int64_t row = at_most(o + r, l.w.out - 1);
        q[r] = static_cast<const uint8_t *>(l.w.q) + row * l.row_nbytes;
        groups_of[r] = row * l.groups;
        for (int t = 0; t < T; t++) acc[r][t] = V::zero();
    }
    const uint8_t *codes = pass.codes + first * pass.strips * Codes::kActivationNbytes;
    const float *scales = pass.scales + first * pass.spans * 2 * V::kLanes;
    for (int64_t span = 0; span < pass.spans; span++) {
        float product[kStrip][T][V::kLanes];
        const int64_t g = span * V::kLanes, count = at_most(l.groups - g, V::kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < kStrip; r++) {
            // The next strip's scales and zeros lie right behind this one's.
            const int64_t next = groups_of[r] + kStrip * l.groups + g;
            __builtin_prefetch(l.w.scale + next);
            __builtin_prefetch(l.w.zero + next);
            const F scale = V::scales(l.w.scale + groups_of[r] + g, count);
            const F offset = V::multiply(scale, V::zeros(l.w.zero + groups_of[r] + g, count));
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                V::store(product[r][t], V::multiply(scale, V::load(scales + t * 2 * V::kLanes)));
                acc[r][t] = V::fnma(offset, V::load(scales + (t * 2 + 1) * V::kLanes), acc[r][t]);
            }
        }
        scales += T * 2 * V::kLanes;
        const int64_t begin = span * kSpanStrips, end = at_most(begin + kSpanStrips, pass.strips);
        for (int64_t c = begin; c < end; c++) {
            const int64_t at = c * Codes::kNbytes, left = l.row_nbytes - at;
            int64_t ahead = at + kFastAheadNbytes;
            if (ahead >= l.row_nbytes) ahead += (kStrip - 1) * l.row_nbytes; // the next strip
            const int64_t within = (c - begin) * Codes::kWeights / group;
#pragma GCC unroll 4
            for (int r = 0; r < kStrip; r++) {
                const Codes w(q[r] + at, left);
                __builtin_prefetch(q[r] + ahead);
#pragma GCC unroll 4
                for (int t = 0; t < T; t++) {
                    const F dot = w.dot(codes + t * Codes::kActivationNbytes);
                    acc[r][t] = V::fma(dot, V::template spread<kShared>(product[r][t] + within), acc[r][t]);
                }
            }
            codes += T * Codes::kActivationNbytes;
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) V::add_sums(sums + t * stride, acc[0][t], acc[1][t], acc[2][t], acc[3][t]);
}

template <class V, class Codes, int group, int T = V::kFastTokens>
void multiply_fast_of(int64_t tokens, const FastPass &pass, int64_t o, int64_t first, float *sums, int64_t stride) {
    if (tokens == T) return multiply_fast<V, Codes, group, T>(pass, o, first, sums, stride);
    if constexpr (T > 1) multiply_fast_of<V, Codes, group, T - 1>(tokens, pass, o, first, sums, stride);
}

template <class V, class Codes, int group> void compute_fast_item(void *argument, int worker, int64_t item) {
    const FastPass &pass = *static_cast<const FastPass *>(argument);
    const int64_t o = item * pass.item_rows, rows = at_most(pass.item_rows, pass.l->w.out - o);
    float *sums = static_cast<float *>(pass.pool->scratch(worker, pass.sums_nbytes())); // not null: see below
    std::memset(sums, 0, pass.sums_nbytes());
    for (int64_t r = 0; r < rows; r += kStrip) {
        for (int64_t i = 0; i < pass.tiles; i++) {
            const int64_t first = pass.tile(i), tokens = pass.tile(i + 1) - first;
            multiply_fast_of<V, Codes, group>(tokens, pass, o + r, first, sums + first * pass.item_rows + r,
                                              pass.item_rows);
        }
    }
    store_sums(*pass.l, pass.first, pass.tokens, o, rows, sums, pass.item_rows);
}

struct Rounded {
    float scale;
    int32_t sum;
};

// A group of activations in int8.
template <int group> Rounded round_group(const uint16_t *x, int8_t *codes) {
    uint16_t bits[group];
    std::memcpy(bits, x, sizeof bits);
    int32_t largest = 0; // magnitudes compare as their bits do
    for (int i = 0; i < group; i++) {
        const int32_t magnitude = bits[i] & 0x7fff;
        largest = magnitude > largest ? magnitude : largest;
    }
    const float most = from_bf16(static_cast<uint16_t>(largest));
    const float inverse = most < kLeastMagnitude ? 0 : 127.0f / most;
    constexpr float kRounder = 12582912.0f; // 1.5 * 2^23: adding it rounds to nearest even
    int32_t sum = 0;
    for (int i = 0; i < group; i++) {
        const float shifted = from_bf16(bits[i]) * inverse + kRounder;
        const int8_t code = static_cast<int8_t>(as_bits(shifted) - as_bits(kRounder));
        codes[i] = code;
        sum += code;
    }
    return {most < kLeastMagnitude ? 0 : most / 127.0f, sum};
}

template <class V, class Codes, int group> void pack_fast_tile(void *argument, int, int64_t tile) {
    constexpr int kRun = 16; // codes that stay together
    const FastPass &pass = *static_cast<const FastPass *>(argument);
    const Linear &l = *pass.l;
    const int64_t first = pass.tile(tile), tokens = pass.tile(tile + 1) - first;
    uint8_t *codes = pass.codes + first * pass.strips * Codes::kActivationNbytes;
    float *scales = pass.scales + first * pass.spans * 2 * V::kLanes;
    // Activations that belong to no group must count as zero.
    std::memset(codes + (pass.strips - 1) * tokens * Codes::kActivationNbytes, 0,
                static_cast<size_t>(tokens * Codes::kActivationNbytes));
    std::memset(scales + (pass.spans - 1) * tokens * 2 * V::kLanes, 0,
                static_cast<size_t>(tokens * 2 * V::kLanes) * sizeof(float));
    for (int64_t t = 0; t < tokens; t++) {
        const uint16_t *x = l.x + (pass.first + first + t) * l.ldx;
        for (int64_t g = 0; g < l.groups; g++) {
            int8_t rounded[group];
            const Rounded of = round_group<group>(x + g * group, rounded);
            float *scale = scales + (g / V::kLanes * tokens + t) * 2 * V::kLanes + g % V::kLanes;
            scale[0] = of.scale;
            scale[V::kLanes] = of.scale * static_cast<float>(of.sum);
            constexpr int kPart = group / Codes::kParts; // of a group, per nibble
            for (int i = 0; i < kPart; i += kRun) {
                const int64_t byte = g * kPart + i;
                uint8_t *strip = codes + (byte / Codes::kNbytes * tokens + t) * Codes::kActivationNbytes;
                for (int part = 0; part < Codes::kParts; part++)
                    Codes::place(rounded + part * kPart + i, strip, part, static_cast<int>(byte % Codes::kNbytes));
            }
        }
    }
}

template <class V, class Codes, int group> int linear_fast_of(const Linear &l, Pool &pool) {
    const int64_t passes = (l.rows + kMostFastTokens - 1) / kMostFastTokens, most = (l.rows + passes - 1) / passes;
    FastPass pass = {};
    pass.l = &l;
    pass.pool = &pool;
    pass.tokens = most;
    pass.strips = (l.row_nbytes + Codes::kNbytes - 1) / Codes::kNbytes;
    pass.spans = (l.groups + V::kLanes - 1) / V::kLanes;
    pass.item_rows = item_rows_of(l, pool);
    const size_t codes_nbytes = static_cast<size_t>(most * pass.strips * Codes::kActivationNbytes);
    const size_t scales_nbytes = static_cast<size_t>(most * pass.spans * 2 * V::kLanes) * sizeof(float);
    pass.codes = static_cast<uint8_t *>(pool.scratch(pool.shared(), codes_nbytes + scales_nbytes));
    if (!pass.codes) return TK_NO_MEMORY;
    pass.scales = reinterpret_cast<float *>(pass.codes + codes_nbytes);
    for (int worker = 0; worker < pool.threads(); worker++) {
        if (!pool.scratch(worker, pass.sums_nbytes())) return TK_NO_MEMORY;
    }
    const int64_t items = (l.w.out + pass.item_rows - 1) / pass.item_rows;
    for (pass.first = 0; pass.first < l.rows; pass.first += most) {
        pass.tokens = at_most(most, l.rows - pass.first);
        pass.tiles = (pass.tokens + V::kFastTokens - 1) / V::kFastTokens;
        if (!pool.run(pass.tiles, pack_fast_tile<V, Codes, group>, &pass, l.cancel)) return TK_CANCELLED;
        if (!pool.run(items, compute_fast_item<V, Codes, group>, &pass, l.cancel)) return TK_CANCELLED;
    }
    return TK_OK;
}

template <class V, class Codes> int linear_fast_vector(const Linear &l, Pool &pool) {
    if (l.w.group == 32) return linear_fast_of<V, Codes, 32>(l, pool);
    if (l.w.group == 64) return linear_fast_of<V, Codes, 64>(l, pool);
    return linear_fast_of<V, Codes, 128>(l, pool);
}

} // namespace
} // namespace tk
