// What attention needs whatever the instruction set: its arguments checked, and cut into work items.

#include "attention.h"

namespace tk {

namespace {

constexpr int64_t kPage = 64;
constexpr int64_t kMostHeadDim = 576; // latents of 512 channels and 64 that know positions
constexpr int64_t kRows = 64; // of queries times heads in a work item: they share every key that is loaded

bool is_pages(const tk_pages &pages) {
    return pages.format >= TK_KV_BF16 && pages.format <= TK_KV_INT4_CHANNEL && pages.blocks.offsets;
}

bool has_block(const tk_table &table, int64_t at) { return table.offsets && table.offsets[at] >= 0; }

// Whether every page that holds a key is there, in one form at least.
bool has_pages(const tk_attention_args &args, const tk_pages &pages, int64_t s) {
    for (int64_t j = args.first[s] / kPage; j * kPage < args.count[s]; j++) {
        const int64_t at = s * args.table_stride + j;
        const bool stored = has_block(pages.blocks, at), recent = has_block(pages.recent, at);
        if ((stored && !pages.blocks.base) || (recent && !pages.recent.base) || !(stored || recent)) return false;
    }
    return true;
}

// The slot of the first query of sequence `s`.
int64_t first_slot(const tk_attention_args &args, int64_t s) { return args.count[s] - args.q_len; }

} // namespace

bool is_valid(const tk_attention_args &args) {
    if (args.sequences < 0 || args.q_len < 0 || args.kv_heads < 1 || args.q_heads < 1) return false;
    if (args.q_heads % args.kv_heads || args.window < 0 || !(args.softcap >= 0)) return false;
    if (args.head_dim < 8 || args.head_dim > kMostHeadDim || args.head_dim % 8) return false;
    if (args.sequences == 0 || args.q_len == 0) return true;
    if (!args.q || !args.out || !args.first || !args.count || !is_pages(args.k) || !is_pages(args.v)) return false;
    if (args.v.format > TK_KV_INT4) return false; // only keys are quantized per channel
    for (int64_t s = 0; s < args.sequences; s++) {
        const bool ordered = 0 <= args.first[s] && args.first[s] <= args.count[s];
        if (!ordered || args.count[s] > args.table_stride * kPage) return false;
        if (!has_pages(args, args.k, s) || !has_pages(args, args.v, s)) return false;
    }
    return true;
}

int attention(const tk_attention_args &args, int level, Pool &pool, const int32_t *cancel) {
    Attention attention = {};
    attention.args = args;
    attention.cancel = cancel;
    attention.group = args.q_heads / args.kv_heads;
    attention.queries = 1;
    while (attention.queries * 2 * attention.group <= kRows) attention.queries *= 2;
    for (int64_t s = 0; s < args.sequences; s++) {
        // The place of the first slot in its tile; a slot may be negative.
        const int64_t within = (first_slot(args, s) % attention.queries + attention.queries) % attention.queries;
        const int64_t tiles = (within + args.q_len - 1) / attention.queries + 1;
        if (tiles > attention.tiles) attention.tiles = tiles;
    }
    switch (level) {
#if defined(__x86_64__)
        case TK_AVX2: return attention_avx2(attention, pool);
        case TK_AVX512:
        case TK_AMX: return attention_avx512(attention, pool); // tiles add in pairs, which would tie bits to positions
#endif
        default: return attention_scalar(attention, pool);
    }
}

} // namespace tk
