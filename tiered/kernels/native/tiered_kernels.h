/* The C interface of the native kernels: all that Python calls. No torch or Python headers.
 *
 * Numbers: bf16 and fp16 are passed as their 16 bits. Matrices are row-major; strides are in elements unless a name
 * says bytes. Pointers need no more alignment than their elements, and nothing outside the stated extents is touched.
 * Every call returns a TK_* status. A call polls `*cancel` (may be null) at least every few milliseconds and returns
 * TK_CANCELLED, leaving its output undefined, once that is not zero. One call at a time per context.
 */
#ifndef TIERED_KERNELS_H
#define TIERED_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TK_API __attribute__((visibility("default")))

enum { TK_ABI_VERSION = 7 };

enum tk_status { TK_OK = 0, TK_CANCELLED = 1, TK_BAD_ARGUMENT = 2, TK_NO_MEMORY = 3, TK_NOT_FINITE = 4 };

/* Instruction sets, each a superset of the one before it. */
enum tk_level { TK_SCALAR = 0, TK_AVX2 = 1, TK_AVX512 = 2, TK_AMX = 3, TK_LEVELS = 4 };

/* TK_F16 is known to tk_quantize, planes and scales alone, and TK_E8M0 to scales: a byte s that stands for 2^(s - 127),
 * 255 for no number. The last two are known to tk_quantize: codes that are looked up, a byte or a nibble each. */
enum tk_dtype { TK_BF16 = 0, TK_F32 = 1, TK_F16 = 2, TK_E8M0 = 3, TK_CODE8 = 4, TK_CODE4 = 5 };

/* How a weight is stored; see docs/design.md, section 5. */
enum tk_format { TK_INT4 = 0, TK_INT8 = 1, TK_DENSE_BF16 = 2, TK_CODEBOOK = 3 };

enum tk_mode {
    TK_INVARIANT = 0, /* a row's result is the same bits alone, in any batch, at any number of threads */
    TK_FAST = 1       /* the fastest kernel for the number of rows, activations in 8 bits included */
};

typedef struct tk_context tk_context; /* threads and their scratch */

typedef struct tk_weight {
    int32_t format;       /* tk_format */
    int32_t group;        /* 32, 64 or 128; ignored for TK_DENSE_BF16 */
    int64_t out, in;      /* in: a multiple of group, or of 32 for TK_DENSE_BF16 */
    const void *q;        /* [out, in/2] nibbles, group-planar; [out, in] u8; or [out, in] bf16 */
    const uint16_t *scale; /* [out, in/group] fp16; of TK_CODEBOOK as `scale_dtype` says */
    const uint8_t *zero;  /* [out, in/group]; null for TK_CODEBOOK */
    /* Of TK_CODEBOOK, whose q is that of TK_INT4: what the 16 codes stand for, before scaling. */
    const float *values;
    int32_t scale_dtype; /* TK_F16, TK_F32 or TK_E8M0 */
} tk_weight;

TK_API int32_t tk_abi_version(void);

/* Null where this processor, kernel and build can run `level`, else why they cannot. */
TK_API const char *tk_refusal(int32_t level);

/* A context of `threads` threads, the caller's included, for the kernels of `level`; null where `level` is refused or
 * memory is short. */
TK_API tk_context *tk_create(int32_t threads, int32_t level);
TK_API void tk_destroy(tk_context *context);

/* Bytes of scratch the context holds; tk_trim gives them back. */
TK_API int64_t tk_scratch_nbytes(const tk_context *context);
TK_API void tk_trim(tk_context *context);

/* y [rows, out] = x [rows, in] (bf16) times the weight transposed, plus bias [out] (or null). */
TK_API int32_t tk_linear(tk_context *context, const tk_weight *weight, const uint16_t *x, int64_t rows, int64_t ldx,
                         const void *bias, int32_t bias_dtype, void *y, int64_t ldy, int32_t y_dtype, int32_t mode,
                         const int32_t *cancel);

/* Rows first_row to first_row + rows of a quantized weight as numbers: out [rows, in] without gaps, scale * (q - zero),
 * which is exact in fp32, or scale * values[q], rounded once more where out_dtype is TK_BF16. */
TK_API int32_t tk_dequantize(tk_context *context, const tk_weight *weight, int64_t first_row, int64_t rows, void *out,
                             int32_t out_dtype);

/* For each head h, y[t][h] [in] = x[t][h] [rows] (bf16) times w[h] [rows, in], where `transposed`; else y[t][h] [rows] =
 * x[t][h] [in] times w[h] transposed. Strides, in elements: of w from one head to the next; of x and y from one token to
 * the next, and from one head. A result is the same bits alone, in any batch, at any number of threads. */
TK_API int32_t tk_by_head(tk_context *context, const float *w, int64_t heads, int64_t rows, int64_t in,
                          int64_t w_stride, int32_t transposed, const uint16_t *x, int64_t tokens,
                          const int64_t *x_stride, uint16_t *y, const int64_t *y_stride, const int32_t *cancel);

/* What the codes of a weight [rows, in] stand for: (table[code] - zero) * scale in fp32, each operation rounded on its
 * own. */
typedef struct tk_lookup {
    const float *table; /* [256] for TK_CODE8, [16] for TK_CODE4 */
    const float *scale; /* [rows, groups] */
    const float *zero;  /* [rows, groups], or null */
    int64_t groups;     /* 1, or as many as `in` columns have */
    int64_t group;      /* columns that share a scale and a zero: a power of two, 16 at least; ignored where groups is 1 */
} tk_lookup;

/* The codes, scales and zeros of a weight [rows, in] of any tk_dtype, as tiered/quant/quantize.py computes them, bit for
 * bit; `ld` is its row stride. `bits` 4 or 8, `group` 32, 64 or 128, of which `in` is a multiple; `clip` 0 keeps each
 * group's whole range, 1 narrows it to where the squared error is least (at 4 bits). Outputs have no gaps: q [rows,
 * in * bits / 8], nibbles group-planar; scale [rows, in/group] fp16; zero [rows, in/group]. Returns TK_NOT_FINITE,
 * outputs undefined, where a weight is not finite or a group spans more than an fp16 scale can express.
 *
 * Codes are looked up group by group, so their numbers are never in memory: `lookup` says what they stand for, and is
 * null where `weight` has numbers. Of nibbles the first one is in the low half of a byte, and `ld` is even. */
TK_API int32_t tk_quantize(tk_context *context, const void *weight, int32_t dtype, int64_t rows, int64_t in, int64_t ld,
                           int32_t bits, int32_t group, int32_t clip, uint8_t *q, uint16_t *scale, uint8_t *zero,
                           const tk_lookup *lookup, const int32_t *cancel);

/* How a published checkpoint packs the codes of a weight [rows, in]. */
enum tk_packing {
    TK_ROWS = 0,            /* row after row, the first code of a byte in its lowest bits */
    TK_ROWS_HIGH_FIRST = 1, /* nibbles, the first of a byte in its high half */
    TK_COLUMNS = 2,         /* [in * bits / 32, rows] words of 32 bits: consecutive codes of a row, the lowest first */
    TK_AWQ = 3              /* [in, rows / 8] words: a nibble of each of the rows 0, 2, 4, 6, 1, 3, 5, 7, the lowest first */
};

/* The codes in `data`, whose rows are `stride` bytes apart, as a store has them: q [rows, in * bits / 8] without gaps,
 * of 4 bits planar in groups of `group` (32, 64 or 128; or 2: neighbours share a byte). `in` is a multiple of
 * the group and of 16 at 4 bits, of 4 at 8 bits, which come in TK_ROWS or TK_COLUMNS. Of one thread, the caller's, as
 * all that has no context. */
TK_API int32_t tk_repack(const void *data, int64_t stride, int32_t packing, int64_t rows, int64_t in, int32_t bits,
                         int32_t group, uint8_t *q);

/* out [rows, in] = (table[code] - zero) * scale in fp32, each operation rounded on its own. Codes of 8 bits, or nibbles,
 * the first of a byte in its low half; table [256] or [16]; scale and zero (or null) [rows, groups]. A column's group is
 * column / group, or group_of[column]. */
TK_API int32_t tk_widen(const uint8_t *codes, int32_t bits, const float *table, int64_t rows, int64_t in,
                        const float *scale, const float *zero, int64_t group, int64_t groups, const int32_t *group_of,
                        float *out);

/* Reads `rows` pieces of `nbytes` of a file, `stride` bytes apart, into `out` without gaps. Returns how many are whole;
 * the next one is what an ordinary read fails with. */
TK_API int64_t tk_read_rows(int32_t fd, int64_t offset, int64_t stride, int64_t rows, int64_t nbytes, uint8_t *out);

/* Frames of 16-bit floats with their exponents coded (native/planes.h says what a frame holds; tiered/quant/planes.py
 * makes and reads the same bytes). Of one thread, the caller's, and without a context. */
enum { TK_MOST_FRAME_VALUES = 1 << 23 };

/* One frame of `count` values, TK_BF16 or TK_F16, in at most 32 + 2 * count bytes, which `room` must be; returns its
 * size, or -1 where an argument is wrong. */
TK_API int64_t tk_encode_planes(int32_t dtype, const uint16_t *values, int64_t count, uint8_t *frame, int64_t room);

/* The `values` values of `count` frames of these sizes, which lie end to end, each of `frame_values` values but for the
 * last. Returns TK_BAD_ARGUMENT, `out` undefined, where a frame is damaged: nothing outside of it is read. */
TK_API int32_t tk_decode_planes(int32_t dtype, const uint8_t *frames, const int64_t *sizes, int64_t count,
                                int64_t frame_values, uint16_t *out, int64_t values);

/* How a cache holds keys or values: bf16, or codes with w = scale * (q - zero), as weights have them. */
enum tk_kv_format {
    TK_KV_BF16 = 0,
    TK_KV_INT8 = 1,         /* scale and zero per token and group of gcd(head_dim, 64) channels */
    TK_KV_INT4 = 2,         /* the same; nibbles planar within each group */
    TK_KV_INT8_CHANNEL = 3, /* keys only: scale and zero per channel, for all tokens of a page */
    TK_KV_INT4_CHANNEL = 4
};

/* Where the KV blocks of all sequences begin. Page j of sequence s, which holds its slots 64 j to 64 j + 63, is in the
 * block at offsets[s * table_stride + j] bytes from `base`; a negative offset: there is none. */
typedef struct tk_table {
    const void *base;
    const int64_t *offsets;
} tk_table;

/* One part (codes, scales or zeros) of every block, `start` bytes after its beginning; head h and token t begin
 * head_stride * h + token_stride * t elements (bf16, fp16 or bytes) further. */
typedef struct tk_plane {
    int64_t start, head_stride, token_stride;
} tk_plane;

/* Keys or values. `codes` [head_dim] bf16 or u8, or [head_dim / 2] nibbles; `scale` (fp16) and `zero` (u8) [groups] per
 * token, or [head_dim] per page. Where `recent` (whose offsets may be null) has a block, that page is there in bf16 too,
 * at `exact`: queries whose own slot is in it read it from there, and all queries do if `blocks` lacks the page. */
typedef struct tk_pages {
    int32_t format; /* tk_kv_format of codes */
    tk_table blocks;
    tk_plane codes, scale, zero;
    tk_table recent;
    tk_plane exact;
} tk_pages;

typedef struct tk_attention_args {
    int64_t sequences, q_len, q_heads, kv_heads, head_dim; /* head_dim: a multiple of 8, at most 576 */
    const uint16_t *q; /* bf16; strides from one sequence, query and head to the next */
    int64_t q_stride[3];
    uint16_t *out; /* bf16, the same shape; 0 where a query sees no key */
    int64_t out_stride[3];
    /* [sequences]: a sequence's keys are in slots first to count - 1; its query i is in slot count - q_len + i */
    const int64_t *first, *count;
    int64_t table_stride;         /* pages per sequence in the tables */
    tk_pages k, v;
    float scaling;  /* a score is scaling * (query . key), */
    float softcap;  /* then capped: softcap * tanh(score / softcap); 0: no cap */
    int32_t causal; /* a query sees no slot after its own */
    int64_t window; /* a query sees no slot that is `window` or more before its own; 0: no such bound */
    const uint8_t *mask; /* null, or 0 where a query does not see a slot; strides of sequence and query */
    int64_t mask_stride[2];
    const float *bias; /* null, or added to scores; below -1e30: not seen; strides of sequence, head and query */
    int64_t bias_stride[3];
    const float *sinks; /* null, or [q_heads] scores of a key whose value is 0, which every query sees */
} tk_attention_args;

/* Softmax attention. A query's result is a function of itself and of the keys it sees, in their order, bit for bit. */
TK_API int32_t tk_attention(tk_context *context, const tk_attention_args *args, const int32_t *cancel);

/* What layers do that keep a state of fixed size of a sequence. States are updated where they lie, each read and written
 * once; `state_stride` leads from one sequence to the next, within a sequence there are no gaps, nor in anything else
 * that has no stride. A sequence's result is the same bits alone, in any batch, at any number of threads. */

/* The gated delta rule. Of each head, with state S [keys, values]:
 *   S = decay * S;  S += k (x) beta * (v - k . S);  out = q . S */
typedef struct tk_delta_args {
    int64_t sequences, heads, key_heads, keys, values; /* head h has q and k of key head h / (heads / key_heads) */
    float *state;                                      /* [sequences, heads, keys, values] */
    int64_t state_stride;
    const float *q, *k;        /* [sequences, key_heads, keys] */
    const float *v;            /* [sequences, heads, values] */
    const float *decay, *beta; /* [sequences, heads] */
    float *out;                /* [sequences, heads, values] */
    float scaling;             /* of q */
    int32_t normalized;        /* q and k are divided by their lengths first */
} tk_delta_args;

TK_API int32_t tk_delta_step(tk_context *context, const tk_delta_args *args, const int32_t *cancel);

/* The step of a state space model. Of each row, with state S [size]:
 *   S = decay * S + x * b;  out = S . c */
typedef struct tk_scan_args {
    int64_t sequences, rows, size;
    int64_t decay_rows, decay_size; /* rows that share a decay; decay_size: 1 or `size` */
    int64_t group_rows;             /* rows that share b and c */
    float *state;                   /* [sequences, rows, size] */
    int64_t state_stride;
    const float *decay;  /* [sequences, rows / decay_rows, decay_size] */
    const float *x;      /* [sequences, rows] */
    const float *b, *c;  /* [sequences, rows / group_rows, size] */
    float *out;          /* [sequences, rows] */
} tk_scan_args;

TK_API int32_t tk_scan_step(tk_context *context, const tk_scan_args *args, const int32_t *cancel);

/* A causal convolution of each channel by itself, over its last `kept` inputs. */
enum { TK_MOST_KEPT = 64 };

typedef struct tk_conv_args {
    int64_t sequences, channels, tokens, kept; /* kept: at most TK_MOST_KEPT */
    void *state; /* [sequences, channels, kept], the inputs before these, oldest first, which these follow; null: zeros */
    int64_t state_stride;
    const void *x; /* [sequences, channels, tokens], and from one to the next in each of them: */
    int64_t x_stride[3];
    const void *weight, *bias; /* [channels, kept]; [channels] or null */
    void *out;                 /* [sequences, channels, tokens] */
    int32_t dtype;             /* of all of these: TK_BF16 or TK_F32 */
} tk_conv_args;

TK_API int32_t tk_conv(tk_context *context, const tk_conv_args *args, const int32_t *cancel);

#ifdef __cplusplus
}
#endif

#endif
