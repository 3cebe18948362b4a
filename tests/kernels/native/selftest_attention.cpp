// tk_attention beside a naive softmax in double, over levels, cache formats, heads, masks and threads.

#include "selftest.h"

#include <numeric>
#include <vector>

namespace {

constexpr int kThreads[] = {1, 2, 3};
constexpr int64_t kPage = 64;

bool by_channel(int32_t format) { return format == TK_KV_INT8_CHANNEL || format == TK_KV_INT4_CHANNEL; }
bool nibbles(int32_t format) { return format == TK_KV_INT4 || format == TK_KV_INT4_CHANNEL; }

using Block = std::unique_ptr<Exact<uint8_t>>; // null: there is none

uint16_t get16(const Block &from, int64_t i) {
    return static_cast<uint16_t>(from->get(i) | from->get(i + 1) << 8);
}

void set16(const Block &to, int64_t i, uint16_t value) {
    to->set(i, static_cast<uint8_t>(value));
    to->set(i + 1, static_cast<uint8_t>(value >> 8));
}

// One part of every block: `tokens` of `width` elements per head.
struct Part {
    int64_t heads, tokens, width, element_nbytes;
    tk_plane plane = {};

    int64_t nbytes(int64_t used) const { return ((heads - 1) * tokens + used) * width * element_nbytes; }
    int64_t at(int64_t head, int64_t token, int64_t i) const {
        return plane.start + (head * plane.head_stride + token * plane.token_stride + i) * element_nbytes;
    }
    void begin_at(int64_t start) { plane = {start, tokens * width, width}; }
};

// The keys or the values of a batch. Blocks end where the last token in use of their last part does, which is another
// part from case to case; gaps hold numbers that would show.
struct Cache {
    int32_t format;
    int64_t heads, width, group;
    Part codes, scale, zero, exact;
    const Part *last; // of a block
    std::vector<Block> blocks, recent;
    std::vector<int64_t> offsets, recent_offsets;

    Cache(int32_t format, int64_t heads, int64_t width, Random &random)
        : format(format), heads(heads), width(width), group(std::gcd(width, kPage)) {
        const int64_t rows = by_channel(format) ? 1 : kPage, side = by_channel(format) ? width : width / group;
        const bool bf16 = format == TK_KV_BF16;
        codes = {heads, kPage, nibbles(format) ? width / 2 : width, bf16 ? 2 : 1};
        scale = {heads, rows, side, 2};
        zero = {heads, rows, side, 1};
        exact = {heads, kPage, width, 2};
        exact.begin_at(0);
        Part *order[] = {&codes, &scale, &zero};
        if (!bf16) std::swap(order[2], order[random.below(3)]);
        int64_t start = 0;
        for (Part *part : order) {
            part->begin_at(start);
            start += (part->nbytes(part->tokens) + 7) / 8 * 8;
            last = part;
            if (bf16) break;
        }
    }

    void add_page(int64_t tokens, bool with_recent, bool with_codes, Random &random) {
        recent.push_back(with_recent ? made(exact, tokens) : nullptr);
        if (with_recent) fill16(recent.back(), exact, tokens, random);
        blocks.push_back(with_codes ? made(*last, tokens) : nullptr);
        if (!with_codes) return;
        const Block &block = blocks.back();
        if (format == TK_KV_BF16) return fill16(block, codes, tokens, random);
        for (int64_t head = 0; head < heads; head++) {
            for (int64_t token = 0; token < tokens; token++) {
                for (int64_t i = 0; i < codes.width; i++) {
                    block->set(codes.at(head, token, i), static_cast<uint8_t>(random.bits()));
                }
                if (token >= scale.tokens) continue;
                for (int64_t i = 0; i < scale.width; i++) {
                    const int64_t size = nibbles(format) ? 0x2c00 : 0x1c00; // 2^-4 and 2^-8
                    block->set(zero.at(head, token, i), static_cast<uint8_t>(random.below(nibbles(format) ? 16 : 256)));
                    set16(block, scale.at(head, token, i), static_cast<uint16_t>(size + random.below(0x400)));
                }
            }
        }
    }

    // A block that ends with `tokens` tokens of `part`.
    static Block made(const Part &part, int64_t tokens) {
        const int64_t used = tokens < part.tokens ? tokens : part.tokens;
        auto block = std::make_unique<Exact<uint8_t>>(part.plane.start + part.nbytes(used));
        block->fill(0xff);
        return block;
    }

    void fill16(const Block &block, const Part &part, int64_t tokens, Random &random) const {
        for (int64_t head = 0; head < heads; head++) {
            for (int64_t token = 0; token < tokens; token++) {
                for (int64_t i = 0; i < width; i++) {
                    set16(block, part.at(head, token, i), cut_to_bf16(random.normal()));
                }
            }
        }
    }

    // Number `i` of a token, as a query sees it whose own slot is in this page or not.
    double get(int64_t page, int64_t head, int64_t token, int64_t i, bool own) const {
        const Block &block = blocks[static_cast<size_t>(page)], &computed = recent[static_cast<size_t>(page)];
        if (computed && (own || !block)) return bf16(get16(computed, exact.at(head, token, i)));
        if (format == TK_KV_BF16) return bf16(get16(block, codes.at(head, token, i)));
        int code;
        if (nibbles(format)) {
            const int64_t half = group / 2, within = i % group;
            const uint8_t byte = block->get(codes.at(head, token, i / group * half + within % half));
            code = within < half ? byte & 15 : byte >> 4;
        } else {
            code = block->get(codes.at(head, token, i));
        }
        const int64_t row = by_channel(format) ? 0 : token, side = by_channel(format) ? i : i / group;
        return fp16(get16(block, scale.at(head, row, side))) * (code - block->get(zero.at(head, row, side)));
    }

    tk_pages finish() {
        tk_pages result = {};
        result.format = format;
        result.blocks = table(blocks, offsets);
        result.codes = codes.plane;
        result.scale = scale.plane;
        result.zero = zero.plane;
        result.recent = table(recent, recent_offsets);
        result.exact = exact.plane;
        return result;
    }

    // From the lowest of the blocks, as offsets must not be negative.
    static tk_table table(const std::vector<Block> &blocks, std::vector<int64_t> &offsets) {
        const uint8_t *base = nullptr;
        for (const Block &block : blocks) {
            if (block && (!base || reinterpret_cast<uintptr_t>(block->bytes()) < reinterpret_cast<uintptr_t>(base))) {
                base = block->bytes();
            }
        }
        for (const Block &block : blocks) {
            const auto from = reinterpret_cast<uintptr_t>(base);
            offsets.push_back(block ? static_cast<int64_t>(reinterpret_cast<uintptr_t>(block->bytes()) - from) : -1);
        }
        return {base, offsets.data()};
    }
};

struct Problem {
    tk_attention_args args = {};
    std::vector<int64_t> first, count;
    int64_t most;
    Exact<uint16_t> q;
    Exact<uint8_t> mask;
    Exact<float> bias, sinks;
    Cache k, v;

    Problem(int64_t kv_heads, int64_t group, int64_t width, int64_t q_len, std::vector<int64_t> counts, int32_t keys,
            int32_t values, Random &random)
        : count(counts), most(counts.back()), q(2 * q_len * kv_heads * group * width, random.below(2)),
          mask(2 * q_len * most), bias(2 * kv_heads * group * q_len * most), sinks(kv_heads * group),
          k(keys, kv_heads, width, random), v(values, kv_heads, width, random) {
        const int64_t heads = kv_heads * group;
        for (int64_t i = 0; i < q.count(); i++) q.set(i, cut_to_bf16(random.normal()));
        for (int64_t i = 0; i < mask.count(); i++) mask.set(i, static_cast<uint8_t>(random.below(4)));
        for (int64_t i = 0; i < bias.count(); i++) bias.set(i, random.below(9) ? random.normal() : -3e38f);
        for (int64_t i = 0; i < heads; i++) sinks.set(i, random.normal());
        const int64_t pages = (most + kPage - 1) / kPage;
        for (int64_t n : count) {
            first.push_back(random.below(2) * random.below(n));
            for (int64_t page = 0; page < pages; page++) {
                const int64_t left = n - page * kPage, tokens = left < kPage ? left : kPage;
                const bool last = left <= kPage && random.below(2);
                const bool with_codes = tokens > 0 && !(last && random.below(2));
                k.add_page(tokens, last && tokens > 0, with_codes, random);
                v.add_page(tokens, last && tokens > 0, with_codes, random);
            }
        }
        args.sequences = 2;
        args.q_len = q_len;
        args.q_heads = heads;
        args.kv_heads = kv_heads;
        args.head_dim = width;
        args.q = q.data();
        args.q_stride[0] = args.out_stride[0] = q_len * heads * width;
        args.q_stride[1] = args.out_stride[1] = heads * width;
        args.q_stride[2] = args.out_stride[2] = width;
        args.first = first.data();
        args.count = count.data();
        args.table_stride = pages;
        args.k = k.finish();
        args.v = v.finish();
        args.scaling = 1 / std::sqrt(static_cast<float>(width));
        choose(random);
    }

    void choose(Random &random) {
        args.softcap = random.below(3) ? 0 : 3;
        args.causal = static_cast<int32_t>(random.below(2));
        args.window = random.below(3) ? 0 : 1 + random.below(most);
        if (random.below(3) == 0) args.mask = mask.data();
        args.mask_stride[0] = args.q_len * most;
        args.mask_stride[1] = most;
        if (random.below(3) == 0) args.bias = bias.data();
        args.bias_stride[0] = args.q_heads * args.q_len * most;
        args.bias_stride[1] = args.q_len * most;
        args.bias_stride[2] = most;
        if (random.below(3) == 0) args.sinks = sinks.data();
    }

    bool sees(int64_t s, int64_t head, int64_t i, int64_t slot) const {
        const int64_t own = count[static_cast<size_t>(s)] - args.q_len + i;
        if (args.causal && slot > own) return false;
        if (args.window && own - slot >= args.window) return false;
        if (args.mask && !mask.get(s * args.mask_stride[0] + i * args.mask_stride[1] + slot)) return false;
        return !args.bias || bias_of(s, head, i, slot) >= -1e30;
    }

    double bias_of(int64_t s, int64_t head, int64_t i, int64_t slot) const {
        return bias.get(s * args.bias_stride[0] + head * args.bias_stride[1] + i * args.bias_stride[2] + slot);
    }

    std::vector<double> expected(int64_t s, int64_t i, int64_t head) const {
        const int64_t kv = head / (args.q_heads / args.kv_heads), own = count[static_cast<size_t>(s)] - args.q_len + i;
        std::vector<double> sums(static_cast<size_t>(args.head_dim));
        double total = args.sinks ? std::exp(static_cast<double>(sinks.get(head))) : 0;
        for (int64_t slot = first[static_cast<size_t>(s)]; slot < count[static_cast<size_t>(s)]; slot++) {
            if (!sees(s, head, i, slot)) continue;
            const int64_t page = s * args.table_stride + slot / kPage, token = slot % kPage;
            const bool is_own = own >= 0 && own / kPage == slot / kPage;
            double score = 0;
            for (int64_t d = 0; d < args.head_dim; d++) {
                const int64_t at = s * args.q_stride[0] + i * args.q_stride[1] + head * args.q_stride[2] + d;
                score += bf16(q.get(at)) * k.get(page, kv, token, d, is_own);
            }
            score *= static_cast<double>(args.scaling);
            const double cap = static_cast<double>(args.softcap);
            if (cap > 0) score = cap * std::tanh(score / cap);
            if (args.bias) score += bias_of(s, head, i, slot);
            const double weight = std::exp(score);
            total += weight;
            for (int64_t d = 0; d < args.head_dim; d++) {
                sums[static_cast<size_t>(d)] += weight * v.get(page, kv, token, d, is_own);
            }
        }
        for (double &sum : sums) sum = total > 0 ? sum / total : 0;
        return sums;
    }

    std::vector<double> all_expected() const {
        std::vector<double> found;
        for (int64_t s = 0; s < args.sequences; s++) {
            for (int64_t i = 0; i < args.q_len; i++) {
                for (int64_t head = 0; head < args.q_heads; head++) {
                    const std::vector<double> part = expected(s, i, head);
                    found.insert(found.end(), part.begin(), part.end());
                }
            }
        }
        return found;
    }
};

double error(const Exact<uint16_t> &found, const std::vector<double> &expected) {
    double wrong = 0, all = 1e-30;
    for (int64_t i = 0; i < found.count(); i++) {
        const double right = expected[static_cast<size_t>(i)], difference = bf16(found.get(i)) - right;
        wrong += difference * difference;
        all += right * right;
    }
    return std::sqrt(wrong / all);
}

void check(Problem &p, const char *what) {
    const std::vector<double> expected = p.all_expected();
    for (int level = 0; level < TK_LEVELS; level++) {
        if (tk_refusal(level)) continue;
        std::unique_ptr<Exact<uint16_t>> before;
        for (int threads : kThreads) {
            Context context(threads, level);
            auto found = std::make_unique<Exact<uint16_t>>(p.q.count());
            found->fill(0xff);
            p.args.out = found->data();
            CHECK(tk_attention(context.context, &p.args, nullptr) == TK_OK, "level %d: %s", level, what);
            CHECK(error(*found, expected) < 5e-3, "error %g, level %d: %s", error(*found, expected), level, what);
            CHECK(!before || *found == *before, "the number of threads changes bits, level %d: %s", level, what);
            before = std::move(found);
        }
        const int32_t cancel = 1;
        Context context(2, level);
        CHECK(tk_attention(context.context, &p.args, &cancel) == TK_CANCELLED, "level %d: %s", level, what);
    }
}

} // namespace

void test_attention(int cases) {
    static const int64_t widths[] = {8, 24, 32, 64, 80, 128}, lengths[] = {1, 1, 2, 5, 19};
    Random random(2);
    for (int n = 0; n < cases; n++) {
        const int64_t kv_heads = 1 + random.below(3), group = 1 + random.below(5), q_len = random.one_of(lengths);
        const int64_t width = random.one_of(widths), longest = q_len + random.below(150);
        const int64_t other = q_len + random.below(longest - q_len + 1);
        const auto keys = static_cast<int32_t>(random.below(5)), values = static_cast<int32_t>(random.below(3));
        char what[200];
        std::snprintf(what, sizeof what, "heads %d x %d of %d, queries %d, keys %d and %d, formats %d %d",
                      static_cast<int>(kv_heads), static_cast<int>(group), static_cast<int>(width),
                      static_cast<int>(q_len), static_cast<int>(other), static_cast<int>(longest), keys, values);
        Problem problem(kv_heads, group, width, q_len, {other, longest}, keys, values, random);
        check(problem, what);
    }
}
