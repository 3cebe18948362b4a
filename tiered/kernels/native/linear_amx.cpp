// bf16 tiles: one kernel for any number of tokens, so that a row's result is the same bits in every batch.
//
// The weights are the first operand of a multiplication (16 rows of `out` by 32 of `in`), activations the second, packed
// once per call; results come out as y transposed. Every result is one chain of multiplications over `in`, ascending:
// which tokens share a tile, and whether sums wait in registers or in memory, does not change a bit.
//
//     few tokens   16 rows of the weight over all of `in`; sums stay in tiles; a unit is widened while the one before
//                  it is multiplied
//     many         a block of rows times all tokens: per 256 of `in`, 32 rows are widened into the first-level cache
//                  and multiplied with every pair of token tiles; sums wait in the second-level cache

#include "widen_amx.h"

namespace tk {

namespace {

constexpr int kUnitTilesNbytes = kSteps * kTileNbytes; // a unit of 16 rows, widened
constexpr int kFewTiles = 3;                           // token tiles whose sums stay in registers
constexpr int64_t kFastTokens = 4;                      // in fast mode, left to 8-bit integers
constexpr int kPackUnits = 8;
constexpr int64_t kAheadUnits = 8;
constexpr int kBlockUnits = 2;       // of `in`, per widening of a panel
constexpr int kPanelTiles = 2;       // of 16 rows
constexpr int64_t kBlockRows = 512;  // whose sums wait in the second-level cache together
constexpr int64_t kMostTokens = 256; // more are computed one part after the other, which bounds the scratch

// [token tile][unit][step][16 pairs][columns] of two bf16.
struct Packed {
    uint8_t *data;
    int columns; // of a tile: tokens
    int64_t step_nbytes, unit_nbytes, tile_nbytes;
};

struct Call {
    const Linear *l;
    Packed x;
    int64_t units, token_tiles;
    Pool *pool;
    bool failed; // a worker got no scratch
    WordOrder order; // of a step's words
};

template <int N> struct Number {
    static constexpr int value = N;
};

// kPackUnits units of one token tile.
void pack(void *argument, int, int64_t item) {
    const Call &call = *static_cast<const Call *>(argument);
    const Linear &l = *call.l;
    const int64_t per_tile = ceil_div(call.units, kPackUnits);
    const int64_t tile = item / per_tile, begin = item % per_tile * kPackUnits;
    const int64_t tokens = least(16, l.rows - tile * 16);
    for (int64_t u = begin; u < least(begin + kPackUnits, call.units); u++) {
        __m512i step[kSteps][16] = {};
        for (int64_t t = 0; t < tokens; t++) {
            const uint16_t *x = l.x + (tile * 16 + t) * l.ldx + u * kUnit;
            __m512i z[4];
            for (int i = 0; i < 4; i++) z[i] = _mm512_maskz_loadu_epi16(first32(l.w.in - u * kUnit - 32 * i), x + 32 * i);
            for (int s = 0; s < kSteps; s++) step[s][t] = call.order.pick(z, s);
        }
        uint8_t *out = call.x.data + tile * call.x.tile_nbytes + u * call.x.unit_nbytes;
        for (int s = 0; s < kSteps; s++) {
            transpose16(step[s]); // [token][pair] to [pair][token]
            for (int r = 0; r < 16; r++) {
                uint8_t *to = out + s * call.x.step_nbytes + r * 4 * call.x.columns;
                _mm512_mask_storeu_epi32(to, first16(call.x.columns), step[s][r]);
            }
        }
    }
}

// Results of a sum tile [16 weights][columns], for tokens from `token` on.
TK_INLINE void put_tile(const Linear &l, int64_t token, int64_t o, const float *tile, int columns) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_maskz_loadu_epi32(first16(columns), tile + i * columns);
    transpose16(r);
    for (int c = 0; c < columns && token + c < l.rows; c++) put16(l, token + c, o, _mm512_castsi512_ps(r[c]));
}

// Step S of a unit in flight: widen a quarter of the rows of one unit, multiply step S of the one before.
template <class F, int S> struct Widening {
    static TK_INLINE void rows(const Linear &l, const Rows &rows, int64_t unit, const Scales &scales, int slot,
                               int64_t ahead, uint8_t *to) {
        const int64_t at = unit * F::kUnitNbytes, left = l.w.in - unit * kUnit;
        for (int r = S * 4; r < S * 4 + 4; r++) {
            for (int i = 0; i < F::kUnitNbytes; i += 64) {
                _mm_prefetch(reinterpret_cast<const char *>(rows.q[r] + at + ahead + i), _MM_HINT_T0);
            }
            F::widen(rows.q[r] + at, left, &scales.scale[r][slot], beside<F>(l, scales, r, slot), to + r * 64);
        }
    }
};

template <int kTiles> TK_INLINE void multiply_step(const Packed &x, const uint8_t *weights, const uint8_t *activations) {
    tile_load<6>(weights, 64);
    tile_load<7>(activations, 4 * x.columns);
    tile_multiply<0, 6, 7>();
    if (kTiles > 1) {
        tile_load<5>(activations + x.tile_nbytes, 4 * x.columns);
        tile_multiply<1, 6, 5>();
    }
    if (kTiles > 2) {
        tile_load<7>(activations + 2 * x.tile_nbytes, 4 * x.columns);
        tile_multiply<2, 6, 7>();
    }
}

template <class F, int kTiles> void few(void *argument, int, int64_t item) {
    const Call &call = *static_cast<const Call *>(argument);
    const Linear &l = *call.l;
    TileConfig config;
    for (int t = 0; t < 8; t++) config.set(t, call.x.columns);
    config.set(6, 16);
    tiles_begin(config);
    tile_zero<0>();
    if (kTiles > 1) tile_zero<1>();
    if (kTiles > 2) tile_zero<2>();
    alignas(64) uint8_t widened[2][kUnitTilesNbytes];
    Scales scales;
    const Rows rows = rows_at(l, item * 16);
    constexpr int kPerScales = F::kGroups ? kScaleGroups / F::kGroups : 1; // units
    for (int64_t u = 0; u <= call.units; u++) {
        const int slot = static_cast<int>(u % kPerScales) * F::kGroups;
        if (F::kGroups && slot == 0 && u < call.units) load_scales<F>(l, rows, u * F::kGroups, scales);
        uint8_t *to = widened[u & 1];
        const uint8_t *from = widened[~u & 1], *x = call.x.data + (u - 1) * call.x.unit_nbytes;
        // Beyond a row's end comes the row of the next 16, 15 rows further on.
        const bool inside = (u + kAheadUnits) * F::kUnitNbytes < l.row_nbytes;
        const int64_t ahead = kAheadUnits * F::kUnitNbytes + (inside ? 0 : 15 * l.row_nbytes);
        const auto step = [&](auto s) __attribute__((always_inline)) {
            constexpr int S = decltype(s)::value;
            if (u < call.units) Widening<F, S>::rows(l, rows, u, scales, slot, ahead, to);
            if (u > 0) multiply_step<kTiles>(call.x, from + S * kTileNbytes, x + S * call.x.step_nbytes);
        };
        step(Number<0>());
        step(Number<1>());
        step(Number<2>());
        step(Number<3>());
    }
    alignas(64) float sums[kFewTiles][256];
    tile_store<0>(sums[0], 4 * call.x.columns);
    if (kTiles > 1) tile_store<1>(sums[1], 4 * call.x.columns);
    if (kTiles > 2) tile_store<2>(sums[2], 4 * call.x.columns);
    tiles_end();
    for (int t = 0; t < kTiles; t++) put_tile(l, t * 16, item * 16, sums[t], call.x.columns);
}

// Two tiles of rows by kTokenTiles: `steps` multiplications onto the sums at `sums` [token tile][row tile][256].
template <int kTokenTiles>
TK_INLINE void multiply_pair(const Packed &x, const uint8_t *weights, int64_t row_tile_nbytes, const uint8_t *activations,
                             int64_t steps, bool fresh, float *sums) {
    if (fresh) {
        tile_zero<0>();
        tile_zero<1>();
        if (kTokenTiles > 1) tile_zero<2>(), tile_zero<3>();
    } else {
        tile_load<0>(sums, 64);
        tile_load<1>(sums + 256, 64);
        if (kTokenTiles > 1) tile_load<2>(sums + 512, 64), tile_load<3>(sums + 768, 64);
    }
    for (int64_t s = 0; s < steps; s++) {
        tile_load<4>(weights + s * kTileNbytes, 64);
        tile_load<6>(activations + s * kTileNbytes, 64);
        tile_load<5>(weights + row_tile_nbytes + s * kTileNbytes, 64);
        tile_multiply<0, 4, 6>();
        tile_multiply<1, 5, 6>();
        if (kTokenTiles > 1) {
            tile_load<7>(activations + x.tile_nbytes + s * kTileNbytes, 64);
            tile_multiply<2, 4, 7>();
            tile_multiply<3, 5, 7>();
        }
    }
    tile_store<0>(sums, 64);
    tile_store<1>(sums + 256, 64);
    if (kTokenTiles > 1) tile_store<2>(sums + 512, 64), tile_store<3>(sums + 768, 64);
}

// Units first .. first + count of 32 rows, to [row tile][unit][step][16][64].
template <class F>
TK_INLINE void widen_panel(const Linear &l, int64_t row, int64_t first, int64_t count, uint8_t *out) {
    for (int tile = 0; tile < kPanelTiles; tile++) {
        const Rows rows = rows_at(l, row + 16 * tile);
        Scales scales;
        // A block of units needs fewer groups than are loaded; the loading is a small part of widening.
        if (F::kGroups) load_scales<F>(l, rows, first * F::kGroups, scales);
        for (int64_t u = 0; u < count; u++) {
            uint8_t *to = out + (tile * kBlockUnits + u) * kUnitTilesNbytes;
            const int64_t at = (first + u) * F::kUnitNbytes, slot = u * F::kGroups;
            for (int r = 0; r < 16; r++) {
                for (int i = 0; i < F::kUnitNbytes; i += 64) {
                    const uint8_t *line = rows.q[r] + at + kBlockUnits * F::kUnitNbytes + i;
                    _mm_prefetch(reinterpret_cast<const char *>(line), _MM_HINT_T1);
                }
                F::widen(rows.q[r] + at, l.w.in - (first + u) * kUnit, &scales.scale[r][slot],
                         beside<F>(l, scales, r, slot), to + r * 64);
            }
        }
    }
}

template <class F> void many(void *argument, int worker, int64_t item) {
    Call &call = *static_cast<Call *>(argument);
    const Linear &l = *call.l;
    constexpr int64_t kPanelRows = 16 * kPanelTiles, kWidenedNbytes = kPanelTiles * kBlockUnits * kUnitTilesNbytes;
    const int64_t begin = item * kBlockRows, rows = least(kBlockRows, l.w.out - begin);
    const int64_t panels = ceil_div(rows, kPanelRows), panel_floats = call.token_tiles * kPanelTiles * 256;
    const size_t nbytes = static_cast<size_t>(kWidenedNbytes + panels * panel_floats * 4);
    uint8_t *widened = static_cast<uint8_t *>(call.pool->scratch(worker, nbytes));
    if (!widened) {
        call.failed = true;
        return;
    }
    float *sums = reinterpret_cast<float *>(widened + kWidenedNbytes);
    TileConfig config;
    for (int t = 0; t < 8; t++) config.set(t, 16);
    tiles_begin(config);
    for (int64_t unit = 0; unit < call.units; unit += kBlockUnits) {
        const int64_t count = least(kBlockUnits, call.units - unit), steps = count * kSteps;
        for (int64_t p = 0; p < panels; p++) {
            widen_panel<F>(l, begin + p * kPanelRows, unit, count, widened);
            for (int64_t t = 0; t < call.token_tiles; t += 2) {
                const uint8_t *x = call.x.data + t * call.x.tile_nbytes + unit * call.x.unit_nbytes;
                float *at = sums + p * panel_floats + t * kPanelTiles * 256;
                const auto multiply = t + 1 < call.token_tiles ? multiply_pair<2> : multiply_pair<1>;
                multiply(call.x, widened, kBlockUnits * kUnitTilesNbytes, x, steps, unit == 0, at);
            }
        }
    }
    tiles_end();
    for (int64_t p = 0; p < panels; p++) {
        for (int64_t i = 0; i < call.token_tiles * kPanelTiles; i++) {
            const int64_t o = begin + p * kPanelRows + i % kPanelTiles * 16;
            if (o < l.w.out) put_tile(l, i / kPanelTiles * 16, o, sums + p * panel_floats + i * 256, 16);
        }
    }
}

template <class F> int run_tokens(const Linear &l, Pool &pool) {
    Call call = {};
    call.l = &l;
    call.pool = &pool;
    call.units = ceil_div(l.w.in, kUnit);
    call.token_tiles = ceil_div(l.rows, 16);
    // A decode step moves fewer bytes of activations with narrower tiles; the time of a multiplication is the same.
    int columns = 16;
    if (l.rows <= 8) {
        for (columns = 1; columns < l.rows;) columns *= 2;
    }
    call.x.columns = columns;
    call.x.step_nbytes = 64 * columns;
    call.x.unit_nbytes = kSteps * call.x.step_nbytes;
    call.x.tile_nbytes = call.units * call.x.unit_nbytes;
    call.x.data = static_cast<uint8_t *>(pool.scratch(pool.shared(), static_cast<size_t>(call.token_tiles * call.x.tile_nbytes)));
    if (!call.x.data) return TK_NO_MEMORY;
    call.order.set<F>();
    if (!pool.run(call.token_tiles * ceil_div(call.units, kPackUnits), pack, &call, l.cancel)) return TK_CANCELLED;
    const Job jobs[] = {few<F, 1>, few<F, 2>, few<F, 3>, many<F>};
    const bool is_few = call.token_tiles <= kFewTiles;
    const int64_t items = ceil_div(l.w.out, is_few ? 16 : kBlockRows);
    if (!pool.run(items, jobs[is_few ? call.token_tiles - 1 : 3], &call, l.cancel)) return TK_CANCELLED;
    return call.failed ? TK_NO_MEMORY : TK_OK;
}

template <class F> int run(const Linear &linear, Pool &pool) {
    return in_parts(linear, kMostTokens, [&pool](const Linear &part) { return run_tokens<F>(part, pool); });
}

template <template <int> class Tiles> int run_group(const Linear &l, Pool &pool) {
    if (l.w.group == 32) return run<Tiles<32>>(l, pool);
    return l.w.group == 64 ? run<Tiles<64>>(l, pool) : run<Tiles<128>>(l, pool);
}

} // namespace

int linear_amx(const Linear &l, Pool &pool) {
    if (l.w.format == TK_DENSE_BF16) return run<DenseTiles>(l, pool);
    // A tile multiplication takes as long for one token as for sixteen: for few, 8-bit products are faster.
    if (l.mode == TK_FAST && l.rows <= kFastTokens) return linear_fast_avx512(l, pool);
    if (l.w.format == TK_INT4) return run_group<Int4Tiles>(l, pool);
    return l.w.format == TK_INT8 ? run_group<Int8Tiles>(l, pool) : run_group<CodebookTiles>(l, pool);
}

} // namespace tk
