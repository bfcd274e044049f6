// Vectors of 16 lanes on ARM's Advanced SIMD with dot products: four registers per vector.
#pragma once
#include <arm_neon.h>
#include <stdint.h>

namespace {

constexpr int kRegisterRows = 2;   // rows whose sums over a panel fit into the registers
constexpr int32_t kZeroPoint = 0;  // SDOT multiplies signed bytes, so weights lose their 128 as they are loaded

#define INLINE static inline __attribute__((always_inline))
#define EACH for (int i = 0; i < 4; i++)

struct F {
    float32x4_t v[4];
};
struct I {
    int32x4_t v[4];
};
struct W {
    uint8x16_t v[4];
};
struct P {
    uint32x4_t v[4];
};

INLINE F bcast(float x) { return {{vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x)}}; }
INLINE F zero() { return bcast(0.0f); }
INLINE F load(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
INLINE void store(float* p, F x) { EACH vst1q_f32(p + 4 * i, x.v[i]); }
INLINE F add(F x, F y) {
    EACH x.v[i] = vaddq_f32(x.v[i], y.v[i]);
    return x;
}
INLINE F sub(F x, F y) {
    EACH x.v[i] = vsubq_f32(x.v[i], y.v[i]);
    return x;
}
INLINE F mul(F x, F y) {
    EACH x.v[i] = vmulq_f32(x.v[i], y.v[i]);
    return x;
}
INLINE F div(F x, F y) {
    EACH x.v[i] = vdivq_f32(x.v[i], y.v[i]);
    return x;
}
INLINE F fma(F x, F y, F z) {
    EACH z.v[i] = vfmaq_f32(z.v[i], x.v[i], y.v[i]);
    return z;
}
// Of a NaN and a number the second one, as on x86.
INLINE F vmax(F x, F y) {
    EACH x.v[i] = vbslq_f32(vcgtq_f32(x.v[i], y.v[i]), x.v[i], y.v[i]);
    return x;
}
INLINE F vmin(F x, F y) {
    EACH x.v[i] = vbslq_f32(vcltq_f32(x.v[i], y.v[i]), x.v[i], y.v[i]);
    return x;
}
INLINE F vabs(F x) {
    EACH x.v[i] = vabsq_f32(x.v[i]);
    return x;
}
INLINE F round_near(F x) {
    EACH x.v[i] = vrndnq_f32(x.v[i]);
    return x;
}
INLINE F pow2(F x) {
    EACH x.v[i] = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(x.v[i]), vdupq_n_s32(127)), 23));
    return x;
}
INLINE F to_float(I x) {
    F r;
    EACH r.v[i] = vcvtq_f32_s32(x.v[i]);
    return r;
}
INLINE I to_int(F x) {  // NaN becomes INT32_MIN, as on the other paths
    I r;
    EACH r.v[i] = vbslq_s32(vcltq_f32(vabsq_f32(x.v[i]), vdupq_n_f32(2147483648.0f)), vcvtnq_s32_f32(x.v[i]),
                            vdupq_n_s32(INT32_MIN));
    return r;
}
INLINE I bcast_int(int32_t x) { return {{vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x)}}; }
INLINE F load_half(const uint16_t* p) {
    F r;
    EACH r.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
    return r;
}
INLINE F load_int8(const int8_t* p) {
    const int8x16_t x = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_s8(vget_high_s8(x));
    return to_float(I{{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)),
                       vmovl_s16(vget_high_s16(high))}});
}
INLINE float reduce_max(F x) {
    float lanes[16], largest;
    store(lanes, x);
    largest = lanes[0];
    for (int i = 1; i < 16; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    return largest;
}
// One bit per lane: x ≥ y (0 for NaN); x is NaN.
INLINE uint32_t bits_of(const uint32x4_t (&lanes)[4]) {
    const uint32_t places[4] = {1, 2, 4, 8};
    const uint32x4_t place = vld1q_u32(places);
    uint32_t r = 0;
    EACH r |= vaddvq_u32(vandq_u32(lanes[i], place)) << (4 * i);
    return r;
}
INLINE uint32_t at_least(F x, F y) {
    uint32x4_t lanes[4];
    EACH lanes[i] = vcgeq_f32(x.v[i], y.v[i]);
    return bits_of(lanes);
}
INLINE uint32_t is_nan(F x) {
    uint32x4_t lanes[4];
    EACH lanes[i] = vmvnq_u32(vceqq_f32(x.v[i], x.v[i]));
    return bits_of(lanes);
}
INLINE I count_from(int32_t first) {
    const int32_t steps[4] = {0, 1, 2, 3};
    I r;
    EACH r.v[i] = vaddq_s32(vdupq_n_s32(first + 4 * i), vld1q_s32(steps));
    return r;
}
// 32-bit words in pairs: mul_even makes 64-bit products of the even lanes, upper takes the upper halves of such
// products, and join puts even and odd lanes together.
INLINE I mul_even(I x, I y) {
    EACH x.v[i] = vreinterpretq_s32_u64(
        vmull_u32(vmovn_u64(vreinterpretq_u64_s32(x.v[i])), vmovn_u64(vreinterpretq_u64_s32(y.v[i]))));
    return x;
}
INLINE I upper(I x) {
    EACH x.v[i] = vreinterpretq_s32_u64(vshrq_n_u64(vreinterpretq_u64_s32(x.v[i]), 32));
    return x;
}
INLINE I exclusive(I x, I y, I z) {
    EACH x.v[i] = veorq_s32(veorq_s32(x.v[i], y.v[i]), z.v[i]);
    return x;
}
INLINE I join(I even, I odd) {
    EACH even.v[i] = vtrn1q_s32(even.v[i], odd.v[i]);
    return even;
}
INLINE I shift_right_9_unsigned(I x) {
    EACH x.v[i] = vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(x.v[i]), 9));
    return x;
}
INLINE float reduce_add(F x) {  // lanes that are half apart, then a quarter, and so on
    const float32x4_t four = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
INLINE int32_t reduce_add_int(I x) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(x.v[0], x.v[1]), vaddq_s32(x.v[2], x.v[3])));
}
INLINE I add_int(I x, I y) {
    EACH x.v[i] = vaddq_s32(x.v[i], y.v[i]);
    return x;
}
INLINE I sub_int(I x, I y) {
    EACH x.v[i] = vsubq_s32(x.v[i], y.v[i]);
    return x;
}
INLINE I shift_left_8(I x) {
    EACH x.v[i] = vshlq_n_s32(x.v[i], 8);
    return x;
}
INLINE I shift_right_8(I x) {
    EACH x.v[i] = vshrq_n_s32(x.v[i], 8);
    return x;
}
INLINE void store_bytes(int8_t* p, I x) {
    const int16x8_t low = vcombine_s16(vqmovn_s32(x.v[0]), vqmovn_s32(x.v[1]));
    const int16x8_t high = vcombine_s16(vqmovn_s32(x.v[2]), vqmovn_s32(x.v[3]));
    vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
}
// The first `count` lanes keep their value, the others become `other`.
INLINE F keep_first(F x, int count, F other) {
    const I lane = count_from(0);
    EACH x.v[i] = vbslq_f32(vcltq_s32(lane.v[i], vdupq_n_s32(count)), x.v[i], other.v[i]);
    return x;
}

INLINE W load_nibbles(const uint8_t* p) {
    return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
}
INLINE W load_weights(const uint8_t* p) {
    W w = load_nibbles(p);
    EACH w.v[i] = veorq_u8(w.v[i], vdupq_n_u8(128));
    return w;
}
INLINE W low_nibbles(W x) {
    EACH x.v[i] = vandq_u8(x.v[i], vdupq_n_u8(15));
    return x;
}
INLINE W high_nibbles(W x) {
    EACH x.v[i] = vshrq_n_u8(x.v[i], 4);
    return x;
}
INLINE I dot(I sum, W w, const int32_t* signed_bytes) {
    const int8x16_t x = vreinterpretq_s8_s32(vld1q_dup_s32(signed_bytes));
    EACH sum.v[i] = vdotq_s32(sum.v[i], vreinterpretq_s8_u8(w.v[i]), x);
    return sum;
}
INLINE void dot_both(I& sum0, I& sum1, W w0, W w1, const int32_t* signed_bytes) {
    sum0 = dot(sum0, w0, signed_bytes);
    sum1 = dot(sum1, w1, signed_bytes);
}
INLINE void dot_both_small(I& sum0, I& sum1, W w0, W w1, const int32_t* signed_bytes) {
    dot_both(sum0, sum1, w0, w1, signed_bytes);
}
// With bytes of the cache in place of weights.
INLINE I dot_cached(I sum, W w, const int32_t* signed_bytes) { return dot(sum, w, signed_bytes); }
INLINE void dot_both_cached(I& sum0, I& sum1, W w0, W w1, const int32_t* signed_bytes) {
    dot_both(sum0, sum1, w0, w1, signed_bytes);
}
INLINE void prefetch_far(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }
INLINE void prefetch(const uint8_t* p) { __builtin_prefetch(p); }
INLINE I or_words(I x, I y) {
    EACH x.v[i] = vorrq_s32(x.v[i], y.v[i]);
    return x;
}
INLINE I load_words(const uint8_t* p) {
    I r;
    EACH r.v[i] = vreinterpretq_s32_u8(vld1q_u8(p + 16 * i));
    return r;
}

// Pairs of bf16: 16 pairs in a vector, the first of a pair in the lower half.
INLINE P load_pairs(const uint8_t* p) {
    P r;
    EACH r.v[i] = vreinterpretq_u32_u8(vld1q_u8(p + 16 * i));
    return r;
}
INLINE void store_bf16(uint16_t* p, F x) {  // to nearest, ties to even; only a NaN becomes a NaN
    EACH {
        const uint32x4_t bits = vreinterpretq_u32_f32(x.v[i]);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
        const uint32x4_t kept = vbslq_u32(vceqq_f32(x.v[i], x.v[i]), rounded, vdupq_n_u32(0x7FC00000));
        vst1_u16(p + 4 * i, vshrn_n_u32(kept, 16));
    }
}
INLINE F dot_pairs(F sum, P a, uint32_t b) {
    const float32x4_t low_b = vreinterpretq_f32_u32(vdupq_n_u32(b << 16));
    const float32x4_t high_b = vreinterpretq_f32_u32(vdupq_n_u32(b & 0xFFFF0000u));
    EACH {
        sum.v[i] = vfmaq_f32(sum.v[i], vreinterpretq_f32_u32(vshlq_n_u32(a.v[i], 16)), low_b);
        const uint32x4_t high = vandq_u32(a.v[i], vdupq_n_u32(0xFFFF0000u));
        sum.v[i] = vfmaq_f32(sum.v[i], vreinterpretq_f32_u32(high), high_b);
    }
    return sum;
}

#undef EACH
}  // namespace
