// tk_delta_step, tk_scan_step, tk_conv and tk_by_head beside plain sums in double, at every level.

#include "selftest.h"

#include <algorithm>
#include <vector>

namespace {

using Floats = Exact<float>;

void fill(Floats &numbers, Random &random) {
    for (int64_t i = 0; i < numbers.count(); i++) numbers.set(i, random.normal());
}

bool is_near(double found, double expected, double size) { return std::fabs(found - expected) <= 2e-5 * (1 + size); }

void check_delta(Random &random) {
    const int64_t sequences = 1 + random.below(3), key_heads = 1 + random.below(2);
    const int64_t heads = key_heads * (1 + random.below(2)), keys = 1 + random.below(40), values = 1 + random.below(70);
    const int64_t shift = random.below(3), stride = heads * keys * values + random.below(9);
    Floats start((sequences - 1) * stride + heads * keys * values, shift), q(sequences * key_heads * keys, shift);
    Floats k(sequences * key_heads * keys, shift), v(sequences * heads * values, shift);
    Floats decay(sequences * heads, shift), beta(sequences * heads, shift), out(sequences * heads * values, shift);
    for (Floats *each : {&start, &q, &k, &v, &decay, &beta}) fill(*each, random);
    const int32_t normalized = static_cast<int32_t>(random.below(2));
    for (int level = 0; level < TK_LEVELS; level++) {
        if (tk_refusal(level)) continue;
        Context context(1 + static_cast<int>(random.below(3)), level);
        Floats state(start.count(), shift);
        for (int64_t i = 0; i < start.count(); i++) state.set(i, start.get(i));
        tk_delta_args args = {sequences, heads,   key_heads,    keys,        values,     state.data(), stride, q.data(),
                              k.data(),  v.data(), decay.data(), beta.data(), out.data(), 0.5f,         normalized};
        CHECK(tk_delta_step(context.context, &args, nullptr) == TK_OK, "level %d", level);
        args.heads = key_heads + 1;
        const bool is_multiple = args.heads % key_heads == 0;
        args.key_heads = is_multiple ? 0 : key_heads;
        CHECK(tk_delta_step(context.context, &args, nullptr) == TK_BAD_ARGUMENT, "level %d", level);
        for (int64_t item = 0; item < sequences * heads; item++) {
            const int64_t sequence = item / heads, head = item % heads;
            const int64_t at = (sequence * key_heads + head / (heads / key_heads)) * keys;
            double lengths[2] = {1, 1};
            for (int64_t i = 0; normalized && i < keys; i++) {
                lengths[0] += (i ? 0 : 1e-6 - 1) + q.get(at + i) * static_cast<double>(q.get(at + i));
                lengths[1] += (i ? 0 : 1e-6 - 1) + k.get(at + i) * static_cast<double>(k.get(at + i));
            }
            for (int64_t column = 0; column < values; column++) {
                const int64_t from = sequence * stride + head * keys * values + column;
                double memory = 0, sum = 0, size = 0;
                for (int64_t i = 0; i < keys; i++) {
                    const double key = k.get(at + i) / std::sqrt(lengths[1]);
                    memory += decay.get(item) * static_cast<double>(start.get(from + i * values)) * key;
                }
                for (int64_t i = 0; i < keys; i++) {
                    const double key = k.get(at + i) / std::sqrt(lengths[1]);
                    const double change = key * beta.get(item) * (v.get(item * values + column) - memory);
                    const double now = decay.get(item) * static_cast<double>(start.get(from + i * values)) + change;
                    CHECK(is_near(state.get(from + i * values), now, std::fabs(change) * 10), "level %d", level);
                    sum += now * q.get(at + i) / std::sqrt(lengths[0]) * 0.5;
                    size += std::fabs(now * q.get(at + i)) + std::fabs(change) * 10;
                }
                CHECK(is_near(out.get(item * values + column), sum, size), "level %d", level);
            }
        }
    }
}

void check_scan(Random &random) {
    const int64_t sequences = 1 + random.below(3), heads = 1 + random.below(3), rows = heads * (1 + random.below(9));
    const int64_t size = 1 + random.below(40), groups = random.below(2) ? heads : 1, each_rows = rows / heads;
    const bool by_column = random.below(2);
    const int64_t decay_rows = by_column ? 1 : each_rows, decay_size = by_column ? size : 1;
    const int64_t shift = random.below(3), stride = rows * size + random.below(9);
    Floats start((sequences - 1) * stride + rows * size, shift), x(sequences * rows, shift);
    Floats decay(sequences * rows / decay_rows * decay_size, shift), out(sequences * rows, shift);
    Floats b(sequences * groups * size, shift), c(sequences * groups * size, shift);
    for (Floats *each : {&start, &x, &decay, &b, &c}) fill(*each, random);
    for (int level = 0; level < TK_LEVELS; level++) {
        if (tk_refusal(level)) continue;
        Context context(1 + static_cast<int>(random.below(3)), level);
        Floats state(start.count(), shift);
        for (int64_t i = 0; i < start.count(); i++) state.set(i, start.get(i));
        tk_scan_args args = {sequences,    rows,   size,         decay_rows, decay_size, rows / groups, state.data(),
                             stride,       decay.data(), x.data(),     b.data(),   c.data(),   out.data()};
        CHECK(tk_scan_step(context.context, &args, nullptr) == TK_OK, "level %d", level);
        args.decay_size = size + 1;
        CHECK(tk_scan_step(context.context, &args, nullptr) == TK_BAD_ARGUMENT, "level %d", level);
        for (int64_t sequence = 0; sequence < sequences; sequence++) {
            for (int64_t r = 0; r < rows; r++) {
                const int64_t of_decay = (sequence * (rows / decay_rows) + r / decay_rows) * decay_size;
                const int64_t of_group = (sequence * groups + r / (rows / groups)) * size, at = sequence * rows + r;
                double sum = 0, all = 0;
                for (int64_t i = 0; i < size; i++) {
                    const int64_t place = sequence * stride + r * size + i;
                    const double old = start.get(place) * static_cast<double>(decay.get(of_decay + (by_column ? i : 0)));
                    const double now = old + x.get(at) * static_cast<double>(b.get(of_group + i));
                    CHECK(is_near(state.get(place), now, 1 + std::fabs(old)), "level %d", level);
                    sum += now * c.get(of_group + i);
                    all += std::fabs(now * c.get(of_group + i));
                }
                CHECK(is_near(out.get(at), sum, all), "level %d", level);
            }
        }
    }
}

float stored(float value, float) { return value; }
uint16_t stored(float value, uint16_t) { return cut_to_bf16(value); }
double value_of(float number) { return number; }
double value_of(uint16_t number) { return bf16(number); }

// `Number` is float, or what bfloat16 is stored as.
template <typename Number> void check_conv(Random &random, int32_t dtype) {
    using Numbers = Exact<Number>;
    const int64_t sequences = 1 + random.below(3), channels = 1 + random.below(40), tokens = 1 + random.below(80);
    const int64_t kept = 1 + random.below(6), shift = random.below(3), stride = channels * kept + random.below(9);
    const bool has_state = random.below(2), has_bias = random.below(2), by_token = random.below(2);
    Numbers state((sequences - 1) * stride + channels * kept, shift), x(sequences * channels * tokens, shift);
    Numbers weight(channels * kept, shift), bias(channels, shift), out(sequences * channels * tokens, shift);
    for (Numbers *each : {&state, &x, &weight, &bias}) {
        for (int64_t i = 0; i < each->count(); i++) each->set(i, stored(random.normal(), Number()));
    }
    const int64_t of_channel = by_token ? 1 : tokens, of_token = by_token ? channels : 1;
    std::vector<double> before(static_cast<size_t>(state.count()));
    for (int64_t i = 0; i < state.count(); i++) before[static_cast<size_t>(i)] = value_of(state.get(i));
    Context context(1 + static_cast<int>(random.below(3)), TK_SCALAR);
    tk_conv_args args = {sequences, channels, tokens, kept, has_state ? state.data() : nullptr, stride,
                         x.data(), {channels * tokens, of_channel, of_token}, weight.data(),
                         has_bias ? bias.data() : nullptr, out.data(), dtype};
    CHECK(tk_conv(context.context, &args, nullptr) == TK_OK, "dtype %d, kept %d", dtype, static_cast<int>(kept));
    args.kept = TK_MOST_KEPT + 1;
    CHECK(tk_conv(context.context, &args, nullptr) == TK_BAD_ARGUMENT, "kept %d", static_cast<int>(args.kept));
    args.kept = kept;
    args.dtype = TK_F16;
    CHECK(tk_conv(context.context, &args, nullptr) == TK_BAD_ARGUMENT, "dtype %d", args.dtype);
    // Sums are of float, and rounded once to what is stored.
    const double rounding = dtype == TK_BF16 ? 1.0 / 256 : 0;
    for (int64_t sequence = 0; sequence < sequences; sequence++) {
        for (int64_t c = 0; c < channels; c++) {
            const auto input = [&](int64_t t) -> double {
                if (t >= 0) return value_of(x.get(sequence * channels * tokens + c * of_channel + t * of_token));
                return has_state ? before[static_cast<size_t>(sequence * stride + c * kept + kept + t)] : 0;
            };
            for (int64_t t = 0; t < tokens; t++) {
                double sum = has_bias ? value_of(bias.get(c)) : 0;
                for (int64_t i = 0; i < kept; i++) sum += input(t - kept + 1 + i) * value_of(weight.get(c * kept + i));
                const double found = value_of(out.get((sequence * channels + c) * tokens + t));
                CHECK(std::fabs(found - sum) <= std::fabs(sum) * rounding + 2e-5 * 11, "%g, dtype %d", sum, dtype);
            }
            for (int64_t i = 0; has_state && i < kept; i++) {
                const double expected = input(tokens - kept + i);
                CHECK(value_of(state.get(sequence * stride + c * kept + i)) == expected, "%g", expected);
            }
        }
    }
}

void check_by_head(Random &random) {
    const int64_t heads = 1 + random.below(3), rows = 1 + random.below(30), in = 1 + random.below(70);
    const int64_t tokens = 1 + random.below(20), shift = random.below(3), w_stride = rows * in + random.below(9);
    const int32_t transposed = static_cast<int32_t>(random.below(2));
    const int64_t from = transposed ? rows : in, to = transposed ? in : rows;
    Floats w((heads - 1) * w_stride + rows * in, shift);
    fill(w, random);
    Exact<uint16_t> x(tokens * heads * from, shift), y(tokens * heads * to, shift);
    for (int64_t i = 0; i < x.count(); i++) x.set(i, cut_to_bf16(random.normal()));
    const int64_t of_x[2] = {heads * from, from}, of_y[2] = {heads * to, to};
    for (int level = 0; level < TK_LEVELS; level++) {
        if (tk_refusal(level)) continue;
        Context context(1 + static_cast<int>(random.below(3)), level);
        const int status = tk_by_head(context.context, w.data(), heads, rows, in, w_stride, transposed, x.data(), tokens,
                                      of_x, y.data(), of_y, nullptr);
        CHECK(status == TK_OK, "level %d", level);
        for (int64_t item = 0; item < tokens * heads; item++) {
            const int64_t head = item % heads;
            for (int64_t i = 0; i < to; i++) {
                double sum = 0, size = 0;
                for (int64_t j = 0; j < from; j++) {
                    const double product = bf16(x.get(item * from + j)) *
                                           static_cast<double>(w.get(head * w_stride + (transposed ? j * in + i : i * in + j)));
                    sum += product;
                    size += std::fabs(product);
                }
                const double error = std::fabs(bf16(y.get(item * to + i)) - sum);
                CHECK(error <= std::fabs(sum) / 256 + 2e-5 * (1 + size), "%g, level %d", sum, level);
            }
        }
    }
}

} // namespace

void test_recurrent(int cases) {
    Random random(6);
    for (int i = 0; i < cases; i++) {
        check_delta(random);
        check_scan(random);
        check_conv<float>(random, TK_F32);
        check_conv<uint16_t>(random, TK_BF16);
        check_by_head(random);
    }
}
