// tk_linear beside a naive sum in double, over levels, formats, tails, strides and threads; and beside itself, bit by
// bit.

#include "selftest.h"

#include <thread>
#include <vector>

namespace {

constexpr int kThreads[] = {1, 2, 3};

struct Shape {
    int32_t format, group;
    int64_t out, in, rows, ldx, ldy;
    int32_t bias_dtype, y_dtype; // bias_dtype -1: no bias
    int64_t shift;               // elements by which every buffer is off its alignment
};

struct Problem {
    Shape s;
    Packed packed;         // unless it is plain
    Exact<uint16_t> plain; // bf16
    Exact<uint16_t> x, short_bias;
    Exact<float> long_bias;
    std::vector<double> y;     // [rows, out]
    std::vector<double> size2; // of the terms of each sum, squared, and of the sum

    Problem(const Shape &shape, Random &random)
        : s(shape), packed(is_plain() ? TK_INT4 : s.format, is_plain() ? 64 : s.group, is_plain() ? 64 : s.out * s.in, s.shift, random),
          plain(is_plain() ? s.out * s.in : 0, s.shift), x((s.rows - 1) * s.ldx + s.in, s.shift), short_bias(s.out, s.shift), long_bias(s.out, s.shift),
          y(static_cast<size_t>(s.rows * s.out)), size2(y.size()) {
        for (int64_t i = 0; i < plain.count(); i++) plain.set(i, cut_to_bf16(random.normal()));
        for (int64_t i = 0; i < x.count(); i++) x.set(i, cut_to_bf16(random.normal() * (random.below(50) ? 1 : 20)));
        for (int64_t o = 0; o < s.out; o++) {
            long_bias.set(o, random.normal());
            short_bias.set(o, cut_to_bf16(random.normal()));
        }
        expect();
    }

    bool is_plain() const { return s.format == TK_DENSE_BF16; }

    double weight(int64_t o, int64_t i) const {
        return is_plain() ? bf16(plain.get(o * s.in + i)) : packed.weight(o * s.in + i);
    }

    double bias_of(int64_t o) const {
        if (s.bias_dtype < 0) return 0;
        return s.bias_dtype == TK_F32 ? long_bias.get(o) : bf16(short_bias.get(o));
    }

    void expect() {
        std::vector<double> weights(static_cast<size_t>(s.in));
        for (int64_t o = 0; o < s.out; o++) {
            for (int64_t i = 0; i < s.in; i++) weights[static_cast<size_t>(i)] = weight(o, i);
            for (int64_t r = 0; r < s.rows; r++) {
                double sum = bias_of(o), squares = 0;
                for (int64_t i = 0; i < s.in; i++) {
                    const double term = weights[static_cast<size_t>(i)] * bf16(x.get(r * s.ldx + i));
                    sum += term;
                    squares += term * term;
                }
                y[static_cast<size_t>(r * s.out + o)] = sum;
                size2[static_cast<size_t>(r * s.out + o)] = squares + sum * sum;
            }
        }
    }

    int run(tk_context *context, int32_t mode, int64_t first, int64_t count, Exact<uint8_t> &found,
            const int32_t *cancel = nullptr) {
        tk_weight w = packed.of(s.out, s.in);
        if (is_plain()) w = {s.format, 0, s.out, s.in, plain.data(), nullptr, nullptr, nullptr, 0};
        const void *bias = nullptr;
        if (s.bias_dtype == TK_BF16) bias = short_bias.data();
        if (s.bias_dtype == TK_F32) bias = long_bias.data();
        return tk_linear(context, &w, x.data() + first * s.ldx, count, s.ldx, bias, bias ? s.bias_dtype : 0,
                         found.data(), s.ldy, s.y_dtype, mode, cancel);
    }

    int64_t element_nbytes() const { return s.y_dtype == TK_F32 ? 4 : 2; }
    Exact<uint8_t> result(int64_t rows) const {
        return Exact<uint8_t>(((rows - 1) * s.ldy + s.out) * element_nbytes(), s.shift * element_nbytes());
    }

    double value(const Exact<uint8_t> &found, int64_t at) const {
        uint32_t bits = 0;
        for (int64_t i = 0; i < element_nbytes(); i++) {
            bits |= static_cast<uint32_t>(found.get(at * element_nbytes() + i)) << 8 * i;
        }
        return s.y_dtype == TK_F32 ? float_of(bits) : bf16(static_cast<uint16_t>(bits));
    }

    double error(const Exact<uint8_t> &found) const {
        double wrong = 0, all = 1e-30;
        for (int64_t r = 0; r < s.rows; r++) {
            for (int64_t o = 0; o < s.out; o++) {
                const double difference = value(found, r * s.ldy + o) - y[static_cast<size_t>(r * s.out + o)];
                wrong += difference * difference;
                all += size2[static_cast<size_t>(r * s.out + o)];
            }
        }
        return std::sqrt(wrong / all);
    }

    // Whether nothing between the rows was written.
    bool gaps_kept(const Exact<uint8_t> &found, uint8_t mark) const {
        for (int64_t r = 0; r + 1 < s.rows; r++) {
            for (int64_t i = s.out * element_nbytes(); i < s.ldy * element_nbytes(); i++) {
                if (found.get(r * s.ldy * element_nbytes() + i) != mark) return false;
            }
        }
        return true;
    }
};

void describe(const Shape &s, char (&text)[200]) {
    std::snprintf(text, sizeof text, "format %d group %d out %d in %d rows %d ldx %d ldy %d bias %d y %d", s.format,
                  s.group, static_cast<int>(s.out), static_cast<int>(s.in), static_cast<int>(s.rows),
                  static_cast<int>(s.ldx), static_cast<int>(s.ldy), s.bias_dtype, s.y_dtype);
}

// A row alone must have the bits that it has in the batch.
void check_rows(Problem &p, tk_context *context, const Exact<uint8_t> &batch, Random &random, const char *what) {
    const int64_t row_nbytes = p.s.out * p.element_nbytes();
    for (int i = 0; i < 3; i++) {
        const int64_t row = random.below(p.s.rows), count = 1 + random.below(p.s.rows - row);
        Exact<uint8_t> alone = p.result(count);
        CHECK(p.run(context, TK_INVARIANT, row, count, alone) == TK_OK, "%s", what);
        const uint8_t *in_batch = batch.bytes() + row * p.s.ldy * p.element_nbytes();
        CHECK(!std::memcmp(alone.bytes(), in_batch, static_cast<size_t>(row_nbytes)), "row %d of %d: %s",
              static_cast<int>(row), static_cast<int>(count), what);
    }
}

void check(const Shape &shape, Random &random, const std::vector<std::vector<std::unique_ptr<Context>>> &contexts) {
    Problem p(shape, random);
    char text[200];
    describe(shape, text);
    for (int level = 0; level < TK_LEVELS; level++) {
        std::unique_ptr<Exact<uint8_t>> first;
        for (const auto &context : contexts[static_cast<size_t>(level)]) {
            char what[260];
            std::snprintf(what, sizeof what, "level %d: %s", level, text);
            auto found = std::make_unique<Exact<uint8_t>>(p.result(shape.rows));
            found->fill(0xa5);
            CHECK(p.run(context->context, TK_FAST, 0, shape.rows, *found) == TK_OK, "%s", what);
            CHECK(p.error(*found) < 3e-2, "fast, error %g: %s", p.error(*found), what);
            found->fill(0xa5);
            CHECK(p.run(context->context, TK_INVARIANT, 0, shape.rows, *found) == TK_OK, "%s", what);
            CHECK(p.error(*found) < 4e-3, "error %g: %s", p.error(*found), what);
            CHECK(p.gaps_kept(*found, 0xa5), "%s", what);
            check_rows(p, context->context, *found, random, what);
            if (!first) {
                first = std::move(found);
            } else {
                CHECK(*found == *first, "the number of threads changes bits: %s", what);
            }
        }
    }
}

Shape random_shape(Random &random) {
    static const int32_t formats[] = {TK_INT4, TK_INT4, TK_INT8, TK_CODEBOOK, TK_DENSE_BF16}, group_sizes[] = {32, 64, 64, 128};
    static const int64_t outs[] = {1, 2, 7, 15, 16, 17, 31, 33, 48, 70};
    static const int64_t rows[] = {1, 1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 40};
    Shape s = {};
    s.format = random.one_of(formats);
    s.group = s.format == TK_DENSE_BF16 ? 0 : random.one_of(group_sizes);
    s.out = random.one_of(outs);
    s.in = (s.format == TK_DENSE_BF16 ? 32 : s.group) * (1 + random.below(random.below(4) ? 5 : 11));
    s.rows = random.one_of(rows);
    s.ldx = s.in + random.below(2) * random.below(9);
    s.ldy = s.out + random.below(2) * random.below(9);
    s.bias_dtype = static_cast<int32_t>(random.below(3)) - 1;
    s.y_dtype = static_cast<int32_t>(random.below(2));
    s.shift = random.below(3);
    return s;
}

// Two contexts at once, and a flag that another thread sets while one computes.
void check_concurrency(int level, Random &random) {
    Problem p({TK_INT4, 64, 96, 512, 20, 512, 96, -1, TK_BF16, 0}, random);
    int32_t cancel = 0;
    auto work = [&](int64_t rows) {
        Context context(2, level);
        Exact<uint8_t> found = p.result(p.s.rows);
        for (int i = 0; i < 20; i++) {
            const int status = p.run(context.context, i % 2, 0, rows, found, &cancel);
            CHECK(status == TK_OK || (status == TK_CANCELLED && __atomic_load_n(&cancel, __ATOMIC_RELAXED)), "%d",
                  status);
        }
        while (!__atomic_load_n(&cancel, __ATOMIC_RELAXED)) std::this_thread::yield();
        tk_trim(context.context);
        CHECK(tk_scratch_nbytes(context.context) == 0, "level %d", level);
        CHECK(p.run(context.context, TK_INVARIANT, 0, rows, found, &cancel) == TK_CANCELLED, "level %d", level);
    };
    std::thread one(work, 1), other(work, 20), setter([&] { __atomic_store_n(&cancel, 1, __ATOMIC_RELAXED); });
    setter.join();
    one.join();
    other.join();
}

} // namespace

void test_linear(int cases) {
    Random random(1);
    std::vector<std::vector<std::unique_ptr<Context>>> contexts(TK_LEVELS);
    for (int level = 0; level < TK_LEVELS; level++) {
        auto &of_level = contexts[static_cast<size_t>(level)];
        for (int threads : kThreads) {
            if (!tk_refusal(level)) of_level.push_back(std::make_unique<Context>(threads, level));
        }
    }
    for (int i = 0; i < cases; i++) {
        Shape shape = random_shape(random);
        check(shape, random, contexts);
    }
    if (cases >= 10) { // panels, blocks of the sum and their tails
        check({TK_INT4, 64, 530, 576, 70, 576, 530, TK_BF16, TK_BF16, 0}, random, contexts);
        check({TK_INT8, 64, 90, 1088, 37, 1090, 95, -1, TK_F32, 0}, random, contexts);
        check({TK_CODEBOOK, 32, 530, 576, 70, 576, 530, TK_BF16, TK_BF16, 0}, random, contexts);
        check({TK_INT4, 128, 35, 1152, 280, 1152, 35, -1, TK_BF16, 0}, random, contexts);
    }
    for (int level = 0; level < TK_LEVELS; level++) {
        if (!tk_refusal(level)) check_concurrency(level, random);
    }
}
