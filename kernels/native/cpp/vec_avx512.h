// Vectors of 16 lanes on AVX-512: one register per vector.
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace {

constexpr int kRegisterRows = 6;     // rows whose sums over a panel fit into the registers
constexpr int32_t kZeroPoint = 128;  // of weights and of the cache: they are multiplied as unsigned bytes

using F = __m512;   // 16 f32
using I = __m512i;  // 16 i32
using W = __m512i;  // 64 bytes of weights

#define INLINE static inline __attribute__((always_inline))

INLINE F zero() { return _mm512_setzero_ps(); }
INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a); }
INLINE F bcast(float a) { return _mm512_set1_ps(a); }
INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
INLINE F vmax(F a, F b) { return _mm512_max_ps(a, b); }
INLINE F vmin(F a, F b) { return _mm512_min_ps(a, b); }
INLINE F vabs(F a) { return _mm512_abs_ps(a); }
INLINE F round_near(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE F pow2(F a) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(127)), 23));
}
INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
INLINE I to_int(F a) { return _mm512_cvtps_epi32(a); }
INLINE I bcast_int(int32_t a) { return _mm512_set1_epi32(a); }
INLINE F load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE F load_int8(const int8_t* p) { return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
INLINE float reduce_max(F a) { return _mm512_reduce_max_ps(a); }
// One bit per lane: a ≥ b (0 for NaN); a is NaN.
INLINE uint32_t at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
INLINE uint32_t is_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
// 32-bit words in pairs: mul_even makes 64-bit products of the even lanes, upper takes the upper halves of such
// products, and join puts even and odd lanes together.
INLINE I count_from(int32_t first) {
    return _mm512_add_epi32(_mm512_set1_epi32(first),
                            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}
INLINE I mul_even(I a, I b) { return _mm512_mul_epu32(a, b); }
INLINE I upper(I a) { return _mm512_srli_epi64(a, 32); }
INLINE I exclusive(I a, I b, I c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
INLINE I join(I even, I odd) { return _mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32)); }
INLINE I shift_right_9_unsigned(I a) { return _mm512_srli_epi32(a, 9); }
INLINE float reduce_add(F a) { return _mm512_reduce_add_ps(a); }
// In wrapping additions: _mm512_reduce_add_epi32 may be made of signed ones, and the sum of a row with a NaN wraps
// around.
INLINE int32_t reduce_add_int(I a) {
    const __m256i x = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
    __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0xB1)));
}
INLINE I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
INLINE I sub_int(I a, I b) { return _mm512_sub_epi32(a, b); }
INLINE I shift_left_8(I a) { return _mm512_slli_epi32(a, 8); }
INLINE I shift_right_8(I a) { return _mm512_srai_epi32(a, 8); }
INLINE void store_bytes(int8_t* p, I a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(a)); }
// The first `count` lanes keep their value, the others become `other`.
INLINE F keep_first(F a, int count, F other) {
    unsigned mask = count >= 16 ? 0xFFFFu : count <= 0 ? 0u : (1u << count) - 1u;
    return _mm512_mask_mov_ps(other, (__mmask16)mask, a);
}

INLINE W load_weights(const uint8_t* p) { return _mm512_load_si512(p); }
INLINE void store_weights(uint8_t* p, W a) { _mm512_store_si512(p, a); }
INLINE W flip_signs(W a) { return _mm512_xor_si512(a, _mm512_set1_epi8(-128)); }  // unsigned bytes less 128
INLINE I load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
INLINE W load_nibbles(const uint8_t* p) { return load_weights(p); }
INLINE W low_nibbles(W a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
INLINE W high_nibbles(W a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
// One broadcast for two dot products: with one load per dot product, loads would be the limit. It is written in
// assembly because gcc would move the broadcasts of all rows to the front and spill them.
INLINE void dot_both(I& sum0, I& sum1, W w0, W w1, const int32_t* signed_bytes) {
    __m512i x;
    __asm__("vpbroadcastd %5, %2\n\tvpdpbusd %2, %3, %0\n\tvpdpbusd %2, %4, %1"
            : "+v"(sum0), "+v"(sum1), "=&v"(x)
            : "v"(w0), "v"(w1), "m"(*signed_bytes));
}
INLINE void dot_both_small(I& sum0, I& sum1, W w0, W w1, const int32_t* signed_bytes) {
    dot_both(sum0, sum1, w0, w1, signed_bytes);
}
INLINE I dot(I sum, W unsigned_bytes, const int32_t* signed_bytes) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "m"(*signed_bytes));
    return sum;
}
// With bytes of the cache in place of weights.
INLINE I dot_cached(I sum, W w, const int32_t* signed_bytes) { return dot(sum, w, signed_bytes); }
INLINE void dot_both_cached(I& sum0, I& sum1, W w0, W w1, const int32_t* signed_bytes) {
    dot_both(sum0, sum1, w0, w1, signed_bytes);
}
INLINE void prefetch_far(const uint8_t* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
INLINE void prefetch(const uint8_t* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
INLINE I or_words(I a, W b) { return _mm512_or_si512(a, b); }
INLINE I load_words(const uint8_t* p) { return _mm512_loadu_si512(p); }

// Pairs of bf16: 32 in a vector.
using P = __m512i;
INLINE P load_pairs(const uint8_t* p) { return _mm512_loadu_si512(p); }
INLINE void store_bf16(uint16_t* p, F a) {  // to nearest, ties to even; only a NaN becomes a NaN
    __m512i bits = _mm512_castps_si512(a);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
#ifdef MOTET_BF16
INLINE F dot_pairs(F sum, P a, uint32_t b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)_mm512_set1_epi32((int)b));
}
#else
INLINE F dot_pairs(F sum, P a, uint32_t b) {
    const __m512i high = _mm512_set1_epi32((int)0xFFFF0000u);
    __m512 low_b = _mm512_castsi512_ps(_mm512_set1_epi32((int)(b << 16)));
    __m512 high_b = _mm512_castsi512_ps(_mm512_set1_epi32((int)(b & 0xFFFF0000u)));
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), low_b, sum);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, high)), high_b, sum);
}
#endif

}  // namespace
