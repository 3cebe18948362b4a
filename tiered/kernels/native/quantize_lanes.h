// Quantizing with a group in each lane of a vector: what belongs to one weight of many groups is then one vector, sums
// are plain additions, and nothing is ever added across lanes. Included by one file per instruction set, which says
// what a vector is:
//
//   kLanes                            groups at a time, a multiple of 4
//   F                                 kLanes floats
//   Words                             kLanes 32-bit words
//   set, load, store, add ... div     lane by lane, each rounded on its own; min and max return b where a is NaN
//   subtract_product(w, a, b)         w - a * b, of which a * b is exact
//   select(mask, a, b)                a where mask, else b
//   to_fp16, from_fp16                16-bit values in the lower half of each word
//   gather4(rows, at, out)            words at/4 .. at/4 + 3 of each row: out[w] holds word w of every row
//   scatter4(words, to, stride)       the way back, to rows that are `stride` bytes apart
//   first, second                     the two 16-bit numbers of each word as floats
//   shift_left, shift_right(words, bits), bits_of(words, mask)    word by word
//   nan_where(words, b, a)            NaN where words equal b, else a
//   look_up<kBits>(table, words)      entries of a table [1 << kBits], whose numbers are the lowest kBits of each word
#pragma once

#include "quantize_common.h"

#include <cstring>

#define TK_INLINE __attribute__((always_inline)) inline

namespace tk {
namespace {

// What the codes of kLanes groups stand for under one clip factor.
template <class V> struct Levels {
    typename V::F scale, inverse;
    typename V::F least, most; // kRounder - zero, and kRounder + (the greatest code - zero)
};

template <class V> struct Extent {
    typename V::F low, high;
    typename V::F poison; // NaN in the lanes of groups that are not finite
};

template <class V, int kBits> TK_INLINE Levels<V> levels_of(const Extent<V> &extent, float factor) {
    const auto max_code = V::set((1 << kBits) - 1), zeros = V::set(0), rounder = V::set(kRounder);
    const auto lo = V::mul(extent.low, V::set(factor)), hi = V::mul(extent.high, V::set(factor));
    const auto some = V::less(lo, hi); // all lanes but those of groups of zeros
    Levels<V> levels;
    levels.scale = V::from_fp16(V::to_fp16(V::div(V::sub(hi, lo), max_code)));
    levels.scale = V::select(some, V::max(levels.scale, V::set(kLeastScale)), levels.scale);
    levels.inverse = V::select(some, V::div(V::set(1), levels.scale), zeros);
    auto zero = V::sub(V::add(V::mul(V::sub(zeros, lo), levels.inverse), rounder), rounder);
    zero = V::min(zero, max_code);
    levels.least = V::sub(rounder, zero);
    levels.most = V::add(levels.least, max_code);
    return levels;
}

// kRounder + the level nearest to each weight.
template <class V> TK_INLINE typename V::F nearest(typename V::F w, const Levels<V> &levels) {
    const auto level = V::add(V::mul(w, levels.inverse), V::set(kRounder));
    return V::min(V::max(level, levels.least), levels.most);
}

// The squared errors of weights 0, kStep, 2 kStep, ... of `w`, added in the order of quantize.py's tree: "halves of the
// group element by element" means that of n numbers left, the k-th is the sum of the k-th and the (k + n)-th of 2 n.
template <class V, int kGroup, int kStep> TK_INLINE typename V::F error_of(const float *w, const Levels<V> &levels) {
    if constexpr (kStep == kGroup) {
        const auto weight = V::load(w);
        const auto level = V::sub(nearest<V>(weight, levels), V::set(kRounder));
        const auto error = V::subtract_product(weight, level, levels.scale);
        return V::mul(error, error);
    } else {
        return V::add(error_of<V, kGroup, kStep * 2>(w, levels),
                      error_of<V, kGroup, kStep * 2>(w + kStep * V::kLanes, levels));
    }
}

template <class V, int kGroup> TK_INLINE typename V::F squared_error(const float *w, const Levels<V> &levels) {
    constexpr int kPieces = kGroup / 8; // of 8 weights, which registers hold all of, in whatever order they are added
    typename V::F sums[kPieces];
#pragma GCC unroll 1
    for (int i = 0; i < kPieces; i++) sums[i] = error_of<V, kGroup, kPieces>(w + i * V::kLanes, levels);
    for (int half = kPieces / 2; half; half /= 2) {
        for (int i = 0; i < half; i++) sums[i] = V::add(sums[i], sums[half + i]);
    }
    return sums[0];
}

// The levels of the clip factor with the least error, in every lane its own; the earlier factor on a tie.
template <class V, int kBits, int kGroup>
TK_INLINE Levels<V> best_levels(const float *w, const Extent<V> &extent, Levels<V> best) {
    Levels<V> all[kFactors]; // ahead of their use, so that the divisions overlap
    for (int k = 1; k < kFactors; k++) all[k] = levels_of<V, kBits>(extent, clip_factor(k));
    auto least_error = squared_error<V, kGroup>(w, best);
    for (int k = 1; k < kFactors; k++) {
        const Levels<V> levels = all[k];
        const auto error = squared_error<V, kGroup>(w, levels);
        const auto better = V::less(error, least_error);
        least_error = V::min(error, least_error);
        best.scale = V::select(better, levels.scale, best.scale);
        best.inverse = V::select(better, levels.inverse, best.inverse);
        best.least = V::select(better, levels.least, best.least);
        best.most = V::select(better, levels.most, best.most);
    }
    return best;
}

template <class V> TK_INLINE void take(typename V::F w, float *&out, Extent<V> &extent) {
    V::store(out, w);
    out += V::kLanes;
    extent.low = V::min(w, extent.low);
    extent.high = V::max(w, extent.high);
    extent.poison = V::add(extent.poison, V::mul(w, V::set(0)));
}

// The numbers whose codes are the highest byte of each word: a sign, 4 bits of exponent, 3 of mantissa.
template <class V> TK_INLINE typename V::F e4m3(typename V::Words a) {
    const auto magnitude = V::bits_of(V::shift_right(a, 4), 0x07f00000); // where a float has its exponent and mantissa
    const auto normal = V::as_float(V::plus(magnitude, (127 - 7) << 23));
    // Twice the normal one less the least normal one is the number that it is where the exponent is 0, and larger than
    // the normal one where it is not.
    const auto subnormal = V::sub(V::as_float(V::plus(magnitude, (127 - 6) << 23)), V::set(1.0f / 64));
    const auto number = V::nan_where(magnitude, 0x07f00000, V::min(normal, subnormal));
    return V::with_sign(number, V::bits_of(a, static_cast<int>(0x80000000u)));
}

// Looks up the groups at `rows`, which begin at `places`, into `out` [group][lane].
template <class V, int kGroup, int kDtype>
TK_INLINE Extent<V> look_up(const Quantize &job, const unsigned char *const *rows, const Place *places, float *out) {
    constexpr int kBits = kDtype == TK_CODE4 ? 4 : 8, kPerWord = 32 / kBits, kNbytes = kGroup * kBits / 8;
    const tk_lookup &l = job.lookup;
    alignas(64) float scales[kGroup / kRun][V::kLanes], zeros[kGroup / kRun][V::kLanes];
    for (int lane = 0; lane < V::kLanes; lane++) {
        for (int run = 0; run < kGroup / kRun; run++) {
            const int64_t at = scale_at(job, places[lane], run);
            scales[run][lane] = l.scale[at];
            zeros[run][lane] = l.zero ? l.zero[at] : 0;
        }
    }
    Extent<V> extent = {V::set(0), V::set(0), V::set(0)};
    for (int at = 0; at < kNbytes; at += 16) {
        typename V::Words words[4];
        V::gather4(rows, at, words);
        for (int i = 0; i < 4; i++) {
            const int run = (at / 4 + i) * kPerWord / kRun;
            const auto scale = V::load(scales[run]), zero = V::load(zeros[run]);
            for (int k = 0; k < kPerWord; k++) {
                typename V::F entry;
                if constexpr (kDtype == kE4m3) {
                    entry = e4m3<V>(V::shift_left(words[i], 24 - 8 * k));
                } else {
                    entry = V::template look_up<kBits>(l.table, V::shift_right(words[i], k * kBits));
                }
                take<V>(V::mul(V::sub(entry, zero), scale), out, extent); // less 0 is what there was
            }
        }
    }
    return extent;
}

// Widens the groups at `rows` into `out` [group][lane].
template <class V, int kGroup, int kDtype>
TK_INLINE Extent<V> widen(const unsigned char *const *rows, float *out) {
    constexpr int kNbytes = kGroup * (kDtype == TK_F32 ? 4 : 2);
    Extent<V> extent = {V::set(0), V::set(0), V::set(0)};
    for (int at = 0; at < kNbytes; at += 16) {
        typename V::Words words[4];
        V::gather4(rows, at, words);
        for (int i = 0; i < 4; i++) {
            if constexpr (kDtype == TK_F32) {
                take<V>(V::as_float(words[i]), out, extent);
            } else {
                take<V>(V::template first<kDtype>(words[i]), out, extent);
                take<V>(V::template second<kDtype>(words[i]), out, extent);
            }
        }
    }
    return extent;
}

// Four bytes of the packed group from the `at`-th on, as one word per lane.
template <class V, int kBits, int kGroup>
TK_INLINE typename V::Words pack_word(const float *w, int at, const Levels<V> &levels) {
    typename V::Words word = V::zero_words();
    for (int i = 3; i >= 0; i--) {
        const float *weight = w + (at + i) * V::kLanes;
        if constexpr (kBits == 4) {
            const auto high = nearest<V>(V::load(weight + kGroup / 2 * V::kLanes), levels);
            word = V::template shift_in<4>(word, V::difference(high, levels.least));
        }
        word = V::template shift_in<kBits>(word, V::difference(nearest<V>(V::load(weight), levels), levels.least));
    }
    return word;
}

// Quantizes `count` groups, at most kLanes, from group `first` on; lanes beyond them repeat the first one.
template <class V, int kBits, int kGroup, int kDtype> void some_groups(Quantize &job, int64_t first, int count) {
    constexpr int kQ = kGroup * kBits / 8;
    alignas(64) float w[kGroup * V::kLanes];
    alignas(64) uint8_t q[kQ * V::kLanes];
    const unsigned char *rows[V::kLanes];
    Place places[V::kLanes];
    for (int i = 0; i < V::kLanes; i++) {
        places[i] = place_of(job, first + (i < count ? i : 0));
        rows[i] = group_at(job, places[i], kDtype);
    }
    Extent<V> extent;
    if constexpr (is_code(kDtype)) {
        extent = look_up<V, kGroup, kDtype>(job, rows, places, w);
    } else {
        extent = widen<V, kGroup, kDtype>(rows, w);
    }
    Levels<V> levels = levels_of<V, kBits>(extent, clip_factor(0));
    if (!V::all_finite(V::add(levels.scale, extent.poison))) return refuse(job);
    if (kBits == 4 && job.clip) levels = best_levels<V, kBits, kGroup>(w, extent, levels);

    const bool full = count == V::kLanes;
    uint8_t *const to = job.q + first * kQ;
    for (int at = 0; at < kQ; at += 16) {
        typename V::Words words[4];
        for (int i = 0; i < 4; i++) words[i] = pack_word<V, kBits, kGroup>(w, at + 4 * i, levels);
        V::scatter4(words, (full ? to : q) + at, kQ);
    }
    if (!full) std::memcpy(to, q, static_cast<size_t>(count) * kQ);
    uint16_t scale[V::kLanes];
    uint8_t zero[V::kLanes];
    V::store_low16(scale, V::to_fp16(levels.scale));
    V::store_low8(zero, V::difference(V::set(kRounder), levels.least));
    std::memcpy(job.scale + first, scale, static_cast<size_t>(count) * sizeof *scale);
    std::memcpy(job.zero + first, zero, static_cast<size_t>(count));
}

template <class V, int kBits, int kGroup, int kDtype> void one_item(void *argument, int, int64_t item) {
    Quantize &job = *static_cast<Quantize *>(argument);
    const int64_t at_once = groups_per_item(job), start = item * at_once;
    const int64_t stop = start + at_once < job.all_groups ? start + at_once : job.all_groups;
    for (int64_t first = start; first < stop && !refused(job); first += V::kLanes) {
        const int64_t left = stop - first;
        some_groups<V, kBits, kGroup, kDtype>(job, first, left < V::kLanes ? static_cast<int>(left) : V::kLanes);
    }
}

template <class V, int kBits, int kGroup> Job item_of_dtype(int32_t dtype) {
    switch (dtype) {
        case TK_BF16: return one_item<V, kBits, kGroup, TK_BF16>;
        case TK_F16: return one_item<V, kBits, kGroup, TK_F16>;
        case TK_CODE8: return one_item<V, kBits, kGroup, TK_CODE8>;
        case TK_CODE4: return one_item<V, kBits, kGroup, TK_CODE4>;
        case kE4m3: return one_item<V, kBits, kGroup, kE4m3>;
        default: return one_item<V, kBits, kGroup, TK_F32>;
    }
}

template <class V, int kBits> Job item_of_group(int32_t group, int32_t dtype) {
    switch (group) {
        case 32: return item_of_dtype<V, kBits, 32>(dtype);
        case 64: return item_of_dtype<V, kBits, 64>(dtype);
        default: return item_of_dtype<V, kBits, 128>(dtype);
    }
}

template <class V> int quantize_lanes(Quantize &job, Pool &pool) {
    const auto item = job.bits == 4 ? item_of_group<V, 4> : item_of_group<V, 8>;
    return run_items(job, pool, item(job.group, job.dtype));
}

} // namespace
} // namespace tk
