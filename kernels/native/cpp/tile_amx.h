// The matrix tiles of Intel's AMX: eight registers of up to 16 rows of 64 bytes. Written in assembly, because the
// compiler's own functions do not say that they read memory, so stores could be moved behind them.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, LDTILECFG, TILELOADD, TDPBSSD,
// TDPBSUD.
#pragma once
#include "tile_shapes.h"

namespace {

INLINE void configure_tiles(const motet::TileShapes* shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(*shapes)); }
INLINE void release_tiles() { __asm__ volatile("tilerelease" ::: "memory"); }
template <int T>
INLINE void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>  // rows from `from` on, `stride` bytes apart
INLINE void tile_load(const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
INLINE void tile_store(void* to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
// C[m][n] += Σ over k and i<4 of A[m][4 k + i] · B[k][4 n + i], in int32: signed A, and signed or unsigned B.
template <int C, int A, int B>
INLINE void tile_dot_signed() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
INLINE void tile_dot_unsigned() {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace
