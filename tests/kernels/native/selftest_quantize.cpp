// tk_quantize at every level beside the portable one, bit by bit, and what its codes stand for beside the weights.

#include "selftest.h"

namespace {

struct Shape {
    int64_t rows, in, ld;
    int32_t dtype, bits, group, clip;
    int64_t shift; // elements by which every buffer is off its alignment
};

struct Codes {
    Exact<uint8_t> q, zero;
    Exact<uint16_t> scale;

    explicit Codes(const Shape &s)
        : q(s.rows * s.in * s.bits / 8, s.shift), zero(s.rows * s.in / s.group, s.shift),
          scale(s.rows * s.in / s.group, s.shift) {}

    bool operator==(const Codes &other) const { return q == other.q && zero == other.zero && scale == other.scale; }
};

int64_t nbytes_of_codes(const Shape &s) {
    const int64_t codes = (s.rows - 1) * s.ld + s.in;
    return s.dtype == TK_CODE8 ? codes : codes / 2;
}

int call(const Shape &s, Exact<uint8_t> &weight, Codes &codes, int level, int threads, const int32_t *cancel,
         const tk_lookup *lookup = nullptr) {
    Context context(threads, level);
    return tk_quantize(context.context, weight.data(), s.dtype, s.rows, s.in, s.ld, s.bits, s.group, s.clip,
                       codes.q.data(), codes.scale.data(), codes.zero.data(), lookup, cancel);
}

void put(const Shape &s, Exact<uint8_t> &weight, int64_t i, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t magnitude = bits & 0x7fffffff, fp16 = magnitude ? (magnitude - (112u << 23)) >> 13 : 0;
    const uint32_t narrow = s.dtype == TK_BF16 ? bits >> 16 : (bits >> 16 & 0x8000) | fp16;
    const int itemsize = s.dtype == TK_F32 ? 4 : 2;
    for (int k = 0; k < itemsize; k++) {
        const uint32_t source = s.dtype == TK_F32 ? bits : narrow;
        weight.set(i * itemsize + k, static_cast<uint8_t>(source >> (8 * k)));
    }
}

double value_of(const Shape &s, const Codes &codes, int64_t row, int64_t i) {
    const int64_t g = i / s.group, half = s.group / 2, within = i % s.group, at = row * (s.in / s.group) + g;
    int code = 0;
    if (s.bits == 8) {
        code = codes.q.get(row * s.in + i);
    } else {
        const uint8_t byte = codes.q.get(row * s.in / 2 + g * half + within % half);
        code = within < half ? byte & 15 : byte >> 4;
    }
    return fp16(codes.scale.get(at)) * (code - codes.zero.get(at));
}

// What a byte is as a float of 8 bits, E4M3.
float e4m3(int code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const float magnitude = exponent ? std::ldexp(static_cast<float>(8 + mantissa), exponent - 10)
                                     : std::ldexp(static_cast<float>(mantissa), -9);
    if ((code & 0x7f) == 0x7f) return std::nanf("");
    return code & 0x80 ? -magnitude : magnitude;
}

// Codes looked up at every level beside the numbers that they stand for. Those of E4M3 are computed, not looked up.
void test_codes(const Shape &s, bool is_e4m3, Random &random) {
    const int64_t per = int64_t{16} << random.below(4), groups = random.below(3) ? (s.in + per - 1) / per : 1;
    const int codes = s.dtype == TK_CODE8 ? 256 : 16;
    Exact<uint8_t> packed(nbytes_of_codes(s), s.shift), plain(s.rows * s.in * 4, 0);
    std::unique_ptr<float[]> table(new float[static_cast<size_t>(codes)]);
    std::unique_ptr<float[]> scale(new float[static_cast<size_t>(s.rows * groups)]);
    std::unique_ptr<float[]> zero(random.below(2) ? new float[static_cast<size_t>(s.rows * groups)] : nullptr);
    for (int i = 0; i < codes; i++) {
        table[static_cast<size_t>(i)] = is_e4m3 ? e4m3(i) : static_cast<float>(random.below(31) - 15);
    }
    for (int64_t i = 0; i < s.rows * groups; i++) {
        scale[static_cast<size_t>(i)] = std::ldexp(1.0f, -static_cast<int>(random.below(8)));
        if (zero) zero[static_cast<size_t>(i)] = static_cast<float>(random.below(16));
    }
    for (int64_t i = 0; i < nbytes_of_codes(s); i++) {
        const int64_t code = random.below(256);
        packed.set(i, static_cast<uint8_t>(is_e4m3 && (code & 0x7f) == 0x7f ? code - 1 : code)); // no NaN
    }
    Shape numbers = s;
    numbers.dtype = TK_F32;
    numbers.ld = s.in;
    for (int64_t row = 0; row < s.rows; row++) {
        for (int64_t i = 0; i < s.in; i++) {
            const int64_t at = row * s.ld + i;
            const int code = s.dtype == TK_CODE8 ? packed.get(at) : packed.get(at / 2) >> (at & 1) * 4 & 15;
            const size_t of = static_cast<size_t>(row * groups + (groups == 1 ? 0 : i / per));
            const float less = zero ? table[static_cast<size_t>(code)] - zero[of] : table[static_cast<size_t>(code)];
            put(numbers, plain, row * s.in + i, less * scale[of]);
        }
    }
    Codes expected(s);
    CHECK(call(numbers, plain, expected, TK_SCALAR, 1, nullptr) == TK_OK, "status");
    const tk_lookup lookup = {table.get(), scale.get(), zero.get(), groups, per};
    for (int level = 0; level < TK_LEVELS; level++) {
        if (tk_refusal(level)) continue;
        Codes found(s);
        CHECK(call(s, packed, found, level, 2, nullptr, &lookup) == TK_OK, "level %d", level);
        CHECK(found == expected, "level %d, codes %d, %d bits, group %d", level, s.dtype, s.bits, s.group);
    }
}

void test_shape(const Shape &s, Random &random) {
    const int itemsize = s.dtype == TK_F32 ? 4 : 2;
    const int64_t elements = (s.rows - 1) * s.ld + s.in;
    Exact<uint8_t> weight(elements * itemsize, s.shift * itemsize);
    std::unique_ptr<float[]> plain(new float[static_cast<size_t>(elements)]);
    for (int64_t i = 0; i < elements; i++) {
        // Four bits of mantissa, 2^-7 to 15, and zeros: every dtype holds them.
        const float integer = static_cast<float>(random.below(31) - 15);
        plain[static_cast<size_t>(i)] = std::ldexp(integer, -static_cast<int>(random.below(8)));
        put(s, weight, i, plain[static_cast<size_t>(i)]);
    }
    Codes expected(s);
    CHECK(call(s, weight, expected, TK_SCALAR, 1, nullptr) == TK_OK, "status");
    const double steps = s.bits == 4 ? 15 : 255;
    for (int64_t row = 0; row < s.rows && !s.clip; row++) {
        for (int64_t i = 0; i < s.in; i++) {
            const double w = plain[static_cast<size_t>(row * s.ld + i)];
            const double error = std::fabs(w - value_of(s, expected, row, i));
            const double scale = fp16(expected.scale.get((row * s.in + i) / s.group));
            CHECK(error <= scale * (0.51 + steps / 2048), "%g is %g from its code, scale %g", w, error, scale);
        }
    }
    for (int level = 0; level < TK_LEVELS; level++) {
        if (tk_refusal(level)) continue;
        for (int threads = 1; threads <= 3; threads++) {
            Codes found(s);
            CHECK(call(s, weight, found, level, threads, nullptr) == TK_OK, "level %d", level);
            CHECK(found == expected, "level %d, %d threads, %d bits, group %d", level, threads, s.bits, s.group);
        }
        Codes found(s);
        const int32_t cancel = 1;
        CHECK(call(s, weight, found, level, 2, &cancel) == TK_CANCELLED, "level %d", level);
        const int64_t place = random.below(s.rows) * s.ld + random.below(s.in);
        Exact<uint8_t> broken(elements * itemsize, s.shift * itemsize);
        std::memcpy(broken.data(), weight.data(), static_cast<size_t>(elements * itemsize));
        broken.set((place + 1) * itemsize - 1, 0x7f); // with the next, a NaN
        broken.set((place + 1) * itemsize - 2, 0xff);
        CHECK(call(s, broken, found, level, 2, nullptr) == TK_NOT_FINITE, "level %d", level);
    }
}

} // namespace

void test_quantize(int cases) {
    Random random(7);
    constexpr int32_t kDtypes[] = {TK_BF16, TK_F16, TK_F32}, kBits[] = {4, 8}, kGroups[] = {32, 64, 128};
    for (int i = 0; i < cases; i++) {
        Shape s = {};
        s.dtype = random.one_of(kDtypes);
        s.bits = random.one_of(kBits);
        s.group = random.one_of(kGroups);
        s.clip = static_cast<int32_t>(random.below(2));
        s.rows = 1 + random.below(9);
        s.in = s.group * (1 + random.below(20));
        s.ld = s.in + random.below(2) * random.below(50);
        s.shift = random.below(3);
        test_shape(s, random);
        const bool is_e4m3 = i % 3 == 0;
        s.dtype = is_e4m3 || random.below(2) ? TK_CODE8 : TK_CODE4;
        s.ld += s.ld % 2;
        test_codes(s, is_e4m3, random);
    }
}
