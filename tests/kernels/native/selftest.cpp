// Every entry of the C interface, over everything this machine can run; built with sanitizers by test_sanitizers.py.
// Prints what fails and what was tested; the exit status says whether anything failed. An argument scales the work.

#include "selftest.h"

#include <cstdlib>

namespace {

void test_contexts() {
    CHECK(tk_abi_version() == TK_ABI_VERSION, "%d", tk_abi_version());
    CHECK(tk_refusal(TK_SCALAR) == nullptr, "the portable kernel is refused");
    CHECK(tk_refusal(-1) && tk_refusal(TK_LEVELS), "levels that do not exist are not refused");
    CHECK(!tk_create(0, TK_SCALAR) && !tk_create(1, TK_LEVELS) && !tk_create(1 << 20, TK_SCALAR), "created");
    for (int level = 0; level < TK_LEVELS; level++) {
        const char *refusal = tk_refusal(level);
        Context context(2, level);
        CHECK(!context.context == !!refusal, "level %d", level);
    }
}

void test_bad_arguments() {
    Context context(1, TK_SCALAR);
    uint8_t q[32] = {}, zero = 0;
    uint16_t scale = 0, x[64] = {}, y[2] = {};
    const tk_weight good = {TK_INT4, 64, 1, 64, q, &scale, &zero, nullptr, 0};
    auto call = [&](const tk_weight &w, int64_t rows, int64_t ldx, int64_t ldy, int32_t dtype, int32_t mode) {
        return tk_linear(context.context, &w, x, rows, ldx, nullptr, 0, y, ldy, dtype, mode, nullptr);
    };
    CHECK(call(good, 1, 64, 1, TK_BF16, TK_INVARIANT) == TK_OK, "the good call");
    CHECK(call(good, 0, 0, 0, TK_BF16, TK_INVARIANT) == TK_OK, "no rows");
    const float values[16] = {};
    const tk_weight looked_up = {TK_CODEBOOK, 64, 1, 64, q, &scale, nullptr, values, TK_F16};
    CHECK(call(looked_up, 1, 64, 1, TK_BF16, TK_INVARIANT) == TK_OK, "a codebook");
    tk_weight bad[] = {good, good, good, good, good, looked_up, looked_up};
    bad[0].format = 99;
    bad[1].group = 48;
    bad[2].in = 96;
    bad[3].out = 0;
    bad[4].scale = nullptr;
    bad[5].values = nullptr;
    bad[6].scale_dtype = TK_BF16;
    for (const tk_weight &w : bad) CHECK(call(w, 1, 128, 1, TK_BF16, TK_INVARIANT) == TK_BAD_ARGUMENT, "a weight");
    CHECK(call(good, -1, 64, 1, TK_BF16, TK_INVARIANT) == TK_BAD_ARGUMENT, "rows");
    CHECK(call(good, 1, 63, 1, TK_BF16, TK_INVARIANT) == TK_BAD_ARGUMENT, "ldx");
    CHECK(call(good, 1, 64, 0, TK_BF16, TK_INVARIANT) == TK_BAD_ARGUMENT, "ldy");
    CHECK(call(good, 1, 64, 1, 7, TK_INVARIANT) == TK_BAD_ARGUMENT, "dtype");
    CHECK(call(good, 1, 64, 1, TK_BF16, 7) == TK_BAD_ARGUMENT, "mode");
}

} // namespace

int main(int count, char **arguments) {
    const int cases = count > 1 ? std::atoi(arguments[1]) : 100;
    test_contexts();
    test_bad_arguments();
    test_linear(cases);
    test_quantize(cases / 2);
    test_dequantize(cases / 2);
    test_published(cases / 2);
    test_attention(cases / 2);
    test_recurrent(cases / 2);
    std::printf("levels:");
    for (int level = 0; level < TK_LEVELS; level++) {
        if (!tk_refusal(level)) std::printf(" %d", level);
    }
    std::printf("\n%d failures\n", failures());
    return failures() ? 1 : 0;
}
