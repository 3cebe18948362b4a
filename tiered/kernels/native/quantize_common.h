// What every level's quantizing shares: constants, where groups lie, and how a call is cut into items. Everything here
// has internal linkage; see pool.h.
#pragma once

#include "quantize.h"

namespace tk {
namespace {

// Adding this rounds to an integer, to nearest and halves to even, where |x| < 2^22: sums have no bits for a fraction.
// Ranges here end at 1.5 * 255, the most that rounding a scale to a subnormal fp16 can make of 255 steps.
constexpr float kRounder = 12582912.0f; // 1.5 * 2^23
constexpr float kLeastScale = 1.0f / (1 << 24);

constexpr int kFactors = 7;

// CLIP_FACTORS of quantize.py.
constexpr float clip_factor(int index) { return static_cast<float>((40 - index) / 40.0); }

constexpr int kItemWeights = 1 << 17; // some 50 us at the fastest level: few enough items, and soon cancelled

constexpr bool is_code(int32_t dtype) { return dtype == TK_CODE8 || dtype == TK_CODE4 || dtype == kE4m3; }

constexpr int kRun = 16; // columns of which all have one scale, where codes are looked up

// Where a group begins.
struct Place {
    int64_t row, column;
};

inline Place place_of(const Quantize &job, int64_t index) {
    return {index / job.groups, index % job.groups * job.group};
}

inline const unsigned char *group_at(const Quantize &job, Place place, int32_t dtype) {
    return job.weight + place.row * job.row_nbytes + nbytes_of(dtype, place.column);
}

// Where the scale, and the zero, of a run of the group's columns is.
inline int64_t scale_at(const Quantize &job, Place place, int run) {
    return place.row * job.lookup.groups + ((place.column + run * kRun) >> job.shift);
}

inline void refuse(Quantize &job) { __atomic_store_n(&job.not_finite, 1, __ATOMIC_RELAXED); }
inline bool refused(const Quantize &job) { return __atomic_load_n(&job.not_finite, __ATOMIC_RELAXED) != 0; }

inline int64_t groups_per_item(const Quantize &job) { return kItemWeights / job.group; }

inline int run_items(Quantize &job, Pool &pool, Job item) {
    const int64_t at_once = groups_per_item(job);
    const bool whole = pool.run((job.all_groups + at_once - 1) / at_once, item, &job, job.cancel);
    return refused(job) ? TK_NOT_FINITE : whole ? TK_OK : TK_CANCELLED;
}

} // namespace
} // namespace tk
