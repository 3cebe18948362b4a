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
void test_attention(int cases);
