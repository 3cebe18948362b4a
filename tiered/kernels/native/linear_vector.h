// The linear kernel of the vector levels, one template for all widths. In: a linear layer and `V`, a level's vectors.
// Included by linear_LEVEL.cpp alone; everything has internal linkage, see pool.h.
//
// Lanes run along `in`, so weights are read as they lie. A row of x times a row of weights is always the same sequence
// of operations: per block of 1024 weights, fused multiply-adds into one vector in a fixed order, that vector's lanes
// added as a tree, the blocks' sums added in ascending order, then the bias. Weights are exact in fp32. Where they come
// from differs: few tokens take them from the codes through registers, many from four rows of a block widened once into
// cache; both use the same numbers in the same order, so results are bitwise the same for any number of rows.
//
// fp32 and not vdpbf16ps: that multiplies half as many numbers per cycle (measured: 45 against 94 G/s on a core), and
// would round the weights.
#pragma once

#include "linear.h"
#include "linear_output.h"

namespace tk {
namespace {

constexpr int64_t kBlock = 1024;       // weights of a row that one vector adds up; x of one tile of it stays in L1
constexpr int64_t kMostTokens = 256;   // at a time; bounds scratch, and an item's time between looks at `cancel`
constexpr int64_t kAheadBlocks = 2;    // of each row are prefetched
constexpr size_t kStripNbytes = kStrip * kBlock * sizeof(float); // widened: 16 KiB, a third of L1

// One pass over the weights for some of x's rows, and a job's argument.
struct Pass {
    const Linear *l;
    Pool *pool;
    float *x;           // packed: per block, per tile: [vectors][tile's tokens][lanes]
    int64_t first;      // row of x
    int64_t tokens;     // rows of x
    int64_t tiles;      // that these are divided into, of nearly equal size
    int64_t item_rows;  // weight rows of an item
    int group_shift;    // units that share a scale, as a power of two

    int64_t tile(int64_t i) const { return tokens * i / tiles; }
    size_t sums_nbytes() const { return static_cast<size_t>(item_rows * tokens) * sizeof(float); }
};

// Some weight rows' codes, and one block's scales and offsets: a weight is scale * code + offset, where offset is
// -scale * zero; the offset and the sum are exact in fp32. One of a codebook is scale * value.
template <class V, class Unit> struct Strip {
    const Pass &pass;
    const uint8_t *q[kStrip];
    int64_t row[kStrip];
    float scale[kStrip][kBlock / 32], offset[kStrip][kBlock / 32];

    // Rows beyond the last repeat it; their sums are not stored.
    Strip(const Pass &pass, int64_t o) : pass(pass) {
        for (int r = 0; r < kStrip; r++) {
            row[r] = at_most(o + r, pass.l->w.out - 1);
            q[r] = static_cast<const uint8_t *>(pass.l->w.q) + row[r] * pass.l->row_nbytes;
        }
    }

    void enter_block(int64_t start) {
        if (!Unit::kScaled) return;
        const tk_weight &w = pass.l->w;
        const int64_t first = start / w.group, count = at_most(kBlock / w.group, pass.l->groups - first);
        for (int r = 0; r < kStrip; r++) {
            const int64_t i = row[r] * pass.l->groups + first;
            if constexpr (Unit::kLookedUp) {
                for (int64_t g = 0; g < count; g += V::kLanes) V::store(scale[r] + g, V::codebook_scales(w, i + g, count - g));
                continue;
            }
            for (int64_t g = 0; g < count; g += V::kLanes) {
                const typename V::F factor = V::scales(w.scale + i + g, count - g);
                V::store(scale[r] + g, factor);
                V::store(offset[r] + g, V::fnma(factor, V::zeros(w.zero + i + g, count - g), V::zero()));
            }
            __builtin_prefetch(w.scale + i + kAheadBlocks * kBlock / w.group);
            __builtin_prefetch(w.zero + i + kAheadBlocks * kBlock / w.group);
        }
    }

    Unit unit(int r, int64_t start, int64_t u) const {
        const int64_t i = Unit::kScaled ? u >> pass.group_shift : 0;
        const uint8_t *at = q[r] + (start / Unit::kWeights + u) * Unit::kNbytes;
        if constexpr (Unit::kLookedUp) return Unit(at, scale[r][i], pass.l->w.values);
        else return Unit(at, scale[r][i], offset[r][i]);
    }
};

// Four rows times T tokens, weights through registers. sums: [T][stride].
template <class V, class Unit, int T>
void multiply_codes(const Pass &pass, int64_t o, float *sums, int64_t stride) {
    constexpr int kSteps = Unit::kWeights / V::kLanes;
    const Linear &l = *pass.l;
    Strip<V, Unit> strip(pass, o);
    const int64_t block_nbytes = kBlock / Unit::kWeights * Unit::kNbytes;
    for (int64_t start = 0; start < l.w.in; start += kBlock) {
        const int64_t units = at_most(kBlock, l.w.in - start) / Unit::kWeights;
        strip.enter_block(start);
        // Past a row's end come the next rows, the following strip's among them.
        int64_t ahead = (start / kBlock + kAheadBlocks) * block_nbytes;
        if (ahead >= l.row_nbytes) ahead += (kStrip - 1) * l.row_nbytes;
        typename V::F acc[kStrip][T];
        for (int r = 0; r < kStrip; r++)
            for (int t = 0; t < T; t++) acc[r][t] = V::zero();
        const float *x = pass.x + start * T;
        for (int64_t u = 0; u < units; u++) {
#pragma GCC unroll 4
            for (int r = 0; r < kStrip; r++) {
                const Unit unit = strip.unit(r, start, u);
                __builtin_prefetch(strip.q[r] + ahead + u * Unit::kNbytes);
#pragma GCC unroll 16
                for (int s = 0; s < kSteps; s++) {
                    const typename V::F w = unit.at(s);
#pragma GCC unroll 8
                    for (int t = 0; t < T; t++) acc[r][t] = V::fma(w, V::load(x + (s * T + t) * V::kLanes), acc[r][t]);
                }
            }
            x += Unit::kWeights * T;
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) V::add_sums(sums + t * stride, acc[0][t], acc[1][t], acc[2][t], acc[3][t]);
    }
}

// Four rows' block in fp32: [vectors][kStrip][lanes].
template <class V, class Unit> void widen_strip(Strip<V, Unit> &strip, int64_t start, int64_t units, float *out) {
    constexpr int kSteps = Unit::kWeights / V::kLanes;
    strip.enter_block(start);
    for (int64_t u = 0; u < units; u++) {
#pragma GCC unroll 4
        for (int r = 0; r < kStrip; r++) {
            const Unit unit = strip.unit(r, start, u);
#pragma GCC unroll 16
            for (int s = 0; s < kSteps; s++) V::store(out + (s * kStrip + r) * V::kLanes, unit.at(s));
        }
        out += Unit::kWeights * kStrip;
    }
}

// What a kernel fetches while it computes: `step` bytes per vector, from four rows one after the other.
struct Ahead {
    const uint8_t *data;
    int64_t row_nbytes, step;
};

// Four rows times T tokens of one block, weights from `widen_strip`.
template <class V, int T>
void multiply_widened(const float *w, const float *x, int64_t vectors, float *sums, int64_t stride, Ahead ahead) {
    typename V::F acc[kStrip][T];
    for (int r = 0; r < kStrip; r++)
        for (int t = 0; t < T; t++) acc[r][t] = V::zero();
    for (int part = 0; part < kStrip; part++) {
        const uint8_t *fetched = ahead.data + part * ahead.row_nbytes;
        for (int64_t v = vectors * part / kStrip; v < vectors * (part + 1) / kStrip; v++) {
            __builtin_prefetch(fetched);
            __builtin_prefetch(fetched + ahead.step / 2);
            fetched += ahead.step;
            typename V::F row[kStrip];
#pragma GCC unroll 4
            for (int r = 0; r < kStrip; r++) row[r] = V::load(w + r * V::kLanes);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                const typename V::F token = V::load(x + t * V::kLanes);
#pragma GCC unroll 4
                for (int r = 0; r < kStrip; r++) acc[r][t] = V::fma(row[r], token, acc[r][t]);
            }
            w += kStrip * V::kLanes;
            x += T * V::kLanes;
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) V::add_sums(sums + t * stride, acc[0][t], acc[1][t], acc[2][t], acc[3][t]);
}

template <class V, class Unit, int T = V::kTokens>
void multiply_codes_of(int64_t tokens, const Pass &pass, int64_t o, float *sums, int64_t stride) {
    if (tokens == T) return multiply_codes<V, Unit, T>(pass, o, sums, stride);
    if constexpr (T > 1) multiply_codes_of<V, Unit, T - 1>(tokens, pass, o, sums, stride);
}

template <class V, int T = V::kTokens>
void multiply_widened_of(int64_t tokens, const float *w, const float *x, int64_t vectors, float *sums, int64_t stride,
                         Ahead ahead) {
    if (tokens == T) return multiply_widened<V, T>(w, x, vectors, sums, stride, ahead);
    if constexpr (T > 1) multiply_widened_of<V, T - 1>(tokens, w, x, vectors, sums, stride, ahead);
}

template <class V, class Unit>
void multiply_many(const Pass &pass, int64_t o, int64_t rows, float *widened, float *sums) {
    const Linear &l = *pass.l;
    const int64_t row_step = Unit::kNbytes * V::kLanes / Unit::kWeights * kStrip;
    for (int64_t start = 0; start < l.w.in; start += kBlock) {
        const int64_t weights = at_most(kBlock, l.w.in - start), vectors = weights / V::kLanes;
        for (int64_t r = 0; r < rows; r += kStrip) {
            Strip<V, Unit> strip(pass, o + r);
            widen_strip<V, Unit>(strip, start, weights / Unit::kWeights, widened);
            const uint8_t *next = static_cast<const uint8_t *>(l.w.q) + (o + r) * l.row_nbytes +
                                  (start + kBlock) / Unit::kWeights * Unit::kNbytes;
            const Ahead here = {reinterpret_cast<const uint8_t *>(widened), 0, 0};
            for (int64_t i = 0; i < pass.tiles; i++) {
                const int64_t first = pass.tile(i), tokens = pass.tile(i + 1) - first;
                const float *x = pass.x + start * pass.tokens + first * weights;
                multiply_widened_of<V>(tokens, widened, x, vectors, sums + first * pass.item_rows + r, pass.item_rows,
                                       i == 0 ? Ahead{next, l.row_nbytes, row_step} : here);
            }
        }
    }
}

template <class V, class Unit> void compute_item(void *argument, int worker, int64_t item) {
    const Pass &pass = *static_cast<const Pass *>(argument);
    const int64_t o = item * pass.item_rows, rows = at_most(pass.item_rows, pass.l->w.out - o);
    const size_t sums_nbytes = pass.sums_nbytes();
    char *scratch = static_cast<char *>(pass.pool->scratch(worker, kStripNbytes + sums_nbytes)); // not null: see below
    float *widened = reinterpret_cast<float *>(scratch), *sums = reinterpret_cast<float *>(scratch + kStripNbytes);
    std::memset(sums, 0, sums_nbytes);
    if (pass.tiles == 1) {
        for (int64_t r = 0; r < rows; r += kStrip)
            multiply_codes_of<V, Unit>(pass.tokens, pass, o + r, sums + r, pass.item_rows);
    } else {
        multiply_many<V, Unit>(pass, o, rows, widened, sums);
    }
    store_sums(*pass.l, pass.first, pass.tokens, o, rows, sums, pass.item_rows);
}

template <class V, class Unit> void pack_tile(void *argument, int, int64_t tile) {
    const Pass &pass = *static_cast<const Pass *>(argument);
    const Linear &l = *pass.l;
    const int64_t first = pass.tile(tile), tokens = pass.tile(tile + 1) - first;
    for (int64_t start = 0; start < l.w.in; start += kBlock) {
        const int64_t weights = at_most(kBlock, l.w.in - start);
        float *block = pass.x + start * pass.tokens + first * weights;
        for (int64_t t = 0; t < tokens; t++) {
            const uint16_t *x = l.x + (pass.first + first + t) * l.ldx + start;
            float *out = block + t * V::kLanes;
            for (int64_t u = 0; u < weights; u += Unit::kWeights) {
                for (int s = 0; s < Unit::kWeights / V::kLanes; s++) {
                    V::store(out, V::widen(x + u + Unit::position(s)));
                    out += tokens * V::kLanes;
                }
            }
        }
    }
}

template <class V, class Unit> int linear_of_unit(const Linear &l, Pool &pool) {
    const int64_t passes = (l.rows + kMostTokens - 1) / kMostTokens;
    Pass pass = {};
    pass.l = &l;
    pass.pool = &pool;
    pass.item_rows = item_rows_of(l, pool);
    while (l.w.format != TK_DENSE_BF16 && Unit::kWeights << pass.group_shift < l.w.group) pass.group_shift++;
    const int64_t most = (l.rows + passes - 1) / passes;
    pass.tokens = most;
    pass.x = static_cast<float *>(pool.scratch(pool.shared(), static_cast<size_t>(most * l.w.in) * sizeof(float)));
    if (!pass.x) return TK_NO_MEMORY;
    for (int worker = 0; worker < pool.threads(); worker++) {
        if (!pool.scratch(worker, kStripNbytes + pass.sums_nbytes())) return TK_NO_MEMORY;
    }
    const int64_t items = (l.w.out + pass.item_rows - 1) / pass.item_rows;
    for (pass.first = 0; pass.first < l.rows; pass.first += most) {
        pass.tokens = at_most(most, l.rows - pass.first);
        pass.tiles = (pass.tokens + V::kTokens - 1) / V::kTokens;
        if (!pool.run(pass.tiles, pack_tile<V, Unit>, &pass, l.cancel)) return TK_CANCELLED;
        if (!pool.run(items, compute_item<V, Unit>, &pass, l.cancel)) return TK_CANCELLED;
    }
    return TK_OK;
}

template <class V, template <int> class Unit> int linear_of_group(const Linear &l, Pool &pool) {
    if (l.w.group == 32) return linear_of_unit<V, Unit<32>>(l, pool);
    return l.w.group == 64 ? linear_of_unit<V, Unit<64>>(l, pool) : linear_of_unit<V, Unit<128>>(l, pool);
}

template <class V> int linear_vector(const Linear &l, Pool &pool) {
    if (l.w.format == TK_DENSE_BF16) return linear_of_unit<V, typename V::Bf16>(l, pool);
    if (l.w.format == TK_INT8) return linear_of_unit<V, typename V::Int8>(l, pool);
    if (l.w.format == TK_CODEBOOK) return linear_of_group<V, V::template Codebook>(l, pool);
    return linear_of_group<V, V::template Int4>(l, pool);
}

} // namespace
} // namespace tk
