// AMX tile registers. Compilers do not allocate them: every call names them by number, and the assembler statements
// keep those numbers template parameters (gcc's own intrinsics paste them from the source text).
//
// With TK_EMULATE_TILES the same calls compute in plain code, so that everything but the instructions themselves can be
// tested on processors without AMX.
#pragma once

#include "avx512.h"
#include "numbers.h"

namespace tk {
namespace {

constexpr int kTileNbytes = 1024; // 16 rows of 64 bytes

// The operand of ldtilecfg.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_nbytes[16] = {};
    uint8_t rows[16] = {};

    TK_INLINE void set(int tile, int columns) {
        rows[tile] = 16;
        row_nbytes[tile] = static_cast<uint16_t>(4 * columns);
    }
};

#ifndef TK_EMULATE_TILES

TK_INLINE void tiles_begin(const TileConfig &config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }
TK_INLINE void tiles_end() { __asm__ volatile("tilerelease"); }

// The memory clobber keeps the stores of widened weights before the loads that read them.
template <int T> TK_INLINE void tile_load(const void *from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T> TK_INLINE void tile_store(void *to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int T> TK_INLINE void tile_zero() { __asm__ volatile("tilezero %%tmm%c0" ::"i"(T)); }

// C [16][columns] += A [16][16 pairs of bf16] times B [16 pairs][columns].
template <int C, int A, int B> TK_INLINE void tile_multiply() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else

thread_local uint8_t emulated[8][kTileNbytes];
thread_local TileConfig emulated_config;

void tiles_begin(const TileConfig &config) {
    emulated_config = config;
    std::memset(emulated, 0, sizeof emulated);
}
void tiles_end() { emulated_config = TileConfig(); }

template <int T> void tile_load(const void *from, int64_t stride) {
    std::memset(emulated[T], 0, kTileNbytes);
    for (int r = 0; r < emulated_config.rows[T]; r++) {
        std::memcpy(emulated[T] + r * 64, static_cast<const uint8_t *>(from) + r * stride, emulated_config.row_nbytes[T]);
    }
}
template <int T> void tile_store(void *to, int64_t stride) {
    for (int r = 0; r < emulated_config.rows[T]; r++) {
        std::memcpy(static_cast<uint8_t *>(to) + r * stride, emulated[T] + r * 64, emulated_config.row_nbytes[T]);
    }
}
template <int T> void tile_zero() { std::memset(emulated[T], 0, kTileNbytes); }

// As the instruction does: even and odd products are summed apart, over the pairs in order, then added to C.
template <int C, int A, int B> void tile_multiply() {
    for (int m = 0; m < emulated_config.rows[C]; m++) {
        for (int n = 0; n < emulated_config.row_nbytes[C] / 4; n++) {
            float sums[2] = {}, c;
            for (int k = 0; k < emulated_config.row_nbytes[A] / 4; k++) {
                for (int i = 0; i < 2; i++) {
                    uint16_t a, b;
                    std::memcpy(&a, emulated[A] + m * 64 + k * 4 + i * 2, 2);
                    std::memcpy(&b, emulated[B] + k * 64 + n * 4 + i * 2, 2);
                    sums[i] = __builtin_fmaf(from_bf16(a), from_bf16(b), sums[i]);
                }
            }
            std::memcpy(&c, emulated[C] + m * 64 + n * 4, 4);
            c += sums[0] + sums[1];
            std::memcpy(emulated[C] + m * 64 + n * 4, &c, 4);
        }
    }
}

#endif

} // namespace
} // namespace tk
