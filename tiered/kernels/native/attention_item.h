// One work item of attention: a tile of queries, with all heads that share a kv head, goes through the pages it sees.
// Internal linkage throughout, see pool.h.
#pragma once

#include "attention_pages.h"
#include "attention_vector.h"

namespace tk {
namespace {

constexpr int64_t kKeys = 16;     // widened at a time, so that they stay in the first-level cache
constexpr int64_t kChannels = 64; // of values, widened at a time for the same reason

// Memory of one worker, carved out of its scratch.
struct Scratch {
    float *q, *out;        // [rows][ld]
    float *keys;           // [16][ld], and what the last row's vectors write beyond
    float *values;         // [64][64], and what the last row's vectors write beyond
    float *scores;         // [rows][64]
    float *factors;        // [rows][64]
    float *channels;       // [2][ld + 16]
    float *references;     // [64]
    Running *running;      // [rows]
    uint64_t *visible;     // [queries]
    size_t nbytes;

    Scratch(void *memory, int64_t rows, int64_t queries, int64_t ld) : nbytes(0) {
        char *base = static_cast<char *>(memory);
        auto take = [&](int64_t bytes) {
            char *part = base + nbytes;
            nbytes += static_cast<size_t>((bytes + 63) / 64 * 64);
            return part;
        };
        q = reinterpret_cast<float *>(take(rows * ld * 4));
        out = reinterpret_cast<float *>(take(rows * ld * 4));
        keys = reinterpret_cast<float *>(take((kKeys * ld + 16) * 4));
        values = reinterpret_cast<float *>(take((kPage * kChannels + 16) * 4));
        scores = reinterpret_cast<float *>(take(rows * kPage * 4));
        factors = reinterpret_cast<float *>(take(rows * kPage * 4));
        channels = reinterpret_cast<float *>(take(2 * (ld + 16) * 4));
        references = reinterpret_cast<float *>(take(kPage * 4));
        running = reinterpret_cast<Running *>(take(rows * static_cast<int64_t>(sizeof(Running))));
        visible = reinterpret_cast<uint64_t *>(take(queries * 8));
    }
};

template <class V> class Item {
  public:
    Item(const Attention &attention, void *memory, int64_t item)
        : a_(attention.args), group_(attention.group), cancel_(attention.cancel),
          ld_((a_.head_dim + V::kLanes - 1) / V::kLanes * V::kLanes),
          scratch_(memory, attention.group * attention.queries, attention.queries, ld_) {
        // The last tiles see most keys: they come first, so that threads end together.
        const int64_t tile = attention.tiles - 1 - item / (a_.sequences * a_.kv_heads);
        sequence_ = item / a_.kv_heads % a_.sequences;
        head_ = item % a_.kv_heads;
        const int64_t slot = a_.count[sequence_] - a_.q_len; // of query 0
        // A power of two: this rounds down whatever the sign.
        const int64_t begin = (slot & -attention.queries) + tile * attention.queries;
        slot_ = begin > slot ? begin : slot;
        query_ = slot_ - slot;
        const int64_t end = begin + attention.queries < slot + a_.q_len ? begin + attention.queries : slot + a_.q_len;
        queries_ = end > slot_ ? end - slot_ : 0;
        rows_ = queries_ * group_;
    }

    void run() {
        if (!queries_) return;
        load_queries();
        const int64_t count = a_.count[sequence_], own = slot_ + queries_;
        const int64_t last = a_.causal && own < count ? own : count;
        for (int64_t page = first_visible(slot_) / kPage; page * kPage < last; page++) {
            if (cancel_ && __atomic_load_n(cancel_, __ATOMIC_RELAXED)) return;
            add_page(page, last);
        }
        store_results();
    }

    static size_t scratch_nbytes(const Attention &attention) {
        const int64_t ld = (attention.args.head_dim + V::kLanes - 1) / V::kLanes * V::kLanes;
        return Scratch(nullptr, attention.group * attention.queries, attention.queries, ld).nbytes;
    }

  private:
    // The first slot that a query at `slot` may see.
    int64_t first_visible(int64_t slot) const {
        const int64_t first = a_.first[sequence_];
        return a_.window && slot - a_.window + 1 > first ? slot - a_.window + 1 : first;
    }

    void load_queries() {
        for (int64_t r = 0; r < rows_; r++) {
            const uint16_t *from = a_.q + sequence_ * a_.q_stride[0] + (query_ + r / group_) * a_.q_stride[1] +
                                   (head_ * group_ + r % group_) * a_.q_stride[2];
            float *q = scratch_.q + r * ld_, *out = scratch_.out + r * ld_;
            for (int64_t i = 0; i < ld_; i++) q[i] = out[i] = 0;
            const char *bf16 = reinterpret_cast<const char *>(from);
            for (int64_t i = 0; i < a_.head_dim; i++) q[i] = from_bf16(load16(bf16 + i * 2));
            scratch_.running[r].reference = -INFINITY;
            scratch_.running[r].sum = 0;
        }
    }

    // A bit per key of `page` that query `i` of the tile sees.
    uint64_t visible(int64_t i, int64_t page) const {
        const int64_t slot = slot_ + i, count = a_.count[sequence_];
        const int64_t stop = (a_.causal && slot + 1 < count ? slot + 1 : count) - page * kPage;
        const int64_t start = first_visible(slot) - page * kPage;
        const int64_t from = start > 0 ? start : 0, to = stop < kPage ? stop : kPage;
        if (from >= to) return 0;
        if (a_.mask) {
            const uint8_t *mask = a_.mask + sequence_ * a_.mask_stride[0] + (query_ + i) * a_.mask_stride[1];
            return V::nonzero(mask + page * kPage + from, to - from) << from;
        }
        return ~uint64_t(0) >> (kPage - (to - from)) << from;
    }

    void add_page(int64_t page, int64_t last) {
        uint64_t any = 0;
        for (int64_t i = 0; i < queries_; i++) any |= scratch_.visible[i] = visible(i, page);
        if (!any) return;
        const int64_t from = __builtin_ctzll(any), to = kPage - __builtin_clzll(any);
        const Source values = source(a_.v, page);
        score(source(a_.k, page), from, to, values);
        for (int64_t r = 0; r < rows_; r++) soften_row(r, page);
        const int64_t next = (page + 1) * kPage;
        const Source keys = next < last ? source(a_.k, page + 1) : Source();
        add_values(values, from, to, keys, last - next < kPage ? last - next : kPage);
        add_weights(from, to);
    }

    Source source(const tk_pages &pages, int64_t page) const {
        return source_of(a_, pages, sequence_, head_, page, page == slot_ / kPage);
    }

    // Few rows read bf16 where it lies; many share keys and values that are widened once. The numbers are the same.
    bool is_direct(const Source &source) const { return rows_ <= kDirectRows && source.format == TK_KV_BF16; }

    // Fetches the first `tokens` tokens of `next` in `requests` steps, or as much as these reach; 0: one step per cache
    // line, for direct rows.
    Ahead ahead_of(const Source &next, int64_t tokens, int64_t requests) const {
        const int64_t element = next.format == TK_KV_BF16 ? 2 : 1;
        const int64_t row = is_nibbles(next.format) ? a_.head_dim / 2 : a_.head_dim * element;
        // Rows with gaps between them are left to the processor.
        if (!next.codes || next.token_stride * element != row) return {reinterpret_cast<const char *>(scratch_.q), 0};
        if (!requests) return {next.codes, 64};
        // Of a page of which little is seen a step would be most of it.
        const int64_t step = (tokens * row + requests - 1) / requests;
        return {next.codes, step < kMostAheadNbytes ? step : kMostAheadNbytes};
    }

    // Scores of keys from .. to for all rows, while `next` is prefetched.
    void score(const Source &source, int64_t from, int64_t to, const Source &next) {
        const bool direct = is_direct(source);
        Ahead ahead = ahead_of(next, to, direct ? 0 : (to - from) * ld_ / V::kLanes * rows_ / V::kLanes);
        const int64_t channels_ld = ld_ + V::kLanes;
        if (!direct) widen_channels<V>(source, a_.head_dim, scratch_.channels, channels_ld);
        for (int64_t k = from / kKeys * kKeys; k < to; k += kKeys) {
            const int64_t begin = k < from ? from : k, end = k + kKeys < to ? k + kKeys : to;
            if (direct) {
                score_keys<true>({source.codes, source.token_stride, a_.head_dim, begin, end}, k, ahead);
                continue;
            }
            float *keys = scratch_.keys + (begin - k) * ld_;
            widen<V>(source, a_.head_dim, begin, end, 0, a_.head_dim, keys, ld_, scratch_.channels, channels_ld);
            score_keys<false>({scratch_.keys - k * ld_, ld_, ld_, begin, end}, k, ahead);
        }
    }

    template <bool direct> void score_keys(const Rows &keys, int64_t k, Ahead &ahead) {
        int64_t r = 0;
        if constexpr (V::kQueries >= 4 && !direct) {
            for (; r + 4 <= rows_; r += 4) score_rows<4, direct>(r, keys, k, ahead);
        }
        for (; r + 2 <= rows_; r += 2) score_rows<2, direct>(r, keys, k, ahead);
        for (; r < rows_; r++) score_rows<1, direct>(r, keys, k, ahead);
    }

    template <int Q, bool direct> void score_rows(int64_t r, const Rows &keys, int64_t k, Ahead &ahead) {
        dots<V, Q, direct>(scratch_.q + r * ld_, ld_, keys, k, k + kKeys, scratch_.scores + r * kPage, ahead);
    }

    void soften_row(int64_t r, int64_t page) {
        float *scores = scratch_.scores + r * kPage, scaling = a_.scaling;
        uint64_t visible = scratch_.visible[r / group_];
        if (a_.softcap > 0) {
            const typename V::F cap = V::set(a_.softcap);
            for (int64_t k = 0; k < kPage; k += V::kLanes) {
                const typename V::F x = V::mul(V::load(scores + k), V::set(scaling));
                V::store(scores + k, V::mul(cap, tanh_of<V>(V::div(x, cap))));
            }
            scaling = 1;
        }
        if (a_.bias) {
            const int64_t head = head_ * group_ + r % group_, query = query_ + r / group_;
            const float *bias = a_.bias + sequence_ * a_.bias_stride[0] + head * a_.bias_stride[1] +
                                query * a_.bias_stride[2] + page * kPage;
            for (int64_t k = 0; k < kPage; k++) scores[k] *= scaling;
            for (uint64_t rest = visible; rest; rest &= rest - 1) {
                const int k = __builtin_ctzll(rest);
                if (bias[k] < kInvisible) visible &= ~(uint64_t(1) << k);
                scores[k] += bias[k];
            }
            scaling = 1;
        }
        soften<V>(scores, scaling, visible, scratch_.running[r], scratch_.factors + r * kPage, scratch_.references);
    }

    // Adds weighted values from .. to for all rows, while `tokens` tokens of `next` are prefetched.
    void add_values(const Source &source, int64_t from, int64_t to, const Source &next, int64_t tokens) {
        constexpr int C = V::kSums / kRowsAtOnce;
        const bool direct = is_direct(source);
        const int64_t columns = (ld_ / V::kLanes + C - 1) / C, rows = (rows_ + kRowsAtOnce - 1) / kRowsAtOnce;
        Ahead ahead = ahead_of(next, tokens, direct ? 0 : (to - from) * columns * rows);
        if (direct) {
            for (int64_t k = from; k < to; k += kKeys) { // in the order of memory
                add_direct({source.codes, source.token_stride, a_.head_dim, k, k + kKeys < to ? k + kKeys : to}, ahead);
            }
            return;
        }
        for (int64_t begin = 0; begin < a_.head_dim; begin += kChannels) {
            const int64_t end = begin + kChannels < a_.head_dim ? begin + kChannels : a_.head_dim;
            const int64_t vectors = (end - begin + V::kLanes - 1) / V::kLanes;
            // Values are never quantized per channel.
            widen<V>(source, a_.head_dim, from, to, begin, end, scratch_.values, kChannels, nullptr, 0);
            const Rows values = {scratch_.values - from * kChannels, kChannels, kChannels, from, to};
            int64_t v = 0;
            for (; v + C <= vectors; v += C) add_columns<C, false>(values, v * V::kLanes, begin, ahead);
            for (; v < vectors; v++) add_columns<1, false>(values, v * V::kLanes, begin, ahead);
        }
    }

    void add_direct(const Rows &values, Ahead &ahead) {
        int64_t c = 0;
        for (; c + 8 * V::kLanes <= a_.head_dim; c += 8 * V::kLanes) add_columns<8, true>(values, c, 0, ahead);
        for (; c + 4 * V::kLanes <= a_.head_dim; c += 4 * V::kLanes) add_columns<4, true>(values, c, 0, ahead);
        for (; c + V::kLanes <= a_.head_dim; c += V::kLanes) add_columns<1, true>(values, c, 0, ahead);
        if (c < a_.head_dim) add_columns<1, true, true>(values, c, 0, ahead);
    }

    // How many rows from r on (4, 2 or 1) can be computed together: those whose references do not move.
    int64_t steady_rows(int64_t r) const {
        int64_t steady = 0;
        while (steady < kRowsAtOnce && r + steady < rows_ && !scratch_.running[r + steady].moves) steady++;
        return steady == 3 ? 2 : steady > 1 ? steady : 1;
    }

    // C vectors of `values` from channel `column` on; channel 0 of `values` is channel `begin` of the results.
    template <int C, bool direct, bool part = false>
    void add_columns(const Rows &values, int64_t column, int64_t begin, Ahead &ahead) {
        for (int64_t r = 0, step; r < rows_; r += step) {
            step = steady_rows(r);
            const float *weights = scratch_.scores + r * kPage;
            float *out = scratch_.out + r * ld_ + begin;
            if constexpr (!direct) {
                if (step == 4) weigh<V, 4, C, false>(weights, values, values.from, values.to, column, out, ld_, ahead);
            }
            const int64_t from = values.from, to = values.to;
            if (step == 2) weigh<V, 2, C, direct, part>(weights, values, from, to, column, out, ld_, ahead);
            if (step == 1) add_moving<C, direct, part>(r, values, column, begin, ahead);
        }
    }

    template <int C, bool direct, bool part>
    void add_moving(int64_t r, const Rows &values, int64_t column, int64_t begin, Ahead &ahead) {
        const float *weights = scratch_.scores + r * kPage;
        float *out = scratch_.out + r * ld_ + begin;
        int64_t from = values.from;
        for (uint64_t moves = scratch_.running[r].moves >> from << from; moves; moves &= moves - 1) {
            const int64_t k = __builtin_ctzll(moves);
            if (k >= values.to) break;
            weigh<V, 1, C, direct, part>(weights, values, from, k, column, out, ld_, ahead);
            for (int64_t i = column; i < column + C * V::kLanes; i++) out[i] *= scratch_.factors[r * kPage + k];
            from = k;
        }
        weigh<V, 1, C, direct, part>(weights, values, from, values.to, column, out, ld_, ahead);
    }

    void add_weights(int64_t begin, int64_t end) {
        for (int64_t r = 0, step; r < rows_; r += step) {
            step = steady_rows(r);
            const float *weights = scratch_.scores + r * kPage;
            Running *running = scratch_.running + r;
            if (step == 4) add_up<4>(weights, begin, end, running);
            if (step == 2) add_up<2>(weights, begin, end, running);
            if (step > 1) continue;
            int64_t from = begin;
            for (uint64_t moves = running->moves; moves; moves &= moves - 1) {
                const int64_t k = __builtin_ctzll(moves);
                add_up<1>(weights, from, k, running);
                running->sum *= scratch_.factors[r * kPage + k];
                from = k;
            }
            add_up<1>(weights, from, end, running);
        }
    }

    // A query that sees no key gets 0.
    void store_results() {
        for (int64_t r = 0; r < rows_; r++) {
            uint16_t *to = a_.out + sequence_ * a_.out_stride[0] + (query_ + r / group_) * a_.out_stride[1] +
                           (head_ * group_ + r % group_) * a_.out_stride[2];
            const float *out = scratch_.out + r * ld_;
            const Running &running = scratch_.running[r];
            float sum = running.sum;
            if (a_.sinks) {
                const float score = a_.sinks[head_ * group_ + r % group_] - running.reference;
                sum += V::first_of(exp_of<V>(V::set(score < kMost ? score : kMost)));
            }
            const float inverse = running.reference == -INFINITY ? 0 : 1 / sum;
            for (int64_t i = 0; i < a_.head_dim; i++) {
                const uint16_t bits = to_bf16(out[i] * inverse);
                std::memcpy(to + i, &bits, sizeof bits);
            }
        }
    }

    static constexpr int64_t kDirectRows = 2, kRowsAtOnce = 4;
    static constexpr int64_t kMostAheadNbytes = 4 * 64; // of a step

    const tk_attention_args &a_;
    int64_t group_;
    const int32_t *cancel_;
    int64_t ld_;
    Scratch scratch_;
    int64_t sequence_, head_;
    // Slot and number (in the call) of the tile's first query; queries and rows of the tile.
    int64_t slot_, query_, queries_, rows_;
};

struct Shared {
    const Attention *attention;
    Pool *pool;
    size_t nbytes;
};

template <class V> void one_item(void *argument, int worker, int64_t item) {
    const Shared &shared = *static_cast<const Shared *>(argument);
    // The scratch has this size already, so the call neither moves it nor fails.
    Item<V>(*shared.attention, shared.pool->scratch(worker, shared.nbytes), item).run();
}

template <class V> int attention_vector(const Attention &attention, Pool &pool) {
    Shared shared = {&attention, &pool, Item<V>::scratch_nbytes(attention)};
    for (int worker = 0; worker < pool.threads(); worker++) {
        if (!pool.scratch(worker, shared.nbytes)) return TK_NO_MEMORY;
    }
    const int64_t items = attention.args.sequences * attention.args.kv_heads * attention.tiles;
    return pool.run(items, one_item<V>, &shared, attention.cancel) ? TK_OK : TK_CANCELLED;
}

} // namespace
} // namespace tk
