// 16-bit floats in plain C++: exact, portable, branch-light. Everything here has internal linkage; see pool.h.
#pragma once

#include "tiered_kernels.h"

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

[[maybe_unused]] inline float from_e8m0(uint8_t exponent) {
    return as_float(exponent == 255 ? 0x7fc00000u : exponent ? static_cast<uint32_t>(exponent) << 23 : 1u << 22);
}

// Scale number `i` of a quantized weight.
[[maybe_unused]] inline float scale_at(const tk_weight &w, int64_t i) {
    const bool looked_up = w.format == TK_CODEBOOK;
    if (looked_up && w.scale_dtype == TK_E8M0) return from_e8m0(reinterpret_cast<const uint8_t *>(w.scale)[i]);
    if (looked_up && w.scale_dtype == TK_F32) {
        float scale;
        std::memcpy(&scale, reinterpret_cast<const char *>(w.scale) + i * 4, sizeof scale);
        return scale;
    }
    uint16_t bits;
    std::memcpy(&bits, w.scale + i, sizeof bits);
    return from_fp16(bits);
}

} // namespace
} // namespace tk
