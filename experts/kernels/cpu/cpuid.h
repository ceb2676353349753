// Which instruction families this CPU, and this process, may use.
#pragma once
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace shoal {

enum Family : int32_t { kAmx = 0, kAvx512Bf16 = 1, kAvx2 = 2, kPortable = 3 };

#if defined(__x86_64__)
struct Features {
    bool avx2 = false, avx512_bf16 = false, amx = false;

    Features() {
        unsigned a, b, c, d;
        if (!__get_cpuid(1, &a, &b, &c, &d)) return;
        const bool fma = c >> 12 & 1, saves_state = c >> 27 & 1, f16c = c >> 29 & 1;
        if (!saves_state) return;
        unsigned low, high;
        asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        const bool ymm = (low & 6) == 6, zmm = (low & 0xe6) == 0xe6, tiles = (low & 0x60000) == 0x60000;
        unsigned a1, b1, c1, d1;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !__get_cpuid_count(7, 1, &a1, &b1, &c1, &d1)) return;
        avx2 = ymm && fma && f16c && (b >> 5 & 1);
        const bool avx512 = zmm && (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);
        // Every CPU with AVX512-BF16 but Cooper Lake, which takes AVX2, has what decoding e4m3 needs.
        const bool vbmi = c >> 1 & 1, gfni = c >> 8 & 1, amx_bf16 = d >> 22 & 1, amx_tile = d >> 24 & 1;
        avx512_bf16 = avx2 && avx512 && vbmi && gfni && (a1 >> 5 & 1);
        amx = avx512_bf16 && tiles && amx_bf16 && amx_tile && ask_for_tiles();
    }

  private:
    // Linux gives a process the tiles' 8 KB of state only when asked (arch_prctl(2), ARCH_REQ_XCOMP_PERM).
    static bool ask_for_tiles() {
#if defined(__linux__)
        return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
        return false;
#endif
    }
};
#else
struct Features {
    bool avx2 = false, avx512_bf16 = false, amx = false;
};
#endif

inline bool is_supported(int family) {
    static const Features features;
    switch (family) {
        case kAmx:
            return features.amx;
        case kAvx512Bf16:
            return features.avx512_bf16;
        case kAvx2:
            return features.avx2;
        default:
            return family == kPortable;
    }
}

}  // namespace shoal
