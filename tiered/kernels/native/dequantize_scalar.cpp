// Dequantization in plain C++; see dequantize_rows.h.

#include "dequantize_rows.h"

namespace tk {

namespace {

struct Scalar {
    using Codes = int;
    static constexpr int kLanes = 1;

    struct Factors {
        float scale, zero;
        Factors(float scale, float zero) : scale(scale), zero(zero) {}
        float weights(Codes code) const { return (static_cast<float>(code) - zero) * scale; }
    };

    struct Table {
        const float *values;
        float scale;
        Table(const float *values, float scale) : values(values), scale(scale) {}
        float weights(Codes code) const { return values[code] * scale; }
    };

    static Codes codes(const uint8_t *q) { return *q; }
    static Codes low(Codes both) { return both & 15; }
    static Codes high(Codes both) { return both >> 4; }
    static void store(float *out, float value) { std::memcpy(out, &value, sizeof value); }
    static void store(uint16_t *out, float value) {
        const uint16_t bits = to_bf16(value);
        std::memcpy(out, &bits, sizeof bits);
    }
};

} // namespace

void dequantize_scalar(Dequantize &dequantize, Pool &pool) { dequantize_with<Scalar>(dequantize, pool); }

} // namespace tk
