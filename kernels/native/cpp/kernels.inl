// The kernels, written once with the vectors of vec_*.h. Included by each isa_*.cpp, which sets MOTET_ISA.
//
// The order of every sum of floats depends only on the row (its groups, its positions), never on the other rows of the
// batch, the threads or the size of a register block: so a row has the same bits in any batch.
#include <string.h>

#include "isa.h"

namespace {

using namespace motet;

// ---- elementwise ----------------------------------------------------------------------------------------------------

// 2^x, with x clamped to [-126, 127]. Relative error < 3e-7 (minimax polynomial of degree 6 on [-0.5, 0.5]).
INLINE F exp2_vec(F x) {
    x = vmax(vmin(x, bcast(127.0f)), bcast(-126.0f));
    F whole = round_near(x);
    F f = sub(x, whole);
    F p = bcast(1.5403530e-4f);
    p = fma(p, f, bcast(1.3333558e-3f));
    p = fma(p, f, bcast(9.6181291e-3f));
    p = fma(p, f, bcast(5.5504109e-2f));
    p = fma(p, f, bcast(2.4022651e-1f));
    p = fma(p, f, bcast(6.9314718e-1f));
    p = fma(p, f, bcast(1.0f));
    return mul(p, pow2(whole));
}

INLINE float exp2_one(float x) {
    float lanes[16];
    store(lanes, exp2_vec(bcast(x)));
    return lanes[0];
}

constexpr float kLog2e = 1.44269504f;

INLINE F silu(F x) { return div(x, add(bcast(1.0f), exp2_vec(mul(x, bcast(-kLog2e))))); }

// The tanh approximation: x · sigmoid(2 · sqrt(2/π) · (x + 0.044715 x³)).
INLINE F gelu(F x) {
    F inner = mul(x, fma(mul(x, x), bcast(0.044715f), bcast(1.0f)));
    return div(x, add(bcast(1.0f), exp2_vec(mul(inner, bcast(-2.0f * 0.79788456f * kLog2e)))));
}

// x · Φ(x), with Φ(-|x|) = ½ erfc(|x| / √2) to 1e-7 (Abramowitz and Stegun 1964, 7.1.26).
INLINE F gelu_erf(F x) {
    const F size = vabs(x), t = div(bcast(1.0f), fma(size, bcast(0.3275911f * 0.70710678f), bcast(1.0f)));
    F p = bcast(1.061405429f);
    p = fma(p, t, bcast(-1.453152027f));
    p = fma(p, t, bcast(1.421413741f));
    p = fma(p, t, bcast(-0.284496736f));
    p = fma(p, t, bcast(0.254829592f));
    const F tail = mul(mul(p, t), mul(bcast(0.5f), exp2_vec(mul(mul(x, x), bcast(-0.5f * kLog2e)))));
    return sub(vmax(x, zero()), mul(size, tail));
}

// c · tanh(x / c); NaN for NaN and infinities.
INLINE F capped(F x, float cap) {
    F e = exp2_vec(mul(x, bcast(2.0f * kLog2e / cap)));
    F y = sub(bcast(cap), div(bcast(2.0f * cap), add(e, bcast(1.0f))));
    return fma(x, zero(), y);
}

void softcap(float* x, int64_t size, float scale, float cap) {
    for (int64_t i = 0; i < size; i += kLanes) {
        F value = mul(load(x + i), bcast(scale));
        store(x + i, cap > 0.0f ? capped(value, cap) : value);
    }
}

NormStats norm_stats(const float* x, float eps, Norm kind, int64_t size) {
    NormStats stats;
    if (kind == Norm::None) return stats;
    F mean = zero();
    if (kind == Norm::Layer) {
        F total = zero();
        for (int64_t i = 0; i < size; i += kLanes) total = add(total, load(x + i));
        stats.mean = reduce_add(total) / float(size);
        mean = bcast(stats.mean);
    }
    F squares = zero();
    for (int64_t i = 0; i < size; i += kLanes) {
        F centred = sub(load(x + i), mean);
        squares = fma(centred, centred, squares);
    }
    stats.scale = 1.0f / __builtin_sqrtf(reduce_add(squares) / float(size) + eps);
    return stats;
}

INLINE F normed(const float* x, const NormArgs& n, NormStats stats, int64_t i) {
    F value = load(x + i);
    if (n.kind == Norm::None) return value;
    F y = mul(mul(sub(value, bcast(stats.mean)), bcast(stats.scale)), load(n.weight + i));
    return n.bias ? add(y, load(n.bias + i)) : y;
}

void norm(const float* x, const NormArgs& n, NormStats stats, int64_t first, int64_t size, float* out) {
    for (int64_t i = first; i < first + size; i += kLanes) store(out + i, normed(x, n, stats, i));
}

void scale_to(const float* x, float factor, int64_t size, float* out) {
    for (int64_t i = 0; i < size; i += kLanes) store(out + i, mul(load(x + i), bcast(factor)));
}

// With d = size, channel i is paired with i + d/2: out[i] = x[i] cos - x[i + d/2] sin, out[i + d/2] = x[i + d/2] cos +
// x[i] sin.
void rotate(float* head, const float* cos, const float* sin, int size) {
    int half = size / 2, i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        F a = load(head + i), b = load(head + half + i), c = load(cos + i), s = load(sin + i);
        store(head + i, sub(mul(a, c), mul(b, s)));
        store(head + half + i, add(mul(b, c), mul(a, s)));
    }
    for (; i < half; i++) {
        float a = head[i], b = head[half + i];
        float ac = a * cos[i], bs = b * sin[i], bc = b * cos[i], as = a * sin[i];
        head[i] = ac - bs;
        head[half + i] = bc + as;
    }
}

#include "linear.inl"

#include "attention.inl"

#include "sample.inl"

#ifdef MOTET_TILES
#include "tiles.inl"
#endif

// ---- probes ---------------------------------------------------------------------------------------------------------

#ifndef MOTET_TILES
int64_t dot_probe(int64_t iterations) {
    alignas(64) uint8_t bytes[64];
    memset(bytes, 3, sizeof bytes);
    int32_t x[16] = {0x01020304};
    W w = load_weights(bytes);
    I acc[16];
    MOTET_UNROLL
    for (int r = 0; r < 16; r++) acc[r] = bcast_int(int32_t(iterations));
    for (int64_t i = 0; i < iterations; i++) {
        MOTET_UNROLL
        for (int r = 0; r < 16; r++) acc[r] = dot(acc[r], w, x + r);
        __asm__ volatile("" : "+m"(x));  // other numbers each time, as far as the compiler knows
    }
    MOTET_UNROLL
    for (int r = 1; r < 16; r++) acc[0] = add_int(acc[0], acc[r]);
    volatile int32_t keep = reduce_add_int(acc[0]);
    (void)keep;
    return iterations * 16 * 64;
}
#endif

uint64_t read_probe(const uint8_t* data, int64_t size) {
    I acc[4] = {bcast_int(0), bcast_int(0), bcast_int(0), bcast_int(0)};
    for (int64_t i = 0; i + 256 <= size; i += 256) {
        prefetch(data + i + 4096);
        prefetch(data + i + 4160);
        prefetch(data + i + 4224);
        prefetch(data + i + 4288);
        MOTET_UNROLL
        for (int j = 0; j < 4; j++) acc[j] = or_words(acc[j], load_words(data + i + 64 * j));
    }
    return uint64_t(uint32_t(reduce_add_int(or_words(or_words(acc[0], acc[1]), or_words(acc[2], acc[3])))));
}

}  // namespace

namespace motet {

const Isa* MOTET_ISA() {
    static const Isa isa = {
        MOTET_ISA_NAME,
#ifdef MOTET_TILES
        true,           leave_tiles,
        linear_tiles,
#else
        false,          nullptr,
        linear,
#endif
        norm_stats,     norm,
        quantise,       round_groups,
        reduce,         rotate,
        pack_query,     write_kv,
#ifdef MOTET_TILES
        attend_tiles,
#else
        attend,
#endif
        merge,          scale_to,
        softcap,        dot_probe,
        read_probe,     {block_maxima, largest_double, narrow, mix_logits, mix_probs, exp_sum, collect, draw},
    };
    return &isa;
}

}  // namespace motet

#ifdef MOTET_TARGET_END
MOTET_TARGET_END
#endif
