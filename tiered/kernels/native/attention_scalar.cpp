// Attention in plain C++: arrays of eight numbers that any compiler turns into whatever vectors the processor has.

#include "attention_item.h"
#include "vector_plain.h"

namespace tk {

namespace {

struct Portable : Plain {
    static constexpr int kQueries = 2;
    static constexpr int kSums = 8;

    static F add(const F &a, const F &b) {
        return each([&](int i) { return a.lane[i] + b.lane[i]; });
    }
    static F sub(const F &a, const F &b) {
        return each([&](int i) { return a.lane[i] - b.lane[i]; });
    }
    static F mul(const F &a, const F &b) { return multiply(a, b); }
    static F div(const F &a, const F &b) {
        return each([&](int i) { return a.lane[i] / b.lane[i]; });
    }
    // As the vector instructions: b where either is NaN.
    static F max(const F &a, const F &b) {
        return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    static F min(const F &a, const F &b) {
        return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    // Of numbers below 2^22: adding 1.5 * 2^23 leaves no room for a fraction.
    static F round(const F &a) {
        return each([&](int i) { return (a.lane[i] + 12582912.0f) - 12582912.0f; });
    }
    static F times_power(const F &a, const F &n) {
        return each([&](int i) {
            const float power = n.lane[i];
            if (!(power <= 127)) return a.lane[i] * power; // NaN or infinite
            return a.lane[i] * as_float(static_cast<uint32_t>(static_cast<int>(power) + 127) << 23);
        });
    }
    static F unless_below(const F &x, float limit, const F &value) {
        return each([&](int i) { return x.lane[i] < limit ? 0 : value.lane[i]; });
    }
    static F choose(uint64_t bits, const F &value) {
        return each([&](int i) { return bits >> i & 1 ? value.lane[i] : -INFINITY; });
    }
    static float max_of(const F &a) {
        float most = a.lane[0];
        for (int i = 1; i < kLanes; i++) most = most > a.lane[i] ? most : a.lane[i];
        return most;
    }
    static float first_of(const F &a) { return a.lane[0]; }
    static float half(uint16_t bits) { return from_fp16(bits); }

    static F widen(const uint16_t *bf16) {
        return each([=](int i) { return from_bf16(load16(reinterpret_cast<const char *>(bf16 + i))); });
    }
    static F widen_part(const uint16_t *bf16, int64_t) { return widen(bf16); } // a head_dim is a multiple of 8
    static F codes(const uint8_t *u8, int64_t count) {
        return each([=](int i) { return i < count ? static_cast<float>(u8[i]) : 0; });
    }
    static F nibbles(const uint8_t *u8, int64_t count, bool high) {
        return each([=](int i) { return i < count ? static_cast<float>(high ? u8[i] >> 4 : u8[i] & 15) : 0; });
    }
    using Nibbles = PlainNibbles<Portable>;
    // Up to eight channels' scales and zeros in fp32; 0 beyond `count`.
    static F scales(const uint16_t *fp16, int64_t count) {
        return each([=](int i) { return i < count ? half(load16(reinterpret_cast<const char *>(fp16 + i))) : 0; });
    }
    static F zeros(const uint8_t *u8, int64_t count) { return codes(u8, count); }
    static uint64_t nonzero(const uint8_t *u8, int64_t count) {
        uint64_t bits = 0;
        for (int64_t i = 0; i < count; i++) bits |= static_cast<uint64_t>(u8[i] != 0) << i;
        return bits;
    }

    // Lane i: the sum of the lanes of sums[i], added in halves, whatever i is.
    static F reduce(const F *sums) {
        return each([=](int i) {
            const float *x = sums[i].lane;
            return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
        });
    }
    // Q rows, `ld` apart.
    template <int Q> static void put(float *to, int64_t ld, const F &value) {
        for (int i = 0; i < kLanes; i++) to[i / (kLanes / Q) * ld + i % (kLanes / Q)] = value.lane[i];
    }
};

} // namespace

int attention_scalar(const Attention &attention, Pool &pool) { return attention_vector<Portable>(attention, pool); }

} // namespace tk
