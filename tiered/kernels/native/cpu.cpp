// Dispatch asks three parties: the processor (cpuid), the operating system (XCR0: which registers it saves), and, for
// AMX, the kernel once more (arch_prctl: tile registers are only given to processes that ask).

#include "cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tk {

#if defined(__x86_64__)

namespace {

constexpr int kArchReqXcompPerm = 0x1023;
constexpr int kXfeatureTileData = 18;

struct Leaf {
    unsigned a = 0, b = 0, c = 0, d = 0;
};

Leaf cpuid(unsigned leaf, unsigned subleaf) {
    Leaf r;
    if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return Leaf();
    return r;
}

uint64_t xcr0() {
    if (!(cpuid(1, 0).c >> 27 & 1)) return 0; // OSXSAVE
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
}

bool has(unsigned reg, int bit) { return reg >> bit & 1; }

const char *refuse_avx2() {
    const Leaf one = cpuid(1, 0), seven = cpuid(7, 0);
    if (!has(seven.b, 5)) return "the processor has no AVX2";
    if (!has(seven.b, 8)) return "the processor has no BMI2";
    if (!has(one.c, 12)) return "the processor has no FMA";
    if (!has(one.c, 29)) return "the processor has no F16C";
    if ((xcr0() & 0x6) != 0x6) return "the operating system does not save AVX registers";
    return nullptr;
}

const char *refuse_avx512() {
    if (const char *why = refuse_avx2()) return why;
    const Leaf seven = cpuid(7, 0);
    const bool wide = has(seven.b, 16) && has(seven.b, 17) && has(seven.b, 30) && has(seven.b, 31); // F DQ BW VL
    if (!wide) return "the processor has no AVX-512 (F, DQ, BW, VL)";
    if (!has(seven.c, 11)) return "the processor has no AVX-512 VNNI";
    if ((xcr0() & 0xe6) != 0xe6) return "the operating system does not save AVX-512 registers";
    return nullptr;
}

const char *refuse_amx() {
    if (const char *why = refuse_avx512()) return why;
    [[maybe_unused]] const Leaf seven = cpuid(7, 0);
    if (!has(cpuid(7, 1).a, 5)) return "the processor has no AVX-512 BF16";
#ifndef TK_EMULATE_TILES
    if (!has(seven.d, 24) || !has(seven.d, 22)) return "the processor has no AMX (TILE, BF16)";
    if ((xcr0() & 0x60000) != 0x60000) return "the operating system does not save AMX tiles";
    if (syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) != 0) {
        return "the kernel refuses AMX tiles to this process (Linux 5.16 and arch_prctl are needed)";
    }
#endif
    return nullptr;
}

} // namespace

const char *refusal(int level) {
    switch (level) {
        case TK_SCALAR: return nullptr;
        case TK_AVX2: return refuse_avx2();
        case TK_AVX512: return refuse_avx512();
        case TK_AMX: return refuse_amx();
        default: return "there is no such level";
    }
}

#else

const char *refusal(int level) {
    if (level == TK_SCALAR) return nullptr;
    return level > 0 && level < TK_LEVELS ? "this is no x86-64 processor" : "there is no such level";
}

#endif

} // namespace tk
