// The portable kernel: one loop that any compiler turns into whatever the processor has. Exact weights, fp32 sums in
// ascending order of `in`, the same for any number of rows: it is the native kernels' reference, and what runs on
// processors that no other level supports.

#include "linear.h"
#include "numbers.h"

namespace tk {

namespace {

// Weights start .. start + 32 of row `o`, in fp32.
void widen(const Linear &l, int64_t o, int64_t start, float *out) {
    const uint8_t *row = static_cast<const uint8_t *>(l.w.q) + o * l.row_nbytes;
    if (l.w.format == TK_DENSE_BF16) {
        for (int i = 0; i < 32; i++) {
            uint16_t bits;
            std::memcpy(&bits, row + (start + i) * 2, sizeof bits);
            out[i] = from_bf16(bits);
        }
        return;
    }
    const int64_t g = start / l.w.group;
    const bool looked_up = l.w.format == TK_CODEBOOK;
    const float scale = scale_at(l.w, o * l.groups + g), zero = looked_up ? 0 : l.w.zero[o * l.groups + g];
    for (int i = 0; i < 32; i++) {
        int code;
        if (l.w.format == TK_INT8) {
            code = row[start + i];
        } else {
            const int64_t half = l.w.group / 2, within = start % l.w.group + i;
            const uint8_t byte = row[g * half + within % half];
            code = within < half ? byte & 15 : byte >> 4;
        }
        out[i] = scale * (looked_up ? l.w.values[code] : static_cast<float>(code) - zero);
    }
}

constexpr int64_t kRowsAtOnce = 64; // of x, so that widened weights serve many

void one_output(void *argument, int, int64_t o) {
    const Linear &l = *static_cast<const Linear *>(argument);
    for (int64_t first = 0; first < l.rows; first += kRowsAtOnce) {
        const int64_t count = l.rows - first < kRowsAtOnce ? l.rows - first : kRowsAtOnce;
        float sums[kRowsAtOnce] = {};
        float weights[32];
        for (int64_t start = 0; start < l.w.in; start += 32) {
            widen(l, o, start, weights);
            for (int64_t r = 0; r < count; r++) {
                const uint16_t *x = l.x + (first + r) * l.ldx + start;
                float sum = sums[r];
                for (int i = 0; i < 32; i++) sum += from_bf16(x[i]) * weights[i];
                sums[r] = sum;
            }
        }
        float bias = 0;
        if (l.bias) {
            bias = l.bias_dtype == TK_F32 ? static_cast<const float *>(l.bias)[o]
                                          : from_bf16(static_cast<const uint16_t *>(l.bias)[o]);
        }
        for (int64_t r = 0; r < count; r++) {
            const int64_t at = (first + r) * l.ldy + o;
            const float value = sums[r] + bias;
            if (l.y_dtype == TK_F32) {
                static_cast<float *>(l.y)[at] = value;
            } else {
                static_cast<uint16_t *>(l.y)[at] = to_bf16(value);
            }
        }
    }
}

} // namespace

int linear_scalar(const Linear &linear, Pool &pool) {
    Linear copy = linear;
    return pool.run(linear.w.out, one_output, &copy, linear.cancel) ? TK_OK : TK_CANCELLED;
}

} // namespace tk
