// Vectors of 16 lanes in plain C++. The other paths are tested against this one.
#pragma once
#include <stdint.h>
#include <string.h>

namespace {

constexpr int kRegisterRows = 1;     // rows whose sums over a panel fit into the registers
constexpr int32_t kZeroPoint = 128;  // of weights and of the cache: they are multiplied as unsigned bytes

#define INLINE static inline __attribute__((always_inline))

struct F {
    float v[16];
};
struct I {
    int32_t v[16];
};
struct W {
    uint8_t v[64];
};
struct P {
    uint16_t v[32];
};
#define EACH for (int i = 0; i < 16; i++)

INLINE F bcast(float x) {
    F r;
    EACH r.v[i] = x;
    return r;
}
INLINE F zero() { return bcast(0.0f); }
INLINE F load(const float* p) {
    F r;
    memcpy(r.v, p, sizeof r.v);
    return r;
}
INLINE void store(float* p, F x) { memcpy(p, x.v, sizeof x.v); }
INLINE F add(F x, F y) {
    EACH x.v[i] += y.v[i];
    return x;
}
INLINE F sub(F x, F y) {
    EACH x.v[i] -= y.v[i];
    return x;
}
INLINE F mul(F x, F y) {
    EACH x.v[i] *= y.v[i];
    return x;
}
INLINE F div(F x, F y) {
    EACH x.v[i] /= y.v[i];
    return x;
}
INLINE F fma(F x, F y, F z) {
    EACH z.v[i] += x.v[i] * y.v[i];
    return z;
}
INLINE F vmax(F x, F y) {
    EACH x.v[i] = x.v[i] > y.v[i] ? x.v[i] : y.v[i];
    return x;
}
INLINE F vmin(F x, F y) {
    EACH x.v[i] = x.v[i] < y.v[i] ? x.v[i] : y.v[i];
    return x;
}
INLINE F vabs(F x) {
    EACH x.v[i] = __builtin_fabsf(x.v[i]);
    return x;
}
// Adding and subtracting 1.5 · 2^23 rounds to the nearest whole number, ties to even, for |x| < 2^22.
INLINE float round_one(float x) {
    volatile float shifted = x + 12582912.0f;
    return shifted - 12582912.0f;
}
INLINE F round_near(F x) {
    EACH x.v[i] = round_one(x.v[i]);
    return x;
}
INLINE I to_int(F x) {
    I r;
    // NaN becomes INT32_MIN too, as on the other paths.
    EACH r.v[i] = x.v[i] > -4.0e6f && x.v[i] < 4.0e6f ? int32_t(round_one(x.v[i])) : INT32_MIN;
    return r;
}
INLINE F pow2(F x) {
    F r;
    EACH {
        uint32_t bits = uint32_t(to_int(x).v[i] + 127) << 23;
        memcpy(&r.v[i], &bits, 4);
    }
    return r;
}
INLINE F to_float(I x) {
    F r;
    EACH r.v[i] = float(x.v[i]);
    return r;
}
INLINE I bcast_int(int32_t x) {
    I r;
    EACH r.v[i] = x;
    return r;
}
INLINE float half_to_float(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7FFF, bits;
    float value;
    if (rest >= 0x0400) {
        bits = (rest << 13) + (112u << 23);
        memcpy(&value, &bits, 4);
    } else {
        value = float(rest) * 5.9604645e-8f;
    }
    memcpy(&bits, &value, 4);
    bits |= sign;
    memcpy(&value, &bits, 4);
    return value;
}
INLINE F load_half(const uint16_t* p) {
    F r;
    EACH r.v[i] = half_to_float(p[i]);
    return r;
}
INLINE F load_int8(const int8_t* p) {
    F r;
    EACH r.v[i] = float(p[i]);
    return r;
}
INLINE float reduce_max(F x) {
    float r = x.v[0];
    EACH r = x.v[i] > r ? x.v[i] : r;
    return r;
}
// One bit per lane: x ≥ y (0 for NaN); x is NaN.
INLINE uint32_t at_least(F x, F y) {
    uint32_t r = 0;
    EACH r |= uint32_t(x.v[i] >= y.v[i]) << i;
    return r;
}
INLINE uint32_t is_nan(F x) {
    uint32_t r = 0;
    EACH r |= uint32_t(x.v[i] != x.v[i]) << i;
    return r;
}
// 32-bit words in pairs: mul_even makes 64-bit products of the even lanes, upper takes the upper halves of such
// products, and join puts even and odd lanes together.
INLINE I count_from(int32_t first) {
    I r;
    EACH r.v[i] = first + i;
    return r;
}
INLINE I mul_even(I x, I y) {
    for (int i = 0; i < 16; i += 2) {
        const uint64_t product = uint64_t(uint32_t(x.v[i])) * uint32_t(y.v[i]);
        x.v[i] = int32_t(uint32_t(product));
        x.v[i + 1] = int32_t(uint32_t(product >> 32));
    }
    return x;
}
INLINE I upper(I x) {
    for (int i = 0; i < 16; i += 2) x.v[i] = x.v[i + 1];
    return x;
}
INLINE I exclusive(I x, I y, I z) {
    EACH x.v[i] ^= y.v[i] ^ z.v[i];
    return x;
}
INLINE I join(I even, I odd) {
    for (int i = 0; i < 16; i += 2) even.v[i + 1] = odd.v[i];
    return even;
}
INLINE I shift_right_9_unsigned(I x) {
    EACH x.v[i] = int32_t(uint32_t(x.v[i]) >> 9);
    return x;
}
INLINE float reduce_add(F x) {
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++) x.v[i] += x.v[i + n];
    return x.v[0];
}
INLINE int32_t reduce_add_int(I x) {
    uint32_t r = 0;
    EACH r += uint32_t(x.v[i]);
    return int32_t(r);
}
INLINE I add_int(I x, I y) {
    EACH x.v[i] = int32_t(uint32_t(x.v[i]) + uint32_t(y.v[i]));
    return x;
}
INLINE I sub_int(I x, I y) {
    EACH x.v[i] = int32_t(uint32_t(x.v[i]) - uint32_t(y.v[i]));
    return x;
}
INLINE I shift_left_8(I x) {
    EACH x.v[i] = int32_t(uint32_t(x.v[i]) << 8);
    return x;
}
INLINE I shift_right_8(I x) {
    EACH x.v[i] = x.v[i] >> 8;
    return x;
}
INLINE void store_bytes(int8_t* p, I x) { EACH p[i] = int8_t(x.v[i] > 127 ? 127 : x.v[i] < -128 ? -128 : x.v[i]); }
INLINE F keep_first(F x, int count, F other) {
    EACH x.v[i] = i < count ? x.v[i] : other.v[i];
    return x;
}

INLINE W load_weights(const uint8_t* p) {
    W r;
    memcpy(r.v, p, 64);
    return r;
}
INLINE W load_nibbles(const uint8_t* p) { return load_weights(p); }
INLINE W low_nibbles(W x) {
    for (int i = 0; i < 64; i++) x.v[i] &= 15;
    return x;
}
INLINE W high_nibbles(W x) {
    for (int i = 0; i < 64; i++) x.v[i] >>= 4;
    return x;
}
INLINE I dot(I sum, W w, const int32_t* signed_bytes) {
    int8_t x[4];
    memcpy(x, signed_bytes, 4);
    EACH {
        const int32_t four = w.v[4 * i] * x[0] + w.v[4 * i + 1] * x[1] + w.v[4 * i + 2] * x[2] + w.v[4 * i + 3] * x[3];
        sum.v[i] = int32_t(uint32_t(sum.v[i]) + uint32_t(four));
    }
    return sum;
}
INLINE I dot_small(I sum, W w, const int32_t* signed_bytes) { return dot(sum, w, signed_bytes); }
INLINE void dot_both(I& sum0, I& sum1, W w0, W w1, const int32_t* signed_bytes) {
    sum0 = dot(sum0, w0, signed_bytes);
    sum1 = dot(sum1, w1, signed_bytes);
}
INLINE void dot_both_small(I& sum0, I& sum1, W w0, W w1, const int32_t* signed_bytes) {
    sum0 = dot_small(sum0, w0, signed_bytes);
    sum1 = dot_small(sum1, w1, signed_bytes);
}
// With bytes of the cache in place of weights.
INLINE I dot_cached(I sum, W w, const int32_t* signed_bytes) { return dot(sum, w, signed_bytes); }
INLINE void dot_both_cached(I& sum0, I& sum1, W w0, W w1, const int32_t* signed_bytes) {
    dot_both(sum0, sum1, w0, w1, signed_bytes);
}
INLINE void prefetch_far(const uint8_t*) {}
INLINE void prefetch(const uint8_t* p) { __builtin_prefetch(p); }
INLINE I or_words(I x, I y) {
    EACH x.v[i] |= y.v[i];
    return x;
}
INLINE I load_words(const uint8_t* p) {
    I r;
    memcpy(r.v, p, 64);
    return r;
}

INLINE float bf16_to_float(uint16_t h) {
    uint32_t bits = uint32_t(h) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
INLINE uint16_t float_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0;
    return uint16_t((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}
INLINE P load_pairs(const uint8_t* p) {
    P r;
    memcpy(r.v, p, 64);
    return r;
}
INLINE void store_bf16(uint16_t* p, F x) { EACH p[i] = float_to_bf16(x.v[i]); }
INLINE F dot_pairs(F sum, P a, uint32_t b) {
    const float low = bf16_to_float(uint16_t(b)), high = bf16_to_float(uint16_t(b >> 16));
    EACH {
        sum.v[i] += bf16_to_float(a.v[2 * i]) * low;
        sum.v[i] += bf16_to_float(a.v[2 * i + 1]) * high;
    }
    return sum;
}

#undef EACH
}  // namespace
