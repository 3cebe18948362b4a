// tk_repack and tk_widen, value by value as tiered_kernels.h says where each code is.

#include "selftest.h"

namespace {

constexpr int kRowOf[8] = {0, 2, 4, 6, 1, 3, 5, 7};

// The bits of code `column` of row `row` in `data`, whose rows are `stride` bytes apart.
int code_of(const Exact<uint8_t> &data, int64_t stride, int packing, int bits, int64_t row, int64_t column) {
    if (packing == TK_AWQ) {
        int nibble = 0;
        while (kRowOf[nibble] != row % 8) nibble++;
        return data.get(column * stride + row / 8 * 4 + nibble / 2) >> (4 * (nibble % 2)) & 15;
    }
    const int64_t bit = column * bits, byte = bit / 8;
    const int64_t at = packing == TK_COLUMNS ? byte / 4 * stride + row * 4 + byte % 4 : row * stride + byte;
    const bool high = (bit % 8 != 0) != (packing == TK_ROWS_HIGH_FIRST);
    return bits == 8 ? data.get(at) : data.get(at) >> (high ? 4 : 0) & 15;
}

void check_repack(int packing, int bits, int group, int64_t rows, int64_t in, Random &random) {
    const int64_t pieces = packing == TK_AWQ ? in : packing == TK_COLUMNS ? in * bits / 32 : rows;
    const int64_t nbytes = packing == TK_AWQ ? rows / 8 * 4 : packing == TK_COLUMNS ? rows * 4 : in * bits / 8;
    const int64_t stride = nbytes + random.below(9), shift = random.below(4);
    Exact<uint8_t> data((pieces - 1) * stride + nbytes, shift), q(rows * in * bits / 8, shift);
    for (int64_t i = 0; i < data.count(); i++) data.set(i, static_cast<uint8_t>(random.bits()));
    CHECK(tk_repack(data.data(), stride, packing, rows, in, bits, group, q.data()) == TK_OK, "packing %d", packing);
    const int64_t half = group / 2;
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t column = 0; column < in; column++) {
            const int expected = code_of(data, stride, packing, bits, row, column);
            const int64_t at = row * in * bits / 8 + (bits == 8 ? column : column / group * half + column % half);
            const int found = bits == 8 ? q.get(at) : q.get(at) >> (column % group < half ? 0 : 4) & 15;
            CHECK(found == expected, "packing %d, %d bits, group %d: %d, not %d", packing, bits, group, found, expected);
        }
    }
    CHECK(tk_repack(data.data(), stride, packing, rows, in + 2, bits, group, q.data()) == TK_BAD_ARGUMENT, "in");
    CHECK(tk_repack(data.data(), stride, packing, rows, in, 5, group, q.data()) == TK_BAD_ARGUMENT, "bits");
    CHECK(tk_repack(data.data(), stride, 9, rows, in, bits, group, q.data()) == TK_BAD_ARGUMENT, "packing");
}

void check_widen(int bits, int64_t rows, int64_t in, int64_t group, bool has_zero, bool in_order, Random &random) {
    const int64_t groups = in_order ? (in + group - 1) / group : 1 + random.below(5), values = bits == 8 ? 256 : 16;
    Exact<uint8_t> codes(rows * in * bits / 8, random.below(4));
    Exact<float> table(values), scale(rows * groups), zero(rows * groups), out(rows * in);
    Exact<int32_t> group_of(in);
    for (int64_t i = 0; i < codes.count(); i++) codes.set(i, static_cast<uint8_t>(random.bits()));
    for (int64_t i = 0; i < values; i++) table.set(i, random.normal());
    for (int64_t i = 0; i < scale.count(); i++) scale.set(i, random.normal());
    for (int64_t i = 0; i < zero.count(); i++) zero.set(i, static_cast<float>(random.below(256)));
    for (int64_t i = 0; i < in; i++) group_of.set(i, static_cast<int32_t>(random.below(groups)));
    const auto call = [&](int64_t length, int64_t count) {
        return tk_widen(codes.data(), bits, table.data(), rows, in, scale.data(), has_zero ? zero.data() : nullptr,
                        length, count, in_order ? nullptr : group_of.data(), out.data());
    };
    CHECK(call(group, groups) == TK_OK, "%d bits", bits);
    for (int64_t i = 0; i < rows * in; i++) {
        const int64_t column = i % in, at = i / in * groups + (in_order ? column / group : group_of.get(column));
        const int code = bits == 8 ? codes.get(i) : codes.get(i / 2) >> (4 * (i % 2)) & 15;
        float expected = table.get(code);
        if (has_zero) expected -= zero.get(at);
        expected *= scale.get(at);
        CHECK(out.get(i) == expected, "%g, not %g", static_cast<double>(out.get(i)), static_cast<double>(expected));
    }
    if (in_order) CHECK(call(group, groups + 1) == TK_BAD_ARGUMENT, "groups");
    group_of.set(in - 1, static_cast<int32_t>(groups));
    if (!in_order) CHECK(call(group, groups) == TK_BAD_ARGUMENT, "a group that there is not");
}

} // namespace

void test_published(int cases) {
    static const int32_t group_sizes[] = {2, 32, 64, 128}, packings[] = {TK_ROWS, TK_ROWS_HIGH_FIRST, TK_COLUMNS, TK_AWQ};
    static const int64_t lengths[] = {2, 16, 64, 130};
    Random random(5);
    for (int i = 0; i < cases; i++) {
        const int packing = random.one_of(packings), group = random.one_of(group_sizes);
        const int bits = packing == TK_ROWS || packing == TK_COLUMNS ? 4 + 4 * static_cast<int>(random.below(2)) : 4;
        const int64_t rows = 8 * (1 + random.below(20)), multiple = group == 2 ? 16 : group;
        check_repack(packing, bits, group, rows, multiple * (1 + random.below(10)), random);
        check_widen(bits, 1 + random.below(5), 2 * (1 + random.below(200)), random.one_of(lengths), random.below(2),
                    random.below(2), random);
    }
}
