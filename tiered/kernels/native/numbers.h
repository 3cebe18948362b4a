// 16-bit floats in plain C++: exact, portable, branch-light. Everything here has internal linkage; see pool.h.
#pragma once

#include <cstdint>
#include <cstring>

namespace tk {
namespace {

[[maybe_unused]] inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

[[maybe_unused]] inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

[[maybe_unused]] inline float from_bf16(uint16_t bits) { return as_float(static_cast<uint32_t>(bits) << 16); }

// To nearest, ties to even; a NaN stays one.
[[maybe_unused]] inline uint16_t to_bf16(float value) {
    const uint32_t bits = as_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

[[maybe_unused]] inline float from_fp16(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
    if (exponent == 31) return as_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0) { // zero or subnormal: mantissa * 2^-24, exactly
        const float value = static_cast<float>(mantissa) * as_float(0x33800000u);
        return as_float(as_bits(value) | sign);
    }
    return as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

} // namespace
} // namespace tk
