// Intel's matrix tiles beside AVX-512, and whether this machine has them.
#include "targets.h"
#if MOTET_X86 && MOTET_HAS_AMX
MOTET_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-int8,fma,f16c")
#define MOTET_ISA isa_amx
#define MOTET_ISA_NAME "amx"
#define MOTET_BF16
#define MOTET_TILES
#include "vec_avx512.h"
#include "tile_amx.h"
#include "kernels.inl"
#if defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifdef MOTET_TARGET_END  // it has ended with kernels.inl
MOTET_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-int8,fma,f16c")
#endif

namespace motet {
namespace {

bool has_tiles() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25, kOsxsave = 1u << 27;
    if (!(d & kTile) || !(d & kInt8)) return false;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsxsave)) return false;
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr unsigned kTileState = 3u << 17;  // the operating system keeps configuration and data
    return (low & kTileState) == kTileState;
}

// Linux gives a process tiles when it asks for them.
bool ask_permission() {
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

// Whether a product of tiles is the one that plain C++ computes.
bool is_right() {
    alignas(64) int8_t a[16][64];
    alignas(64) uint8_t b[16][64];
    alignas(64) int32_t products[2][16][16];
    for (int i = 0; i < 1024; i++) {
        a[i / 64][i % 64] = int8_t(i * 37 + 11);
        b[i / 64][i % 64] = uint8_t(i * 59 + 7);
    }
    use_tiles(64, 64);
    tile_load<4>(a, 64);
    tile_load<6>(b, 64);
    tile_zero<0>();
    tile_zero<1>();
    tile_dot_signed<0, 4, 6>();
    tile_dot_unsigned<1, 4, 6>();
    tile_store<0>(products[0], 64);
    tile_store<1>(products[1], 64);
    leave_tiles();
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            int32_t of_signed = 0, of_unsigned = 0;
            for (int k = 0; k < 64; k++) {
                of_signed += a[m][k] * int8_t(b[k / 4][4 * n + k % 4]);
                of_unsigned += a[m][k] * int32_t(b[k / 4][4 * n + k % 4]);
            }
            if (products[0][m][n] != of_signed || products[1][m][n] != of_unsigned) return false;
        }
    return true;
}

}  // namespace

bool may_use_amx() {
    static const bool may = has_tiles() && ask_permission() && is_right();
    return may;
}

}  // namespace motet
#ifdef MOTET_TARGET_END
MOTET_TARGET_END
#endif
#else
namespace motet {
bool may_use_amx() { return false; }
}  // namespace motet
#endif
#else
#include "isa.h"
namespace motet {
const Isa* isa_amx() { return nullptr; }
bool may_use_amx() { return false; }
}  // namespace motet
#endif
