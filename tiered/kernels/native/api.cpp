// The C interface: arguments are checked here, once, and handed to the context's level.

#include "tiered_kernels.h"

#include "attention.h"
#include "by_head.h"
#include "cpu.h"
#include "dequantize.h"
#include "linear.h"
#include "planes.h"
#include "pool.h"
#include "quantize.h"
#include "step.h"

#include <cstring>
#include <exception>
#include <new>

struct tk_context {
    tk_context(int threads, int level) : pool(threads), level(level) {}
    tk::Pool pool;
    int level;
};

namespace {

constexpr int kMostThreads = 1024;

using LinearFunction = int (*)(const tk::Linear &, tk::Pool &);

LinearFunction linear_of(int level) {
    switch (level) {
#if defined(__x86_64__)
        case TK_AVX2: return tk::linear_avx2;
        case TK_AVX512: return tk::linear_avx512;
        case TK_AMX: return tk::linear_amx;
#endif
        default: return tk::linear_scalar;
    }
}

using DequantizeFunction = void (*)(tk::Dequantize &, tk::Pool &);

DequantizeFunction dequantize_of(int level) {
    switch (level) {
#if defined(__x86_64__)
        case TK_AVX2: return tk::dequantize_avx2;
        case TK_AVX512:
        case TK_AMX: return tk::dequantize_avx512;
#endif
        default: return tk::dequantize_scalar;
    }
}

using QuantizeFunction = int (*)(tk::Quantize &, tk::Pool &);

QuantizeFunction quantize_of(int level) {
    switch (level) {
#if defined(__x86_64__)
        case TK_AVX2: return tk::quantize_avx2;
        case TK_AVX512:
        case TK_AMX: return tk::quantize_avx512;
#endif
        default: return tk::quantize_scalar;
    }
}

bool is_dtype(int32_t dtype) { return dtype == TK_BF16 || dtype == TK_F32; }

bool is_code(int32_t dtype) { return dtype == TK_CODE8 || dtype == TK_CODE4; }

// Whether the numbers are those of E4M3: a byte is a sign, 4 bits of exponent (less 7) and 3 of mantissa, all ones are
// NaN, and there is no infinity.
bool is_e4m3(const float *table) {
    for (int code = 0; code < 256; code++) {
        const int exponent = code >> 3 & 15, mantissa = code & 7;
        const int steps = exponent ? (8 + mantissa) << (exponent - 1) : mantissa; // of 2^-9
        const float number = static_cast<float>(steps) / 512 * (code & 128 ? -1.0f : 1.0f);
        const bool fits = (code & 127) == 127 ? table[code] != table[code] : !std::memcmp(table + code, &number, 4);
        if (!fits) return false;
    }
    return true;
}

// Of rows of `in` codes. A vector's worth of columns has one scale.
bool is_lookup(const tk_lookup *l, int64_t in) {
    if (!l || !l->table || !l->scale) return false;
    if (l->groups == 1) return true;
    return l->group >= 16 && (l->group & (l->group - 1)) == 0 && l->groups == (in + l->group - 1) / l->group;
}

bool is_group(int32_t group) { return group == 32 || group == 64 || group == 128; }

bool is_weight(const tk_weight *w) {
    if (!w || !w->q || w->out < 1 || w->in < 1) return false;
    if (w->format == TK_DENSE_BF16) return w->in % 32 == 0;
    if (!is_group(w->group) || !w->scale || w->in % w->group) return false;
    if (w->format == TK_CODEBOOK) {
        return w->values && (w->scale_dtype == TK_F16 || w->scale_dtype == TK_F32 || w->scale_dtype == TK_E8M0);
    }
    return (w->format == TK_INT4 || w->format == TK_INT8) && w->zero;
}

int64_t row_nbytes_of(const tk_weight &w) {
    if (w.format == TK_DENSE_BF16) return w.in * 2;
    return w.format == TK_INT8 ? w.in : w.in / 2;
}

// A codebook's values in whole steps; see linear.h.
void set_steps(tk::Linear &l) {
    if (l.w.format != TK_CODEBOOK || l.w.group != 32) return;
    for (float step = 0.5f; step <= 1; step *= 2) {
        float least = 0, most = 0;
        bool whole = true;
        for (int i = 0; i < 16; i++) {
            const float steps = l.w.values[i] / step;
            whole = whole && steps >= -255 && steps <= 255 && steps == static_cast<float>(static_cast<int>(steps));
            least = steps < least ? steps : least;
            most = steps > most ? steps : most;
        }
        if (!whole || most - least > 255) continue;
        l.step = step;
        l.zero_steps = static_cast<uint8_t>(-least);
        for (int i = 0; i < 16; i++) l.steps[i] = static_cast<uint8_t>(l.w.values[i] / step - least);
        return;
    }
}

} // namespace

int32_t tk_abi_version(void) { return TK_ABI_VERSION; }

const char *tk_refusal(int32_t level) { return tk::refusal(level); }

tk_context *tk_create(int32_t threads, int32_t level) {
    if (threads < 1 || threads > kMostThreads || tk::refusal(level)) return nullptr;
    try {
        return new tk_context(threads, level);
    } catch (const std::exception &) { // no memory, or no thread to be had
        return nullptr;
    }
}

void tk_destroy(tk_context *context) { delete context; }

int64_t tk_scratch_nbytes(const tk_context *context) { return context->pool.scratch_nbytes(); }

void tk_trim(tk_context *context) { context->pool.trim(); }

int32_t tk_linear(tk_context *context, const tk_weight *weight, const uint16_t *x, int64_t rows, int64_t ldx,
                  const void *bias, int32_t bias_dtype, void *y, int64_t ldy, int32_t y_dtype, int32_t mode,
                  const int32_t *cancel) {
    if (!context || !is_weight(weight) || !is_dtype(y_dtype) || (bias && !is_dtype(bias_dtype))) return TK_BAD_ARGUMENT;
    if (rows < 0 || (mode != TK_INVARIANT && mode != TK_FAST)) return TK_BAD_ARGUMENT;
    if (rows == 0) return TK_OK;
    if (!x || !y || ldx < weight->in || ldy < weight->out) return TK_BAD_ARGUMENT;
    tk::Linear linear = {};
    linear.w = *weight;
    const bool dense = weight->format == TK_DENSE_BF16;
    linear.row_nbytes = row_nbytes_of(*weight);
    linear.groups = dense ? 0 : weight->in / weight->group;
    linear.x = x;
    linear.rows = rows;
    linear.ldx = ldx;
    linear.bias = bias;
    linear.bias_dtype = bias_dtype;
    linear.y = y;
    linear.ldy = ldy;
    linear.y_dtype = y_dtype;
    linear.mode = mode;
    linear.cancel = cancel;
    set_steps(linear);
    return linear_of(context->level)(linear, context->pool);
}

int32_t tk_dequantize(tk_context *context, const tk_weight *weight, int64_t first_row, int64_t rows, void *out,
                      int32_t out_dtype) {
    if (!context || !is_weight(weight) || weight->format == TK_DENSE_BF16 || !is_dtype(out_dtype)) {
        return TK_BAD_ARGUMENT;
    }
    if (first_row < 0 || rows < 0 || first_row > weight->out - rows) return TK_BAD_ARGUMENT;
    if (rows == 0) return TK_OK;
    if (!out) return TK_BAD_ARGUMENT;
    tk::Dequantize dequantize = {};
    dequantize.w = *weight;
    dequantize.row_nbytes = row_nbytes_of(*weight);
    dequantize.groups = weight->in / weight->group;
    dequantize.first = first_row;
    dequantize.rows = rows;
    dequantize.out = out;
    dequantize.dtype = out_dtype;
    dequantize_of(context->level)(dequantize, context->pool);
    return TK_OK;
}

int32_t tk_quantize(tk_context *context, const void *weight, int32_t dtype, int64_t rows, int64_t in, int64_t ld,
                    int32_t bits, int32_t group, int32_t clip, uint8_t *q, uint16_t *scale, uint8_t *zero,
                    const tk_lookup *lookup, const int32_t *cancel) {
    if (!context || (!is_dtype(dtype) && dtype != TK_F16 && !is_code(dtype)) || !is_group(group)) {
        return TK_BAD_ARGUMENT;
    }
    if (is_code(dtype) ? !is_lookup(lookup, in) || ld % 2 : lookup != nullptr) return TK_BAD_ARGUMENT;
    if (rows < 0 || in < 1 || in % group || (bits != 4 && bits != 8) || (clip != 0 && clip != 1)) return TK_BAD_ARGUMENT;
    if (rows == 0) return TK_OK;
    if (!weight || !q || !scale || !zero || (rows > 1 && ld < in)) return TK_BAD_ARGUMENT;
    tk::Quantize quantize = {};
    quantize.weight = static_cast<const unsigned char *>(weight);
    quantize.dtype = dtype;
    quantize.row_nbytes = tk::nbytes_of(dtype, ld);
    if (lookup) {
        quantize.lookup = *lookup;
        if (dtype == TK_CODE8 && is_e4m3(lookup->table)) quantize.dtype = tk::kE4m3;
        quantize.shift = 63; // of a column's number: one scale for all
        for (int32_t bit = 4; lookup->groups > 1 && bit < 63; bit++) {
            if (lookup->group == int64_t{1} << bit) quantize.shift = bit;
        }
    }
    quantize.groups = in / group;
    quantize.all_groups = rows * quantize.groups;
    quantize.bits = bits;
    quantize.group = group;
    quantize.clip = clip && bits == 4;
    quantize.q = q;
    quantize.scale = scale;
    quantize.zero = zero;
    quantize.cancel = cancel;
    return quantize_of(context->level)(quantize, context->pool);
}

int32_t tk_by_head(tk_context *context, const float *w, int64_t heads, int64_t rows, int64_t in, int64_t w_stride,
                   int32_t transposed, const uint16_t *x, int64_t tokens, const int64_t *x_stride, uint16_t *y,
                   const int64_t *y_stride, const int32_t *cancel) {
    if (!context || heads < 0 || rows < 1 || in < 1 || tokens < 0) return TK_BAD_ARGUMENT;
    if (heads == 0 || tokens == 0) return TK_OK;
    if (!w || !x || !y || !x_stride || !y_stride || w_stride < rows * in) return TK_BAD_ARGUMENT;
    tk::ByHead by_head = {};
    by_head.w = w;
    by_head.heads = heads;
    by_head.rows = rows;
    by_head.in = in;
    by_head.w_stride = w_stride;
    by_head.transposed = transposed != 0;
    by_head.x = x;
    by_head.tokens = tokens;
    by_head.y = y;
    for (int i = 0; i < 2; i++) {
        by_head.x_stride[i] = x_stride[i];
        by_head.y_stride[i] = y_stride[i];
    }
    by_head.cancel = cancel;
    return tk::by_head(by_head, context->level, context->pool);
}

int32_t tk_attention(tk_context *context, const tk_attention_args *args, const int32_t *cancel) {
    if (!context || !args || !tk::is_valid(*args)) return TK_BAD_ARGUMENT;
    if (args->sequences == 0 || args->q_len == 0) return TK_OK;
    return tk::attention(*args, context->level, context->pool, cancel);
}

int32_t tk_delta_step(tk_context *context, const tk_delta_args *args, const int32_t *cancel) {
    if (!context || !args || !tk::is_valid(*args)) return TK_BAD_ARGUMENT;
    return args->sequences == 0 ? TK_OK : tk::delta_step(*args, context->level, context->pool, cancel);
}

int32_t tk_scan_step(tk_context *context, const tk_scan_args *args, const int32_t *cancel) {
    if (!context || !args || !tk::is_valid(*args)) return TK_BAD_ARGUMENT;
    return args->sequences == 0 ? TK_OK : tk::scan_step(*args, context->level, context->pool, cancel);
}

int32_t tk_conv(tk_context *context, const tk_conv_args *args, const int32_t *cancel) {
    if (!context || !args || !tk::is_valid(*args)) return TK_BAD_ARGUMENT;
    return args->sequences == 0 || args->tokens == 0 ? TK_OK : tk::conv(*args, context->pool, cancel);
}

int64_t tk_encode_planes(int32_t dtype, const uint16_t *values, int64_t count, uint8_t *frame, int64_t room) {
    if ((dtype != TK_BF16 && dtype != TK_F16) || count < 1 || count > TK_MOST_FRAME_VALUES) return -1;
    const int64_t plain = tk::kHeaderNbytes + 2 * count;
    if (!values || !frame || room < plain) return -1;
    const int64_t coded = tk::encode_planes(values, count, dtype == TK_F16 ? 3 : 0, frame, plain - 1);
    if (coded) return coded;
    std::memset(frame, 0, tk::kHeaderNbytes);
    std::memcpy(frame + tk::kHeaderNbytes, values, static_cast<size_t>(2 * count));
    return plain;
}

int32_t tk_decode_planes(int32_t dtype, const uint8_t *frames, const int64_t *sizes, int64_t count,
                         int64_t frame_values, uint16_t *out, int64_t values) {
    if ((dtype != TK_BF16 && dtype != TK_F16) || !frames || !sizes || !out) return TK_BAD_ARGUMENT;
    if (count < 1 || frame_values < 1 || frame_values > TK_MOST_FRAME_VALUES) return TK_BAD_ARGUMENT;
    if (values <= (count - 1) * frame_values || values > count * frame_values) return TK_BAD_ARGUMENT;
#if defined(__x86_64__)
    static const bool has_avx2 = tk::refusal(TK_AVX2) == nullptr; // asked once: cpuid is slow in a virtual machine
    const auto decode = has_avx2 ? tk::decode_planes_avx2 : tk::decode_planes_scalar;
#else
    const auto decode = tk::decode_planes_scalar;
#endif
    for (int64_t i = 0; i < count; frames += sizes[i++], out += frame_values, values -= frame_values) {
        tk::Planes planes;
        planes.values = values < frame_values ? values : frame_values;
        const int64_t left = sizes[i] - tk::kHeaderNbytes;
        if (left < 0) return TK_BAD_ARGUMENT;
        uint32_t numbers[3]; // kind, longer codes, escapes
        std::memcpy(numbers, frames + 16, sizeof numbers);
        if (numbers[0] == 0) {
            if (left < 2 * planes.values) return TK_BAD_ARGUMENT;
            std::memcpy(out, frames + tk::kHeaderNbytes, static_cast<size_t>(2 * planes.values));
            continue;
        }
        planes.groups = (planes.values + 63) / 64;
        planes.extra = dtype == TK_F16 ? 3 : 0;
        planes.longer = numbers[1];
        planes.escapes = numbers[2];
        const int64_t words = 8 * (2 + planes.extra) * planes.groups, stream = 8 * (planes.longer / 64 + 2);
        if (numbers[0] != 1 || 64 * planes.groups + words + 3 * stream + planes.escapes > left) return TK_BAD_ARGUMENT;
        planes.table = frames;
        planes.low = frames + tk::kHeaderNbytes;
        planes.bits = planes.low + 64 * planes.groups;
        for (int j = 0; j < 3; ++j) planes.more[j] = planes.bits + words + j * stream;
        planes.escaped = planes.more[2] + stream;
        if (!decode(planes, out)) return TK_BAD_ARGUMENT;
    }
    return TK_OK;
}
