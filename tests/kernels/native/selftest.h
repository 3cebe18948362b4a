// What the parts of the self-test share: random numbers, buffers whose ends sanitizers watch, and counting.
#pragma once

#include "tiered_kernels.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>

// The same numbers on every machine.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 2654435769u + 88172645463325252u) {}

    uint32_t bits() {
        state_ ^= state_ << 13;
        state_ ^= state_ >> 7;
        state_ ^= state_ << 17;
        return static_cast<uint32_t>(state_ >> 16);
    }

    int64_t below(int64_t limit) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(limit)); }

    template <typename T, size_t N> T one_of(const T (&values)[N]) { return values[below(N)]; }

    // Nearly normal, of variance 1.
    float normal() {
        float sum = 0;
        for (int i = 0; i < 6; i++) sum += static_cast<float>(bits()) / 4294967296.0f - 0.5f;
        return sum * std::sqrt(2.0f);
    }

  private:
    uint64_t state_;
};

// Exactly `count` elements on the heap, where one byte more is a sanitizer's find; `shift` elements off its alignment.
template <typename T> class Exact {
  public:
    explicit Exact(int64_t count, int64_t shift = 0)
        : memory_(new uint8_t[static_cast<size_t>(count + shift) * sizeof(T)]),
          data_(memory_.get() + shift * static_cast<int64_t>(sizeof(T))), count_(count) {}

    T *data() { return reinterpret_cast<T *>(data_); }
    const uint8_t *bytes() const { return data_; }
    int64_t count() const { return count_; }

    T get(int64_t i) const {
        T value;
        std::memcpy(&value, data_ + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
        return value;
    }

    void set(int64_t i, T value) { std::memcpy(data_ + i * static_cast<int64_t>(sizeof(T)), &value, sizeof(T)); }

    void fill(int byte) { std::memset(data_, byte, static_cast<size_t>(count_) * sizeof(T)); }

    bool operator==(const Exact &other) const {
        return count_ == other.count_ && !std::memcmp(data_, other.data_, static_cast<size_t>(count_) * sizeof(T));
    }

  private:
    std::unique_ptr<uint8_t[]> memory_;
    uint8_t *data_;
    int64_t count_;
};

struct Context {
    Context(int threads, int level) : context(tk_create(threads, level)) {}
    ~Context() { tk_destroy(context); }
    Context(const Context &) = delete;
    tk_context *context;
};

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline double bf16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

// Towards zero, which is good enough to make test data of.
inline uint16_t cut_to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>(bits >> 16);
}

inline double fp16(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const double size = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    return bits & 0x8000 ? -size : size;
}

// Weights as a store has them, in all formats but plain bf16: random codes, zeros and scales.
struct Packed {
    int32_t format, group, scale_dtype;
    Exact<uint8_t> q, zero, scale; // of the last, the bytes of whatever dtype it has
    Exact<float> values;

    Packed(int32_t format, int32_t group, int64_t weights, int64_t shift, Random &random)
        : format(format), group(group), scale_dtype(format == TK_CODEBOOK ? random.one_of(kScales) : TK_F16),
          q(format == TK_INT8 ? weights : weights / 2, shift), zero(format == TK_CODEBOOK ? 0 : weights / group, shift),
          scale(weights / group * scale_nbytes(), shift * scale_nbytes()), values(16, shift) {
        for (int64_t i = 0; i < q.count(); i++) q.set(i, static_cast<uint8_t>(random.bits()));
        // Zeros of 4 bits reach 16 in some checkpoints.
        for (int64_t i = 0; i < zero.count(); i++) {
            zero.set(i, static_cast<uint8_t>(random.below(format == TK_INT4 ? 17 : 256)));
        }
        for (int64_t g = 0; g < weights / group; g++) set_scale(g, random);
        // In whole steps, halves of them among others, or in none.
        const float unit = random.below(2) ? 0.5f : 1.0f, fraction = random.below(2) ? 0.25f / 3 : 0;
        for (int64_t i = 0; i < 16; i++) {
            values.set(i, unit * static_cast<float>(random.below(200) - 120) + fraction * static_cast<float>(i));
        }
    }

    tk_weight of(int64_t out, int64_t in) {
        const uint16_t *scales = reinterpret_cast<const uint16_t *>(scale.data());
        const bool looked_up = format == TK_CODEBOOK;
        return {format, group, out, in, q.data(), scales, looked_up ? nullptr : zero.data(), looked_up ? values.data() : nullptr, scale_dtype};
    }

    // Weight number `at` of all, the rows one behind the other.
    double weight(int64_t at) const {
        const int64_t g = at / group, half = group / 2, within = at % group;
        if (format == TK_INT8) return scale_of(g) * (q.get(at) - zero.get(g));
        const uint8_t byte = q.get(g * half + within % half);
        const int code = within < half ? byte & 15 : byte >> 4;
        // A product of fp32 numbers, which is rounded.
        if (format == TK_CODEBOOK) return static_cast<float>(scale_of(g)) * values.get(code);
        return scale_of(g) * (code - zero.get(g));
    }

  private:
    static constexpr int32_t kScales[] = {TK_F16, TK_F32, TK_E8M0};

    int64_t scale_nbytes() const { return scale_dtype == TK_E8M0 ? 1 : scale_dtype == TK_F32 ? 4 : 2; }

    void set_scale(int64_t g, Random &random) {
        // Some are 0 or subnormal.
        uint32_t bits = static_cast<uint32_t>(random.below(16) ? 0x2000 + random.below(0x1000) : random.below(600));
        if (scale_dtype == TK_E8M0) bits = static_cast<uint32_t>(random.below(16) ? 116 + random.below(8) : random.below(9));
        if (scale_dtype == TK_F32) bits = 0x3c000000u + static_cast<uint32_t>(random.below(0x1000000));
        for (int64_t i = 0; i < scale_nbytes(); i++) scale.set(g * scale_nbytes() + i, static_cast<uint8_t>(bits >> 8 * i));
    }

    double scale_of(int64_t g) const {
        uint32_t bits = 0;
        for (int64_t i = 0; i < scale_nbytes(); i++) bits |= static_cast<uint32_t>(scale.get(g * scale_nbytes() + i)) << 8 * i;
        if (scale_dtype == TK_E8M0) return std::ldexp(1.0, static_cast<int>(bits) - 127);
        return scale_dtype == TK_F32 ? float_of(bits) : fp16(static_cast<uint16_t>(bits));
    }
};

inline int &failures() {
    static int count = 0;
    return count;
}

#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        if (!(condition) && failures()++ < 20) {                                                                       \
            std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);                                                \
            std::printf(__VA_ARGS__);                                                                                  \
            std::printf("\n");                                                                                         \
        }                                                                                                              \
    } while (0)

void test_linear(int cases);
void test_quantize(int cases);
void test_dequantize(int cases);
void test_published(int cases);
void test_attention(int cases);
void test_recurrent(int cases);
