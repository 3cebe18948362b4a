// Quantized weights times activations in 16-bit integers: the AVX-512 level's invariant kernel.
//
// vpdpbusd multiplies bytes: activations in 16 bits are two of them. Per token, each block of 16 groups of `in` is scaled
// so that its largest activation becomes 32639, whose upper byte fits after rounding; a group's sum of code * activation
// is then exact, and
//
//     y = sum over blocks: x_scale * sum over groups of the block: scale * sum(code * x) - scale * zero * sum(x)
//
// is added up in fp32, one chain per result, groups ascending, for any number of tokens. The error is that of rounding
// the activations: 2^-16 of the largest in a block, some 5e-5 of the result for normal activations and below 2e-3 with
// outliers of 60 times the rest, where their weights are zero.
//
// Lanes are 16 rows of the weight, so that a group ends in one conversion for all of them. Rows lie one behind the
// other in memory: their packed codes are transposed (unpacked ones would cost more), in units of 128 of `in`, and the
// unpacked unit stays in the first-level cache while all tokens are multiplied by it.

#include "panel_avx512.h"

namespace tk {

namespace {

constexpr int kFewTokens = 4;          // or fewer: codes in registers, 16 rows at a time; more: 32 rows, unpacked first
constexpr int kUnitNbytes = 2 * kUnit; // of a token's packed activations
constexpr float kLargest = 32639;      // 127 * 256 + 127

// ---- activations

struct Activations {
    int8_t *codes;  // [block][unit][token][upper, lower byte][128], in the order of the quads
    float *sums;    // [block][token][16 groups]
    float *scales;  // [block][token]
    int64_t tokens, units, blocks, block_units;
};

struct PackJob {
    const Linear *l;
    Activations x;
};

// A unit of 16-bit activations as bytes: 256 * upper + lower, both signed.
template <class F> TK_INLINE void put_bytes(const __m512i z[4], int8_t *codes) {
    alignas(64) __m128i bytes[2][kUnit / 16];
    for (int i = 0; i < 4; i++) {
        const __m512i upper = _mm512_srai_epi16(_mm512_add_epi16(z[i], _mm512_set1_epi16(128)), 8);
        _mm256_store_si256(reinterpret_cast<__m256i *>(bytes[0]) + i, _mm512_cvtepi16_epi8(upper));
        _mm256_store_si256(reinterpret_cast<__m256i *>(bytes[1]) + i, _mm512_cvtepi16_epi8(z[i]));
    }
    for (int part = 0; part < 2; part++) {
        for (int at = 0; at < kUnit; at += F::kGroup) {
            __m128i placed[F::kGroup / 16];
            F::put(bytes[part] + at / 16, placed);
            std::memcpy(codes + part * kUnit + at, placed, sizeof placed);
        }
    }
}

// One block of one token.
template <class F> void pack(void *argument, int, int64_t item) {
    const PackJob &job = *static_cast<const PackJob *>(argument);
    const Linear &l = *job.l;
    const int64_t token = item / job.x.blocks, block = item % job.x.blocks;
    const int64_t block_in = job.x.block_units * kUnit, start = block * block_in;
    const int64_t count = least(block_in, l.w.in - start);
    const uint16_t *x = l.x + token * l.ldx + start;
    // Magnitudes of bf16 compare like integers.
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += 32) {
        const __m512i bits = _mm512_maskz_loadu_epi16(first32(count - i), x + i);
        most = _mm512_max_epu16(most, _mm512_and_si512(bits, _mm512_set1_epi16(0x7fff)));
    }
    const __m512i halves = _mm512_max_epu32(_mm512_and_si512(most, _mm512_set1_epi32(0xffff)), _mm512_srli_epi32(most, 16));
    const uint32_t magnitude = _mm512_reduce_max_epu32(halves);
    const bool finite = magnitude < 0x7f80;
    const float largest = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(magnitude << 16))));
    // A largest value below 2^-112, whose inverse overflows, counts as zero: beside anything sensible it is nothing.
    const bool empty = largest < 0x1p-112f;
    const __m512 inverse = _mm512_set1_ps(finite && !empty ? kLargest / largest : 0.0f);
    // An activation that is not finite makes the token's results NaN.
    const int64_t at_block = block * job.x.tokens + token;
    job.x.scales[at_block] = finite ? (empty ? 0.0f : largest / kLargest) : largest - largest;
    float *sums = job.x.sums + at_block * kBlockGroups;
    _mm512_storeu_ps(sums, _mm512_setzero_ps());
    const int64_t units = least(job.x.block_units, job.x.units - block * job.x.block_units);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t u = 0; u < units; u++) {
        __m512i z[4];
        for (int i = 0; i < 4; i++) {
            const int64_t at = u * kUnit + i * 32;
            const __m512i bits = _mm512_maskz_loadu_epi16(first32(count - at), x + at);
            const __m512 low = _mm512_mul_ps(widen_bf16(_mm512_castsi512_si256(bits)), inverse);
            const __m512 high = _mm512_mul_ps(widen_bf16(_mm512_extracti64x4_epi64(bits, 1)), inverse);
            const __m256i narrow = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(low));
            z[i] = _mm512_inserti64x4(_mm512_castsi256_si512(narrow), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(high)), 1);
            sum = _mm512_add_epi32(sum, _mm512_madd_epi16(z[i], _mm512_set1_epi16(1)));
            if ((at + 32) % F::kGroup == 0) {
                sums[at / F::kGroup] = static_cast<float>(_mm512_reduce_add_epi32(sum));
                sum = _mm512_setzero_si512();
            }
        }
        put_bytes<F>(z, job.x.codes + ((block * job.x.block_units + u) * job.x.tokens + token) * kUnitNbytes);
    }
}

// ---- products

struct Product {
    const Linear *l;
    Activations x;
    Pool *pool;
    bool failed; // a worker got no scratch
};

// kSets times 16 rows of the weight, on their way through `in`.
template <int kSets> struct Panel {
    Codes<kSets> codes; // of a unit
    // Of a block; shift is scale * zero.
    alignas(64) float scale[kSets][kBlockGroups][kLanes], shift[kSets][kBlockGroups][kLanes];
    Rows<kSets> rows;
};

template <class F, int kSets> TK_INLINE void load_scales(const Linear &l, int64_t block, Panel<kSets> &panel) {
    const int64_t group = block * kBlockGroups;
    fetch_scales<F>(l, block, panel.rows);
    const __mmask16 groups = first16(l.groups - group);
    for (int set = 0; set < kSets; set++) {
        for (int r = 0; r < kLanes; r++) {
            const int64_t at = panel.rows.row[set][r] * l.groups + group;
            const __m512 scale = F::scales(l, at, groups);
            _mm512_store_ps(panel.scale[set][r], scale);
            _mm512_store_ps(panel.shift[set][r], _mm512_mul_ps(scale, _mm512_cvtepi32_ps(F::zeros(l, at, groups))));
        }
        transpose_matrix(panel.scale[set][0]);
        transpose_matrix(panel.shift[set][0]);
    }
}

// A group's exact sum for 16 rows and one token, scaled and added to the fp32 sum.
TK_INLINE void add_group(__m512i exact, const float *scale, const float *shift, float x_sum, float *to) {
    const __m512 sum = _mm512_fnmadd_ps(_mm512_load_ps(shift), _mm512_set1_ps(x_sum), _mm512_load_ps(to));
    _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), _mm512_load_ps(scale), sum));
}

// A unit of 16 rows times kCount tokens straight from its codes, for so few tokens that unpacking would cost more.
template <class F, int kCount>
TK_INLINE void multiply_packed(const Linear &l, int64_t unit, const Panel<1> &panel, const int8_t *x, const float *x_sums,
                               int64_t group, float *sums) {
    constexpr int kGroupQuads = F::kGroup / 4;
    // Integers add up the same in any order: split, so that no addition waits for the one before.
    constexpr int kParts = kCount > 2 ? 1 : 2;
    const Ahead<F, 1> ahead(l, panel.rows, unit);
    __m512i upper[kCount][kParts], lower[kCount][kParts];
    for (int part = 0; part < F::kColumns / 16; part++) {
        __m512i columns[16];
        load_columns(l, panel.rows, 0, unit * F::kColumns * 4 + part * 64, columns);
#pragma GCC unroll 32
        for (int i = 0; i < 16 * F::kShifts; i++) {
            const int n = part * 16 * F::kShifts + i, p = n % kParts;
            if (i < 16) ahead.fetch(part * 16 + i);
            const __m512i codes = F::quad(l, columns[i / F::kShifts], i % F::kShifts);
            const bool first = n % kGroupQuads < kParts;
            for (int t = 0; t < kCount; t++) {
                const int8_t *at = x + t * kUnitNbytes + n * 4;
                const __m512i none = _mm512_setzero_si512();
                upper[t][p] = _mm512_dpbusd_epi32(first ? none : upper[t][p], codes, broadcast_quad(at));
                lower[t][p] = _mm512_dpbusd_epi32(first ? none : lower[t][p], codes, broadcast_quad(at + kUnit));
            }
            if ((n + 1) % kGroupQuads) continue;
            const int64_t g = group + n / kGroupQuads;
            for (int t = 0; t < kCount; t++) {
                if (kParts == 2) {
                    upper[t][0] = _mm512_add_epi32(upper[t][0], upper[t][kParts - 1]);
                    lower[t][0] = _mm512_add_epi32(lower[t][0], lower[t][kParts - 1]);
                }
                const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(upper[t][0], 8), lower[t][0]);
                add_group(whole, panel.scale[0][g], panel.shift[0][g], x_sums[t * kBlockGroups + g], sums + t * kLanes);
            }
        }
    }
}

// The unpacked unit times kCount tokens, added to `sums` [kSets][kCount][16 rows]. `group`: its first one's place in the
// block; `ahead`: what to fetch meanwhile, or null.
template <class F, int kSets, int kCount>
TK_INLINE void multiply(const Panel<kSets> &panel, const Ahead<F, kSets> *ahead, const int8_t *x, const float *x_sums,
                        int64_t group, float *sums) {
    constexpr int kGroups = kUnit / F::kGroup, kGroupQuads = F::kGroup / 4;
    for (int g = 0; g < kGroups; g++) {
        __m512i exact[kSets][kCount];
        for (auto &of_set : exact) {
            for (__m512i &sum : of_set) sum = _mm512_setzero_si512();
        }
        // Multiplies the upper bytes' sum by 256, then adds the lower bytes' products.
        for (int part = 0; part < 2; part++) {
#pragma GCC unroll 4
            for (int n = g * kGroupQuads; n < (g + 1) * kGroupQuads; n++) {
                const int line = part * kQuads + n;
                if (ahead && line < Ahead<F, kSets>::kLines) ahead->fetch(line);
                __m512i codes[kSets];
                for (int set = 0; set < kSets; set++) codes[set] = _mm512_load_si512(panel.codes.quad[set][n]);
                for (int t = 0; t < kCount; t++) {
                    const __m512i quad = broadcast_quad(x + t * kUnitNbytes + part * kUnit + n * 4);
                    for (int set = 0; set < kSets; set++) {
                        exact[set][t] = _mm512_dpbusd_epi32(exact[set][t], codes[set], quad);
                    }
                }
            }
            if (part) continue;
            for (auto &of_set : exact) {
                for (__m512i &sum : of_set) sum = _mm512_slli_epi32(sum, 8);
            }
        }
        for (int set = 0; set < kSets; set++) {
            const float *scale = panel.scale[set][group + g], *shift = panel.shift[set][group + g];
            for (int t = 0; t < kCount; t++) {
                float *to = sums + (set * kCount + t) * kLanes;
                add_group(exact[set][t], scale, shift, x_sums[t * kBlockGroups + group + g], to);
            }
        }
    }
}

// An unpacked unit times all tokens; `sums` [token tile][set][token of the tile][16].
template <class F, int kSets>
TK_INLINE void multiply_all(const Product &p, const Panel<kSets> &panel, int64_t block, int64_t unit, float *sums) {
    const Activations &x = p.x;
    const int64_t group = (unit - block * x.block_units) * (kUnit / F::kGroup);
    const Ahead<F, kSets> lines(*p.l, panel.rows, unit);
    for (int64_t token = 0; token < x.tokens; token += kTile) {
        const int8_t *codes = x.codes + (unit * x.tokens + token) * kUnitNbytes;
        const float *of = x.sums + (block * x.tokens + token) * kBlockGroups;
        const Ahead<F, kSets> *ahead = token ? nullptr : &lines;
        float *to = sums + token * kSets * kLanes;
        switch (least(kTile, x.tokens - token)) {
            case 1: multiply<F, kSets, 1>(panel, ahead, codes, of, group, to); break;
            case 2: multiply<F, kSets, 2>(panel, ahead, codes, of, group, to); break;
            case 3: multiply<F, kSets, 3>(panel, ahead, codes, of, group, to); break;
            case 4: multiply<F, kSets, 4>(panel, ahead, codes, of, group, to); break;
            case 5: multiply<F, kSets, 5>(panel, ahead, codes, of, group, to); break;
            case 6: multiply<F, kSets, 6>(panel, ahead, codes, of, group, to); break;
            case 7: multiply<F, kSets, 7>(panel, ahead, codes, of, group, to); break;
            default: multiply<F, kSets, kTile>(panel, ahead, codes, of, group, to); break;
        }
    }
}

template <class F> TK_INLINE void multiply_unit(const Product &p, Panel<2> &panel, int64_t block, int64_t unit, float *sums) {
    panel.codes.template unpack<F>(*p.l, panel.rows, unit);
    multiply_all<F>(p, panel, block, unit, sums);
}

template <class F> TK_INLINE void multiply_unit(const Product &p, Panel<1> &panel, int64_t block, int64_t unit, float *sums) {
    const Activations &x = p.x;
    const int64_t group = (unit - block * x.block_units) * (kUnit / F::kGroup);
    const int8_t *codes = x.codes + unit * x.tokens * kUnitNbytes;
    const float *of = x.sums + block * x.tokens * kBlockGroups;
    switch (x.tokens) {
        case 1: multiply_packed<F, 1>(*p.l, unit, panel, codes, of, group, sums); break;
        case 2: multiply_packed<F, 2>(*p.l, unit, panel, codes, of, group, sums); break;
        case 3: multiply_packed<F, 3>(*p.l, unit, panel, codes, of, group, sums); break;
        default: multiply_packed<F, kFewTokens>(*p.l, unit, panel, codes, of, group, sums); break;
    }
}

// Adds a block's scaled sums to the totals and sets the sums to 0.
template <int kSets> TK_INLINE void end_block(const Activations &x, int64_t block, float *sums, float *totals) {
    for (int64_t token = 0; token < x.tokens; token++) {
        const int64_t tile = token - token % kTile, count = least(kTile, x.tokens - tile);
        const __m512 scale = _mm512_set1_ps(x.scales[block * x.tokens + token]);
        for (int set = 0; set < kSets; set++) {
            const int64_t at = (tile * kSets + set * count + token % kTile) * kLanes;
            _mm512_store_ps(totals + at, _mm512_fmadd_ps(_mm512_load_ps(sums + at), scale, _mm512_load_ps(totals + at)));
            _mm512_store_ps(sums + at, _mm512_setzero_ps());
        }
    }
}

template <class F, int kSets>
TK_INLINE void multiply_panel(const Product &p, int64_t first, Panel<kSets> &panel, float *sums, float *totals) {
    const Linear &l = *p.l;
    const int64_t floats = l.rows * kSets * kLanes;
    for (int64_t i = 0; i < floats; i += kLanes) {
        _mm512_store_ps(sums + i, _mm512_setzero_ps());
        _mm512_store_ps(totals + i, _mm512_setzero_ps());
    }
    panel.rows.set(first, l.w.out);
    for (int64_t block = 0; block < p.x.blocks; block++) {
        load_scales<F>(l, block, panel);
        const int64_t begin = block * p.x.block_units;
        for (int64_t unit = begin; unit < least(begin + p.x.block_units, p.x.units); unit++) {
            multiply_unit<F>(p, panel, block, unit, sums);
        }
        end_block<kSets>(p.x, block, sums, totals);
    }
    for (int64_t token = 0; token < l.rows; token++) {
        const int64_t tile = token - token % kTile, count = least(kTile, l.rows - tile);
        for (int set = 0; set < kSets && first + set * kLanes < l.w.out; set++) {
            const float *total = totals + (tile * kSets + set * count + token % kTile) * kLanes;
            put16(l, token, first + set * kLanes, _mm512_load_ps(total));
        }
    }
}

template <class F, int kSets> void rows_of_item(void *argument, int worker, int64_t item) {
    Product &p = *static_cast<Product *>(argument);
    const int64_t floats = p.l->rows * kSets * kLanes;
    float *sums = static_cast<float *>(p.pool->scratch(worker, static_cast<size_t>(floats) * 8));
    if (!sums) {
        p.failed = true;
        return;
    }
    Panel<kSets> panel;
    const int64_t end = least((item + 1) * kItemRows, p.l->w.out);
    for (int64_t first = item * kItemRows; first < end; first += kSets * kLanes) {
        multiply_panel<F, kSets>(p, first, panel, sums, sums + floats);
    }
}

template <class F> int run_tokens(const Linear &l, Pool &pool) {
    Activations x = {};
    x.tokens = l.rows;
    x.units = ceil_div(l.w.in, kUnit);
    x.block_units = kBlockGroups * F::kGroup / kUnit;
    x.blocks = ceil_div(x.units, x.block_units);
    const size_t codes = static_cast<size_t>(l.rows * x.blocks * x.block_units) * kUnitNbytes;
    const size_t sums = static_cast<size_t>(l.rows * x.blocks) * kBlockGroups * 4;
    uint8_t *memory = static_cast<uint8_t *>(pool.scratch(pool.shared(), codes + sums + sums / kBlockGroups));
    if (!memory) return TK_NO_MEMORY;
    x.codes = reinterpret_cast<int8_t *>(memory);
    x.sums = reinterpret_cast<float *>(memory + codes);
    x.scales = reinterpret_cast<float *>(memory + codes + sums);
    PackJob pack_job = {&l, x};
    if (!pool.run(l.rows * x.blocks, pack<F>, &pack_job, l.cancel)) return TK_CANCELLED;
    Product p = {&l, x, &pool, false};
    const Job job = l.rows <= kFewTokens ? rows_of_item<F, 1> : rows_of_item<F, 2>;
    if (!pool.run(ceil_div(l.w.out, kItemRows), job, &p, l.cancel)) return TK_CANCELLED;
    return p.failed ? TK_NO_MEMORY : TK_OK;
}

} // namespace

int linear_int16_avx512(const Linear &l, Pool &pool) {
    return with_format(l, [&](auto format) {
        return in_parts(l, kMostTokens, [&](const Linear &part) { return run_tokens<decltype(format)>(part, pool); });
    });
}

} // namespace tk
