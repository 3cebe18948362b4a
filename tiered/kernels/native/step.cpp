// Steps of layers with a state whatever the instruction set: arguments checked and handed on. And their convolutions, in
// plain C++ for every level.

#include "numbers.h"
#include "step.h"

namespace tk {

namespace {

struct Bf16 {
    using Stored = uint16_t;
    static float load(const Stored *from) { return from_bf16(*from); }
    static void store(Stored *to, float value) { *to = to_bf16(value); }
};

struct F32 {
    using Stored = float;
    static float load(const Stored *from) { return *from; }
    static void store(Stored *to, float value) { *to = value; }
};

constexpr int64_t kNumbers = 1024; // of an item: channels times tokens
constexpr int64_t kTokens = 64;    // widened at a time

template <class D> struct Channel {
    using Stored = typename D::Stored;

    const Stored *x, *weight;
    int64_t x_stride, tokens, kept;
    float bias;
    Stored *state, *out; // state: may be null

    // Results are bias + products with weights in ascending order, in whichever of these loops.
    void one() const {
        float sum = bias;
        for (int64_t i = 0; i + 1 < kept; i++) {
            state[i] = state[i + 1];
            sum += D::load(state + i) * D::load(weight + i);
        }
        state[kept - 1] = *x;
        D::store(out, sum + D::load(x) * D::load(weight + kept - 1));
    }

    void many() const {
        const int64_t before = kept - 1;
        float in[kTokens + TK_MOST_KEPT], sums[kTokens];
        for (int64_t i = 0; i < before; i++) in[i] = state ? D::load(state + i + 1) : 0;
        for (int64_t first = 0; first < tokens; first += kTokens) {
            const int64_t count = first + kTokens < tokens ? kTokens : tokens - first;
            for (int64_t i = 0; i < count; i++) in[before + i] = D::load(x + (first + i) * x_stride);
            for (int64_t i = 0; i < count; i++) sums[i] = bias;
            for (int64_t k = 0; k < kept; k++) {
                const float factor = D::load(weight + k);
                for (int64_t i = 0; i < count; i++) sums[i] += in[i + k] * factor;
            }
            for (int64_t i = 0; i < count; i++) D::store(out + first + i, sums[i]);
            if (state && first + count == tokens) {
                for (int64_t i = 0; i < kept; i++) D::store(state + i, in[count - 1 + i]);
            }
            for (int64_t i = 0; i < before; i++) in[i] = in[count + i];
        }
    }
};

struct ConvShared {
    const tk_conv_args *args;
    int64_t channels, items; // of an item; of a sequence
};

// `known`: the inputs kept, where the compiler is to know them; else 0.
template <class D, int known> void conv_item(void *argument, int, int64_t item) {
    using Stored = typename D::Stored;
    const ConvShared &shared = *static_cast<const ConvShared *>(argument);
    const tk_conv_args &s = *shared.args;
    const int64_t sequence = item / shared.items, begin = item % shared.items * shared.channels;
    const int64_t end = begin + shared.channels < s.channels ? begin + shared.channels : s.channels;
    const int64_t kept = known ? known : s.kept;
    const Stored *x = static_cast<const Stored *>(s.x) + sequence * s.x_stride[0];
    const Stored *bias = static_cast<const Stored *>(s.bias);
    for (int64_t c = begin; c < end; c++) {
        Channel<D> channel = {};
        channel.x = x + c * s.x_stride[1];
        channel.weight = static_cast<const Stored *>(s.weight) + c * kept;
        channel.x_stride = s.x_stride[2];
        channel.tokens = s.tokens;
        channel.kept = kept;
        channel.bias = bias ? D::load(bias + c) : 0;
        if (s.state) channel.state = static_cast<Stored *>(s.state) + sequence * s.state_stride + c * kept;
        channel.out = static_cast<Stored *>(s.out) + (sequence * s.channels + c) * s.tokens;
        if (s.tokens == 1 && s.state) {
            channel.one();
        } else {
            channel.many();
        }
    }
}

template <class D> Job conv_job(int64_t kept) {
    return kept == 3 ? conv_item<D, 3> : kept == 4 ? conv_item<D, 4> : conv_item<D, 0>;
}

bool is_extent(int64_t sequences, int64_t each, int64_t stride) {
    return sequences >= 0 && each >= 1 && (sequences < 2 || stride >= each);
}

} // namespace

bool is_valid(const tk_delta_args &args) {
    if (args.heads < 1 || args.key_heads < 1 || args.heads % args.key_heads || args.keys < 1 || args.values < 1) {
        return false;
    }
    if (!is_extent(args.sequences, args.heads * args.keys * args.values, args.state_stride)) return false;
    const bool has_all = args.state && args.q && args.k && args.v && args.decay && args.beta && args.out;
    return args.sequences == 0 || has_all;
}

bool is_valid(const tk_scan_args &args) {
    if (args.rows < 1 || args.size < 1 || args.decay_rows < 1 || args.group_rows < 1) return false;
    if (args.rows % args.decay_rows || args.rows % args.group_rows) return false;
    if (args.decay_size != 1 && args.decay_size != args.size) return false;
    if (!is_extent(args.sequences, args.rows * args.size, args.state_stride)) return false;
    return args.sequences == 0 || (args.state && args.decay && args.x && args.b && args.c && args.out);
}

bool is_valid(const tk_conv_args &args) {
    if (args.channels < 1 || args.tokens < 0 || args.kept < 1 || args.kept > TK_MOST_KEPT) return false;
    if (args.dtype != TK_BF16 && args.dtype != TK_F32) return false;
    if (!is_extent(args.sequences, args.channels * args.kept, args.state ? args.state_stride : INT64_MAX)) return false;
    return args.sequences == 0 || args.tokens == 0 || (args.x && args.weight && args.out);
}

int delta_step(const tk_delta_args &args, int level, Pool &pool, const int32_t *cancel) {
    switch (level) {
#if defined(__x86_64__)
        case TK_AVX2: return delta_step_avx2(args, pool, cancel);
        case TK_AVX512:
        case TK_AMX: return delta_step_avx512(args, pool, cancel);
#endif
        default: return delta_step_scalar(args, pool, cancel);
    }
}

int scan_step(const tk_scan_args &args, int level, Pool &pool, const int32_t *cancel) {
    switch (level) {
#if defined(__x86_64__)
        case TK_AVX2: return scan_step_avx2(args, pool, cancel);
        case TK_AVX512:
        case TK_AMX: return scan_step_avx512(args, pool, cancel);
#endif
        default: return scan_step_scalar(args, pool, cancel);
    }
}

int conv(const tk_conv_args &args, Pool &pool, const int32_t *cancel) {
    const int64_t channels = args.tokens < kNumbers ? kNumbers / args.tokens : 1;
    ConvShared shared = {&args, channels, (args.channels + channels - 1) / channels};
    const Job job = args.dtype == TK_BF16 ? conv_job<Bf16>(args.kept) : conv_job<F32>(args.kept);
    return pool.run(args.sequences * shared.items, job, &shared, cancel) ? TK_OK : TK_CANCELLED;
}

} // namespace tk
