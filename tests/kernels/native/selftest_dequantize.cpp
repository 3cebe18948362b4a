// tk_dequantize beside scale * (q - zero) in double: exact in fp32, rounded once in bf16.

#include "selftest.h"

namespace {

void check(int32_t format, int32_t group, int64_t out, int64_t in, Random &random) {
    const int64_t shift = random.below(3), first = random.below(out), rows = 1 + random.below(out - first);
    Exact<uint8_t> q(format == TK_INT4 ? out * in / 2 : out * in, shift), zero(out * in / group, shift);
    Exact<uint16_t> scale(out * in / group, shift);
    for (int64_t i = 0; i < q.count(); i++) q.set(i, static_cast<uint8_t>(random.bits()));
    for (int64_t i = 0; i < zero.count(); i++) {
        zero.set(i, static_cast<uint8_t>(random.below(format == TK_INT4 ? 16 : 256)));
        // Some are 0 or subnormal.
        scale.set(i, static_cast<uint16_t>(random.below(16) ? 0x2000 + random.below(0x1000) : random.below(600)));
    }
    const tk_weight w = {format, group, out, in, q.data(), scale.data(), zero.data()};
    for (int level = 0; level < TK_LEVELS; level++) {
        if (tk_refusal(level)) continue;
        Context context(1 + static_cast<int>(random.below(3)), level);
        Exact<float> wide(rows * in, shift);
        Exact<uint16_t> narrow(rows * in, shift);
        CHECK(tk_dequantize(context.context, &w, first, rows, wide.data(), TK_F32) == TK_OK, "level %d", level);
        CHECK(tk_dequantize(context.context, &w, first, rows, narrow.data(), TK_BF16) == TK_OK, "level %d", level);
        const int bad = tk_dequantize(context.context, &w, first, out - first + 1, wide.data(), TK_F32);
        CHECK(bad == TK_BAD_ARGUMENT, "level %d", level);
        for (int64_t i = 0; i < rows * in; i++) {
            const int64_t at = first * in + i, g = at / group, half = group / 2, within = at % group;
            const uint8_t byte = format == TK_INT8 ? q.get(at) : q.get(g * half + within % half);
            const int code = format == TK_INT8 ? byte : within < half ? byte & 15 : byte >> 4;
            const double value = fp16(scale.get(g)) * (code - zero.get(g)), rounding = std::fabs(value) / 256;
            CHECK(static_cast<double>(wide.get(i)) == value, "%g, level %d", value, level);
            CHECK(std::fabs(bf16(narrow.get(i)) - value) <= rounding, "%g, level %d", value, level);
        }
    }
}

} // namespace

void test_dequantize(int cases) {
    static const int32_t group_sizes[] = {32, 64, 128};
    Random random(4);
    for (int i = 0; i < cases; i++) {
        const int32_t group = random.one_of(group_sizes);
        check(random.below(2) ? TK_INT4 : TK_INT8, group, 1 + random.below(20), group * (1 + random.below(9)), random);
    }
}
