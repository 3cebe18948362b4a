// Vectors in plain C++: of eight numbers, which any compiler turns into those that there are, and of one, for what is left
// of a row at every level. Internal linkage throughout, see pool.h.
#pragma once

#include <cstdint>

namespace tk {
namespace {

struct One {
    using F = float;
    static constexpr int kLanes = 1;

    static F zero() { return 0; }
    static F set(float value) { return value; }
    static F load(const float *from) { return *from; }
    static void store(float *to, F value) { *to = value; }
    static F multiply(F a, F b) { return a * b; }
    static F fma(F a, F b, F c) { return a * b + c; }
    static F fnma(F a, F b, F c) { return c - a * b; }
};

struct Plain {
    struct F {
        float lane[8];
    };
    static constexpr int kLanes = 8;

    template <class Function> static F each(Function function) {
        F result;
        for (int i = 0; i < kLanes; i++) result.lane[i] = function(i);
        return result;
    }
    static F zero() { return set(0); }
    static F set(float value) {
        return each([=](int) { return value; });
    }
    static F load(const float *from) {
        return each([=](int i) { return from[i]; });
    }
    static void store(float *to, const F &value) {
        for (int i = 0; i < kLanes; i++) to[i] = value.lane[i];
    }
    static F multiply(const F &a, const F &b) {
        return each([&](int i) { return a.lane[i] * b.lane[i]; });
    }
    static F fma(const F &a, const F &b, const F &c) {
        return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
    }
    static F fnma(const F &a, const F &b, const F &c) {
        return each([&](int i) { return c.lane[i] - a.lane[i] * b.lane[i]; });
    }
};

// The lanes of a vector, added in halves.
template <class V> inline float sum_of(typename V::F value) {
    float lanes[V::kLanes];
    V::store(lanes, value);
    for (int half = V::kLanes / 2; half; half /= 2) {
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

} // namespace
} // namespace tk
