// Vectors of 16 lanes on AVX2, with AVX-VNNI or without: two registers per vector.
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace {

constexpr int kRegisterRows = 2;  // rows whose sums over a panel fit into the registers
#ifdef MOTET_AVXVNNI
constexpr int32_t kZeroPoint = 128;  // of weights and of the cache: they are multiplied as unsigned bytes
#else
constexpr int32_t kZeroPoint = 0;  // see dot
#endif

#define INLINE static inline __attribute__((always_inline))

struct F {
    __m256 a, b;
};
struct I {
    __m256i a, b;
};
using W = I;
using P = I;

INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
INLINE F bcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
INLINE F vmax(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE F vmin(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
INLINE F vabs(F x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
INLINE F round_near(F x) {
    return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
INLINE __m256 pow2_half(__m256 x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127)), 23));
}
INLINE F pow2(F x) { return {pow2_half(x.a), pow2_half(x.b)}; }
INLINE F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INLINE I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
INLINE I bcast_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE F load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
INLINE F load_int8(const int8_t* p) {
    return to_float(I{_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)),
                      _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))});
}
INLINE float reduce_max(F x) {
    float lanes[8];
    _mm256_storeu_ps(lanes, _mm256_max_ps(x.a, x.b));
    float result = lanes[0];
    for (int i = 1; i < 8; i++) result = lanes[i] > result ? lanes[i] : result;
    return result;
}
// One bit per lane: x ≥ y (0 for NaN); x is NaN.
INLINE uint32_t at_least(F x, F y) {
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ))) |
           uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ))) << 8;
}
INLINE uint32_t is_nan(F x) {
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.a, x.a, _CMP_UNORD_Q))) |
           uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.b, x.b, _CMP_UNORD_Q))) << 8;
}
// 32-bit words in pairs: mul_even makes 64-bit products of the even lanes, upper takes the upper halves of such
// products, and join puts even and odd lanes together.
INLINE I count_from(int32_t first) {
    return {_mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
            _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15))};
}
INLINE I mul_even(I x, I y) { return {_mm256_mul_epu32(x.a, y.a), _mm256_mul_epu32(x.b, y.b)}; }
INLINE I upper(I x) { return {_mm256_srli_epi64(x.a, 32), _mm256_srli_epi64(x.b, 32)}; }
INLINE I exclusive(I x, I y, I z) {
    return {_mm256_xor_si256(_mm256_xor_si256(x.a, y.a), z.a), _mm256_xor_si256(_mm256_xor_si256(x.b, y.b), z.b)};
}
INLINE I join(I even, I odd) {
    return {_mm256_blend_epi32(even.a, _mm256_slli_epi64(odd.a, 32), 0xAA),
            _mm256_blend_epi32(even.b, _mm256_slli_epi64(odd.b, 32), 0xAA)};
}
INLINE I shift_right_9_unsigned(I x) { return {_mm256_srli_epi32(x.a, 9), _mm256_srli_epi32(x.b, 9)}; }
INLINE float reduce_add(F x) {
    float lanes[8];
    _mm256_storeu_ps(lanes, _mm256_add_ps(x.a, x.b));
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}
INLINE int32_t reduce_add_int(I x) {
    uint32_t lanes[8], result = 0;
    _mm256_storeu_si256((__m256i*)lanes, _mm256_add_epi32(x.a, x.b));
    for (int i = 0; i < 8; i++) result += lanes[i];
    return int32_t(result);
}
INLINE I add_int(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
INLINE I sub_int(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
INLINE I shift_left_8(I x) { return {_mm256_slli_epi32(x.a, 8), _mm256_slli_epi32(x.b, 8)}; }
INLINE I shift_right_8(I x) { return {_mm256_srai_epi32(x.a, 8), _mm256_srai_epi32(x.b, 8)}; }
INLINE void store_bytes(int8_t* p, I x) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
INLINE F keep_first(F x, int count, F other) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256 a = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes));
    const __m256 b = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count - 8), lanes));
    return {_mm256_blendv_ps(other.a, x.a, a), _mm256_blendv_ps(other.b, x.b, b)};
}

INLINE W load_nibbles(const uint8_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
#ifdef MOTET_AVXVNNI
INLINE W load_weights(const uint8_t* p) { return load_nibbles(p); }
#else
INLINE W load_weights(const uint8_t* p) {
    const W w = load_nibbles(p);
    const __m256i top = _mm256_set1_epi8(-128);
    return {_mm256_xor_si256(w.a, top), _mm256_xor_si256(w.b, top)};
}
#endif
INLINE W low_nibbles(W x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
INLINE W high_nibbles(W x) { return low_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }

#ifdef MOTET_AVXVNNI
INLINE I dot(I sum, W w, const int32_t* signed_bytes) {
    const __m256i x = _mm256_set1_epi32(*signed_bytes);
    return {_mm256_dpbusd_avx_epi32(sum.a, w.a, x), _mm256_dpbusd_avx_epi32(sum.b, w.b, x)};
}
INLINE I dot_small(I sum, W w, const int32_t* signed_bytes) { return dot(sum, w, signed_bytes); }
INLINE I dot_cached(I sum, W w, const int32_t* signed_bytes) { return dot(sum, w, signed_bytes); }
#else
// The instruction adds two products of an unsigned and a signed byte in 16 bits. They fit if the unsigned bytes are
// magnitudes: 2 · 128 · 127. A sign moves from one factor to the other, unless the other is -128: that has no opposite.
INLINE __m256i dot_half(__m256i sum, __m256i magnitudes, __m256i x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(magnitudes, x), _mm256_set1_epi16(1)));
}
INLINE I dot_small(I sum, W w, const int32_t* signed_bytes) {
    const __m256i x = _mm256_set1_epi32(*signed_bytes);
    return {dot_half(sum.a, w.a, x), dot_half(sum.b, w.b, x)};
}
INLINE I dot(I sum, W w, const int32_t* signed_bytes) {  // activations are in -127…127
    const __m256i x = _mm256_set1_epi32(*signed_bytes);
    return {dot_half(sum.a, _mm256_abs_epi8(w.a), _mm256_sign_epi8(x, w.a)),
            dot_half(sum.b, _mm256_abs_epi8(w.b), _mm256_sign_epi8(x, w.b))};
}
INLINE I dot_cached(I sum, W w, const int32_t* signed_bytes) {  // keys and values are in -127…127
    const __m256i x = _mm256_set1_epi32(*signed_bytes), magnitudes = _mm256_abs_epi8(x);
    return {dot_half(sum.a, magnitudes, _mm256_sign_epi8(w.a, x)),
            dot_half(sum.b, magnitudes, _mm256_sign_epi8(w.b, x))};
}
#endif
INLINE void dot_both(I& sum0, I& sum1, W w0, W w1, const int32_t* signed_bytes) {
    sum0 = dot(sum0, w0, signed_bytes);
    sum1 = dot(sum1, w1, signed_bytes);
}
INLINE void dot_both_cached(I& sum0, I& sum1, W w0, W w1, const int32_t* signed_bytes) {
    sum0 = dot_cached(sum0, w0, signed_bytes);
    sum1 = dot_cached(sum1, w1, signed_bytes);
}
INLINE void dot_both_small(I& sum0, I& sum1, W w0, W w1, const int32_t* signed_bytes) {
    sum0 = dot_small(sum0, w0, signed_bytes);
    sum1 = dot_small(sum1, w1, signed_bytes);
}
INLINE void prefetch_far(const uint8_t* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
INLINE void prefetch(const uint8_t* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
INLINE I or_words(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
INLINE I load_words(const uint8_t* p) { return load_nibbles(p); }

INLINE P load_pairs(const uint8_t* p) { return load_nibbles(p); }
INLINE void store_bf16_half(uint16_t* p, __m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000),
                                 _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
    const __m256i words =
        _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_srli_epi32(rounded, 16), _mm256_setzero_si256()), 0xD8);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(words));
}
INLINE void store_bf16(uint16_t* p, F x) {
    store_bf16_half(p, x.a);
    store_bf16_half(p + 8, x.b);
}
INLINE __m256 dot_pairs_half(__m256 sum, __m256i pairs, __m256 low, __m256 high) {
    const __m256i upper = _mm256_set1_epi32(int32_t(0xFFFF0000u));
    sum = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)), low, sum);
    return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(pairs, upper)), high, sum);
}
INLINE F dot_pairs(F sum, P pairs, uint32_t x) {
    const __m256 low = _mm256_castsi256_ps(_mm256_set1_epi32(int32_t(x << 16)));
    const __m256 high = _mm256_castsi256_ps(_mm256_set1_epi32(int32_t(x & 0xFFFF0000u)));
    return {dot_pairs_half(sum.a, pairs.a, low, high), dot_pairs_half(sum.b, pairs.b, low, high)};
}

}  // namespace
