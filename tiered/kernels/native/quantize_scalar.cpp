// The portable way: one group at a time, in loops over its weights that a compiler can turn into vectors.

#include "numbers.h"
#include "quantize_common.h"

namespace tk {

namespace {

constexpr int kMostGroup = 128;

// To nearest, ties to even; for numbers that are not negative, infinity included.
uint16_t to_fp16(float value) {
    const uint32_t bits = as_bits(value);
    if (bits > 0x7f800000u) return 0x7e00;
    if (bits >= 0x47800000u) return 0x7c00; // 65536 and above
    // Below 2^-14 a subnormal, which counts steps of 2^-24: so do the bits of a float from 0.5 on.
    if (bits < 0x38800000u) return static_cast<uint16_t>(as_bits(value + 0.5f) - as_bits(0.5f));
    return static_cast<uint16_t>((bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13);
}

// What a group's codes stand for under one clip factor.
struct Levels {
    float scale, inverse;
    float least, most; // kRounder - zero and kRounder + (codes' maximum - zero)
};

Levels levels_of(float low, float high, float factor, float max_code) {
    const float lo = low * factor, hi = high * factor;
    Levels levels = {};
    levels.scale = from_fp16(to_fp16((hi - lo) / max_code));
    if (hi > lo) {
        if (levels.scale < kLeastScale) levels.scale = kLeastScale;
        levels.inverse = 1.0f / levels.scale;
    }
    float zero = -lo * levels.inverse + kRounder - kRounder;
    if (zero > max_code) zero = max_code;
    levels.least = kRounder - zero;
    levels.most = levels.least + max_code;
    return levels;
}

// kRounder + the level nearest to each of the group's weights.
void nearest(const float *w, int group, const Levels &levels, float *out) {
    for (int i = 0; i < group; i++) {
        float level = w[i] * levels.inverse + kRounder;
        level = level > levels.least ? level : levels.least;
        out[i] = level < levels.most ? level : levels.most;
    }
}

float squared_error(const float *w, int group, const Levels &levels) {
    float error[kMostGroup];
    nearest(w, group, levels, error);
    for (int i = 0; i < group; i++) {
        const float e = w[i] - (error[i] - kRounder) * levels.scale;
        error[i] = e * e;
    }
    for (int half = group / 2; half; half /= 2) {
        for (int i = 0; i < half; i++) error[i] += error[half + i];
    }
    return error[0];
}

void look_up(const Quantize &job, Place place, const unsigned char *source, float *out) {
    const tk_lookup &l = job.lookup;
    for (int i = 0; i < job.group; i++) {
        const int code = job.dtype != TK_CODE4 ? source[i] : source[i / 2] >> (i & 1) * 4 & 15;
        const int64_t at = scale_at(job, place, i / kRun);
        out[i] = (l.zero ? l.table[code] - l.zero[at] : l.table[code]) * l.scale[at];
    }
}

void widen(const unsigned char *source, int32_t dtype, int group, float *out) {
    if (dtype == TK_F32) {
        std::memcpy(out, source, static_cast<size_t>(group) * sizeof *out);
        return;
    }
    uint16_t bits[kMostGroup];
    std::memcpy(bits, source, static_cast<size_t>(group) * sizeof *bits);
    for (int i = 0; i < group; i++) out[i] = dtype == TK_BF16 ? from_bf16(bits[i]) : from_fp16(bits[i]);
}

void pack(const float *nearest, int group, int bits, float least, uint8_t *out) {
    uint8_t codes[kMostGroup];
    // Between 2^23 and 2^24 the bits of a number count in ones.
    for (int i = 0; i < group; i++) codes[i] = static_cast<uint8_t>(as_bits(nearest[i]) - as_bits(least));
    if (bits == 8) {
        std::memcpy(out, codes, static_cast<size_t>(group));
        return;
    }
    for (int i = 0; i < group / 2; i++) out[i] = static_cast<uint8_t>(codes[i] | codes[group / 2 + i] << 4);
}

bool one_group(Quantize &job, int64_t index) {
    float w[kMostGroup], codes[kMostGroup];
    const int group = job.group;
    const Place place = place_of(job, index);
    const unsigned char *const source = group_at(job, place, job.dtype);
    if (is_code(job.dtype)) {
        look_up(job, place, source, w);
    } else {
        widen(source, job.dtype, group, w);
    }
    float low = 0, high = 0, not_finite = 0;
    for (int i = 0; i < group; i++) {
        low = w[i] < low ? w[i] : low;
        high = w[i] > high ? w[i] : high;
        not_finite += w[i] * 0.0f; // NaN for a NaN or an infinity
    }
    const float max_code = job.bits == 4 ? 15.0f : 255.0f;
    if (not_finite != 0 || to_fp16((high - low) / max_code) >= 0x7c00) return false;
    Levels best = levels_of(low, high, clip_factor(0), max_code);
    if (job.clip) {
        float least_error = squared_error(w, group, best);
        for (int k = 1; k < kFactors; k++) {
            const Levels levels = levels_of(low, high, clip_factor(k), max_code);
            const float error = squared_error(w, group, levels);
            if (error < least_error) {
                least_error = error;
                best = levels;
            }
        }
    }
    nearest(w, group, best, codes);
    pack(codes, group, job.bits, best.least, job.q + index * group * job.bits / 8);
    const uint16_t scale = to_fp16(best.scale);
    std::memcpy(job.scale + index, &scale, sizeof scale);
    job.zero[index] = static_cast<uint8_t>(as_bits(kRounder) - as_bits(best.least));
    return true;
}

void one_item(void *argument, int, int64_t item) {
    Quantize &job = *static_cast<Quantize *>(argument);
    const int64_t at_once = groups_per_item(job);
    int64_t stop = (item + 1) * at_once;
    if (stop > job.all_groups) stop = job.all_groups;
    for (int64_t index = item * at_once; index < stop && !refused(job); index++) {
        if (!one_group(job, index)) refuse(job);
    }
}

} // namespace

int quantize_scalar(Quantize &quantize, Pool &pool) { return run_items(quantize, pool, one_item); }

} // namespace tk
