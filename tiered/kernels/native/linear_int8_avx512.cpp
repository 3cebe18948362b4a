// Quantized weights times activations in 8-bit integers: the AVX-512 level's fast kernel for more than a few tokens.
//
// Activations are rounded per group as in linear_fast_vector.h, to the same codes and scales. Lanes are 16 rows of the
// weight, as in linear_int16_avx512.cpp: vpdpbusd multiplies four codes of each row by four activations of a token,
// twice a cycle. A group's sum begins as minus its zero points times the sum of its activations, so that it ends in one
// conversion, one product of the two scales and one addition for 16 rows.

#include "panel_avx512.h"

namespace tk {

namespace {

constexpr int kSets = 2;                  // 32 rows of the weight share loads of activations
constexpr float kLeastMagnitude = 1e-30f; // a group below it counts as zero: 127 / it must be finite

// ---- activations

struct GroupOfToken {
    float scale;
    int32_t minus_sum; // of the rounded activations, in the lower 16 bits; the upper are 0
};

struct Activations {
    int8_t *codes;        // [unit][token][128], quads in the order in which unpacked codes meet them
    GroupOfToken *groups; // [group][token], whole units
    int64_t tokens, units;
};

struct PackJob {
    const Linear *l;
    Activations x;
};

// One group of one token.
template <class F> TK_INLINE GroupOfToken round_group(const uint16_t *x, int8_t *codes) {
    constexpr int kParts = F::kGroup / 16;
    __m512 value[kParts];
    __m512i most = _mm512_setzero_si512();
    for (int i = 0; i < kParts; i++) {
        value[i] = widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(x + i * 16)));
        // Magnitudes compare like integers; NaN is above all.
        most = _mm512_max_epu32(most, _mm512_castps_si512(_mm512_abs_ps(value[i])));
    }
    const uint32_t bits = _mm512_reduce_max_epu32(most);
    const float largest = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(bits))));
    const bool empty = largest < kLeastMagnitude;
    const __m512 inverse = _mm512_set1_ps(empty ? 0.0f : 127.0f / largest);
    __m128i rounded[kParts], placed[kParts];
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < kParts; i++) {
        const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(value[i], inverse));
        rounded[i] = _mm512_cvtsepi32_epi8(code);
        sum = _mm512_add_epi32(sum, _mm512_cvtepi8_epi32(rounded[i]));
    }
    F::put(rounded, placed);
    std::memcpy(codes, placed, sizeof placed);
    return {empty ? 0.0f : largest / 127.0f, -_mm512_reduce_add_epi32(sum) & 0xffff};
}

// One unit of all tokens.
template <class F> void pack(void *argument, int, int64_t unit) {
    constexpr int kGroups = kUnit / F::kGroup;
    const PackJob &job = *static_cast<const PackJob *>(argument);
    const Linear &l = *job.l;
    for (int64_t token = 0; token < job.x.tokens; token++) {
        int8_t *codes = job.x.codes + (unit * job.x.tokens + token) * kUnit;
        for (int g = 0; g < kGroups; g++, codes += F::kGroup) {
            const int64_t group = unit * kGroups + g;
            GroupOfToken &of = job.x.groups[group * job.x.tokens + token];
            if (group < l.groups) {
                of = round_group<F>(l.x + token * l.ldx + group * F::kGroup, codes);
            } else {
                of = {};
                std::memset(codes, 0, F::kGroup);
            }
        }
    }
}

// ---- products

struct Product {
    const Linear *l;
    Activations x;
    Pool *pool;
    bool failed; // a worker got no scratch
};

// 32 rows of the weight, on their way through `in`.
struct Panel {
    Codes<kSets> codes;                                   // of a unit
    alignas(64) float scale[kSets][kBlockGroups][kLanes]; // of a block
    alignas(64) int32_t zero[kSets][kBlockGroups][kLanes];
    Rows<kSets> rows;
};

template <class F> TK_INLINE void load_scales(const Linear &l, int64_t block, Panel &panel) {
    const int64_t group = block * kBlockGroups;
    fetch_scales<F>(l, block, panel.rows);
    const __mmask16 groups = first16(l.groups - group);
    for (int set = 0; set < kSets; set++) {
        for (int r = 0; r < kLanes; r++) {
            const int64_t at = panel.rows.row[set][r] * l.groups + group;
            _mm512_store_ps(panel.scale[set][r], F::scales(l, at, groups));
            _mm512_store_si512(panel.zero[set][r], F::zeros(l, at, groups));
        }
        transpose_matrix(panel.scale[set][0]);
        transpose_matrix(panel.zero[set][0]);
    }
}

// The unpacked unit times kCount tokens, added to `sums` [kSets][kCount][16 rows]. `group`: its first one's place in
// the block; `of`: that one's entries [group][tokens]; `ahead`: what to fetch meanwhile, or null.
template <class F, int kCount>
TK_INLINE void multiply(const Panel &panel, const Ahead<F, kSets> *ahead, const int8_t *x, const GroupOfToken *of,
                        int64_t tokens, int64_t group, float *sums) {
    constexpr int kLines = Ahead<F, kSets>::kLines / kQuads;
    constexpr int kGroups = kUnit / F::kGroup, kGroupQuads = F::kGroup / 4;
    for (int g = 0; g < kGroups; g++, of += tokens) {
        __m512i exact[kSets][kCount];
        for (int set = 0; set < kSets; set++) {
            const __m512i zero = _mm512_load_si512(panel.zero[set][group + g]);
            for (int t = 0; t < kCount; t++) {
                exact[set][t] = _mm512_dpwssd_epi32(_mm512_setzero_si512(), zero, _mm512_set1_epi32(of[t].minus_sum));
            }
        }
        // Unrolled whole: GCC copies every accumulator once around a loop.
#pragma GCC unroll 32
        for (int i = 0; i < kGroupQuads; i++) {
            const int n = g * kGroupQuads + i;
            for (int line = n * kLines; ahead && line < (n + 1) * kLines; line++) ahead->fetch(line);
            __m512i codes[kSets];
            for (int set = 0; set < kSets; set++) codes[set] = _mm512_load_si512(panel.codes.quad[set][n]);
            for (int t = 0; t < kCount; t++) {
                const __m512i quad = broadcast_quad(x + t * kUnit + n * 4);
                for (int set = 0; set < kSets; set++) {
                    exact[set][t] = _mm512_dpbusd_epi32(exact[set][t], codes[set], quad);
                }
            }
        }
        for (int set = 0; set < kSets; set++) {
            const __m512 scale = _mm512_load_ps(panel.scale[set][group + g]);
            for (int t = 0; t < kCount; t++) {
                float *to = sums + (set * kCount + t) * kLanes;
                const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(of[t].scale));
                _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact[set][t]), both, _mm512_load_ps(to)));
            }
        }
    }
}

// An unpacked unit times all tokens; `sums` [token tile][set][token of the tile][16].
template <class F> TK_INLINE void multiply_all(const Product &p, const Panel &panel, int64_t unit, float *sums) {
    constexpr int kGroups = kUnit / F::kGroup;
    const Activations &x = p.x;
    const int64_t group = unit * kGroups % kBlockGroups;
    const Ahead<F, kSets> lines(*p.l, panel.rows, unit);
    for (int64_t token = 0; token < x.tokens; token += kTile) {
        const int8_t *codes = x.codes + (unit * x.tokens + token) * kUnit;
        const GroupOfToken *of = x.groups + unit * kGroups * x.tokens + token;
        const Ahead<F, kSets> *ahead = token ? nullptr : &lines;
        float *to = sums + token * kSets * kLanes;
        switch (least(kTile, x.tokens - token)) {
            case 1: multiply<F, 1>(panel, ahead, codes, of, x.tokens, group, to); break;
            case 2: multiply<F, 2>(panel, ahead, codes, of, x.tokens, group, to); break;
            case 3: multiply<F, 3>(panel, ahead, codes, of, x.tokens, group, to); break;
            case 4: multiply<F, 4>(panel, ahead, codes, of, x.tokens, group, to); break;
            case 5: multiply<F, 5>(panel, ahead, codes, of, x.tokens, group, to); break;
            case 6: multiply<F, 6>(panel, ahead, codes, of, x.tokens, group, to); break;
            case 7: multiply<F, 7>(panel, ahead, codes, of, x.tokens, group, to); break;
            default: multiply<F, kTile>(panel, ahead, codes, of, x.tokens, group, to); break;
        }
    }
}

template <class F> void multiply_panel(const Product &p, int64_t first, Panel &panel, float *sums) {
    constexpr int64_t kBlockUnits = kBlockGroups * F::kGroup / kUnit;
    const Linear &l = *p.l;
    std::memset(sums, 0, static_cast<size_t>(l.rows * kSets * kLanes) * sizeof(float));
    panel.rows.set(first, l.w.out);
    for (int64_t unit = 0; unit < p.x.units; unit++) {
        if (unit % kBlockUnits == 0) load_scales<F>(l, unit / kBlockUnits, panel);
        panel.codes.unpack<F>(l, panel.rows, unit);
        multiply_all<F>(p, panel, unit, sums);
    }
    for (int64_t token = 0; token < l.rows; token++) {
        const int64_t tile = token - token % kTile, count = least(kTile, l.rows - tile);
        for (int set = 0; set < kSets && first + set * kLanes < l.w.out; set++) {
            const float *sum = sums + (tile * kSets + set * count + token % kTile) * kLanes;
            put16(l, token, first + set * kLanes, _mm512_load_ps(sum));
        }
    }
}

template <class F> void rows_of_item(void *argument, int worker, int64_t item) {
    Product &p = *static_cast<Product *>(argument);
    const size_t nbytes = static_cast<size_t>(p.l->rows * kSets * kLanes) * sizeof(float);
    float *sums = static_cast<float *>(p.pool->scratch(worker, nbytes));
    if (!sums) {
        p.failed = true;
        return;
    }
    Panel panel;
    const int64_t end = least((item + 1) * kItemRows, p.l->w.out);
    for (int64_t first = item * kItemRows; first < end; first += kSets * kLanes) {
        multiply_panel<F>(p, first, panel, sums);
    }
}

template <class F> int run_tokens(const Linear &l, Pool &pool) {
    Activations x = {};
    x.tokens = l.rows;
    x.units = ceil_div(l.w.in, kUnit);
    const size_t codes = static_cast<size_t>(l.rows * x.units) * kUnit;
    const size_t groups = codes / F::kGroup * sizeof(GroupOfToken);
    uint8_t *memory = static_cast<uint8_t *>(pool.scratch(pool.shared(), codes + groups));
    if (!memory) return TK_NO_MEMORY;
    x.codes = reinterpret_cast<int8_t *>(memory);
    x.groups = reinterpret_cast<GroupOfToken *>(memory + codes);
    PackJob pack_job = {&l, x};
    if (!pool.run(x.units, pack<F>, &pack_job, l.cancel)) return TK_CANCELLED;
    Product p = {&l, x, &pool, false};
    if (!pool.run(ceil_div(l.w.out, kItemRows), rows_of_item<F>, &p, l.cancel)) return TK_CANCELLED;
    return p.failed ? TK_NO_MEMORY : TK_OK;
}

} // namespace

int linear_int8_avx512(const Linear &l, Pool &pool) {
    return with_format(l, [&](auto format) {
        return in_parts(l, kMostTokens, [&](const Linear &part) { return run_tokens<decltype(format)>(part, pool); });
    });
}

} // namespace tk
