// Attention over a paged cache as the levels see it, and the levels' entries. See pool.h about inline functions.
//
// Every result is a function of its query and of the ordered list of keys and values that the query sees, bit for bit:
//   score(key)  = scaling * (products along head_dim in one fixed order), capped, plus its bias
//   reference   = the first score; a later one that exceeds the reference by more than kHeadroom becomes it, and what
//                 has been added up so far is multiplied by exp(old - new)
//   sum        += exp(score - reference), output += exp(score - reference) * value, key after key in ascending order
// A key that is not seen adds exactly nothing. So neither the page that a key lies in, nor gaps between keys (padding,
// the other branches of a speculative tree), nor the other queries of a call leave a trace, and scores need not be
// stored. A maximum per block of keys, as is usual, would tie the bits to where blocks begin. The sums are fp32 chains
// as long as the context: their error grows with its square root, to some 1e-5 at 100,000 keys.
#pragma once

#include "pool.h"
#include "tiered_kernels.h"

namespace tk {

struct Attention {
    tk_attention_args args;
    const int32_t *cancel;
    int64_t group;   // query heads per kv head
    int64_t queries; // of a tile: a power of two, so that no tile crosses a page
    int64_t tiles;   // of queries, of the sequence that has most of them
};

// Whether every extent and pointer makes sense.
bool is_valid(const tk_attention_args &args);

// Each returns a tk_status.
int attention_scalar(const Attention &attention, Pool &pool);
int attention_avx2(const Attention &attention, Pool &pool);
int attention_avx512(const Attention &attention, Pool &pool);

// Divides `args` into work items and runs them at `level`.
int attention(const tk_attention_args &args, int level, Pool &pool, const int32_t *cancel);

} // namespace tk
