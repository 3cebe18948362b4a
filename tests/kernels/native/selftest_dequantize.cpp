// tk_dequantize beside scale * (q - zero) in double: exact in fp32, rounded once in bf16; and beside scale * value.

#include "selftest.h"

namespace {

void check(int32_t format, int32_t group, int64_t out, int64_t in, Random &random) {
    const int64_t shift = random.below(3), first = random.below(out), rows = 1 + random.below(out - first);
    Packed packed(format, group, out * in, shift, random);
    const tk_weight w = packed.of(out, in);
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
            const double value = packed.weight(first * in + i), rounding = std::fabs(value) / 256 + 1e-40;
            CHECK(static_cast<double>(wide.get(i)) == value, "%g, level %d", value, level);
            CHECK(std::fabs(bf16(narrow.get(i)) - value) <= rounding, "%g, level %d", value, level);
        }
    }
}

} // namespace

void test_dequantize(int cases) {
    static const int32_t group_sizes[] = {32, 64, 128}, formats[] = {TK_INT4, TK_INT8, TK_CODEBOOK};
    Random random(4);
    for (int i = 0; i < cases; i++) {
        const int32_t group = random.one_of(group_sizes);
        check(random.one_of(formats), group, 1 + random.below(20), group * (1 + random.below(9)), random);
    }
}
