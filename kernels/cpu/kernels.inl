// The kernels, written once over the vectors of vec_*.h. Included by each isa_*.cpp, which sets MOTET_ISA.
//
// Every sum of floats runs in an order that depends on the row alone (its groups, its positions), never on the other rows
// of the batch, the split over threads or the size of a register block: so a row has the same bits in any batch.
#include <string.h>

#include "isa.h"

namespace {

using namespace motet;

// ---- elementwise ----------------------------------------------------------------------------------------------------

// 2^x for x ≤ 127; below -126 it stays at 2^-126. Relative error < 3e-7 (minimax polynomial of degree 6 on [-0.5, 0.5]).
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

void norm(const float* x, const float* weight, const float* bias, float eps, Norm kind, int64_t size, float* out) {
    if (kind == Norm::None) {
        memcpy(out, x, size_t(size) * sizeof(float));
        return;
    }
    F mean = zero();
    if (kind == Norm::Layer) {
        F total = zero();
        for (int64_t i = 0; i < size; i += kLanes) total = add(total, load(x + i));
        mean = bcast(reduce_add(total) / float(size));
    }
    F squares = zero();
    for (int64_t i = 0; i < size; i += kLanes) {
        F centred = sub(load(x + i), mean);
        squares = fma(centred, centred, squares);
    }
    F scale = bcast(1.0f / __builtin_sqrtf(reduce_add(squares) / float(size) + eps));
    for (int64_t i = 0; i < size; i += kLanes) {
        F y = mul(mul(sub(load(x + i), mean), scale), load(weight + i));
        store(out + i, bias ? add(y, load(bias + i)) : y);
    }
}

void scale_to(const float* x, float factor, int64_t size, float* out) {
    for (int64_t i = 0; i < size; i += kLanes) store(out + i, mul(load(x + i), bcast(factor)));
}

// Halves, not pairs: out[i] = x[i] cos - x[i + d/2] sin, out[i + d/2] = x[i + d/2] cos + x[i] sin.
void rotate(float* head, const float* cos, const float* sin, int head_size) {
    int half = head_size / 2, i = 0;
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

// ---- activations ----------------------------------------------------------------------------------------------------

// The largest |x|; NaN if there is NaN or infinity, so that the scale carries it on.
INLINE float peak_of(const float* x, int size) {
    F largest = zero(), bad = zero();
    for (int i = 0; i < size; i += kLanes) {
        F value = load(x + i);
        largest = vmax(largest, vabs(value));
        bad = fma(value, zero(), bad);
    }
    return reduce_max(largest) + reduce_add(bad);
}

void quantise_row(const float* x, Activations& out, int64_t row) {
    int block = 0;
    while (block + 1 < out.blocks && out.first_row(block + 1) <= row) block++;
    int64_t first = out.first_row(block);
    int rows = out.rows_of(block), r = int(row - first);
    if (out.dense) {
        float* to = out.dense + first * out.k + r;
        for (int64_t i = 0; i < out.k; i++) to[i * rows] = x[i];
        return;
    }
    int32_t* quads = out.quads + first * (out.k / 4) + r;
    float* scales = out.scales + first * out.groups + r;
    float* sums = out.sums + first * out.groups + r;
    int32_t* starts = out.starts + first * out.groups + r;
    for (int g = 0; g < out.groups; g++) {
        const float* from = x + int64_t(g) * out.group;
        float peak = peak_of(from, out.group);
        F inverse = bcast(peak > 0.0f ? 127.0f / peak : 0.0f);
        I total = bcast_int(0);
        for (int i = 0; i < out.group; i += kLanes) {
            I q = to_int(mul(load(from + i), inverse));
            total = add_int(total, q);
            int32_t four[4];
            store_bytes((int8_t*)four, q);
            int64_t at = (int64_t(g) * out.group + i) / 4;
            for (int j = 0; j < 4; j++) quads[(at + j) * rows] = four[j];
        }
        int32_t sum = reduce_add_int(total);
        scales[int64_t(g) * rows] = peak / 127.0f;
        sums[int64_t(g) * rows] = scales[int64_t(g) * rows] * float(sum);
        starts[int64_t(g) * rows] = -128 * sum;
    }
}

// ---- linear layers --------------------------------------------------------------------------------------------------

struct BlockInputs {  // of one register block
    const int32_t* quads;
    const float* scales;
    const float* sums;
    const int32_t* starts;
    const float* dense;
    const LowRank* const* low_rank;  // [rows] or null
    const float* inner;
};

// A x of a low-rank update.
void reduce(const float* x, const LowRank& update, int64_t k, float* inner) {
    for (int j = 0; j < update.rank; j++) {
        F sum = zero();
        for (int64_t i = 0; i < k; i += kLanes) sum = fma(load(x + i), load(update.a + j * k + i), sum);
        inner[j] = reduce_add(sum);
    }
}

template <class T>
INLINE T* at(T* array, int64_t index) {
    return array ? array + index : nullptr;
}

struct Prefetch {  // `lines` cache lines for each group of this panel
    const uint8_t* from;
    int lines;
};

// The sums over one panel [R][16] of R rows of a register block of `rows` rows: all of them, but for the path that is not
// unrolled. Accumulators stay in registers: compilers spill loops of intrinsics that are not unrolled, and only those over
// the rows are (a group is a loop of 16 values of k a turn).
template <int R>
INLINE void panel_8(const PackedLinear& w, const uint8_t* panel, const BlockInputs& x, Prefetch ahead, int rows, F (&sum)[R]) {
    const uint16_t* scales = (const uint16_t*)panel;
    const uint8_t* values = panel + w.values_offset;
    const int32_t* quads = x.quads;
    const int turns = w.group / 16;
    for (int g = 0; g < w.groups; g++) {
        I acc[R];
        MOTET_UNROLL
        for (int r = 0; r < R; r++) acc[r] = bcast_int(x.starts[g * rows + r]);
        for (int i = 0; i < ahead.lines; i++, ahead.from += 64) prefetch(ahead.from);
        for (int s = 0; s < turns; s++, values += 256, quads += 4 * rows) {
            MOTET_UNROLL
            for (int t = 0; t < 4; t++) {
                W b = load_weights(values + 64 * t);
                MOTET_UNROLL
                for (int r = 0; r < R; r++) acc[r] = dot(acc[r], b, quads + t * rows + r);
            }
        }
        F scale = load_half(scales + g * kLanes);
        MOTET_UNROLL
        for (int r = 0; r < R; r++) sum[r] = fma(mul(to_float(acc[r]), bcast(x.scales[g * rows + r])), scale, sum[r]);
    }
}

template <int R>
INLINE void panel_4(const PackedLinear& w, const uint8_t* panel, const BlockInputs& x, Prefetch ahead, int rows, F (&sum)[R]) {
    const uint16_t* scales = (const uint16_t*)panel;
    const uint16_t* minima = scales + w.groups * kLanes;
    const uint8_t* values = panel + w.values_offset;
    const int32_t* quads = x.quads;
    const int turns = w.group / 16;
    for (int g = 0; g < w.groups; g++) {
        I acc[R];
        MOTET_UNROLL
        for (int r = 0; r < R; r++) acc[r] = bcast_int(0);
        for (int i = 0; i < ahead.lines; i++, ahead.from += 64) prefetch(ahead.from);
        for (int s = 0; s < turns; s++, values += 128, quads += 4 * rows) {
            MOTET_UNROLL
            for (int t = 0; t < 2; t++) {
                W both = load_weights(values + 64 * t);
                W low = low_nibbles(both), high = high_nibbles(both);
                MOTET_UNROLL
                for (int r = 0; r < R; r++) acc[r] = dot_small(acc[r], low, quads + 2 * t * rows + r);
                MOTET_UNROLL
                for (int r = 0; r < R; r++) acc[r] = dot_small(acc[r], high, quads + (2 * t + 1) * rows + r);
            }
        }
        F scale = load_half(scales + g * kLanes), minimum = load_half(minima + g * kLanes);
        MOTET_UNROLL
        for (int r = 0; r < R; r++) {
            sum[r] = fma(mul(to_float(acc[r]), bcast(x.scales[g * rows + r])), scale, sum[r]);
            sum[r] = fma(bcast(x.sums[g * rows + r]), minimum, sum[r]);
        }
    }
}

template <int R>
INLINE void panel_32(const PackedLinear& w, const uint8_t* panel, const BlockInputs& x, int rows, F (&sum)[R]) {
    const float* values = (const float*)panel;
    for (int64_t i = 0; i < w.k; i++) {
        F b = load(values + i * kLanes);
        MOTET_UNROLL
        for (int r = 0; r < R; r++) sum[r] = fma(b, bcast(x.dense[i * rows + r]), sum[r]);
    }
}

template <int R>
__attribute__((noinline)) void panel_rows(const PackedLinear& w, const uint8_t* panel, const BlockInputs& x, Prefetch ahead, int rows,
                                          float (*out)[kLanes]) {
    F sum[R];
    MOTET_UNROLL
    for (int r = 0; r < R; r++) sum[r] = zero();
    if (w.bits == 8) panel_8<R>(w, panel, x, ahead, rows, sum);
    else if (w.bits == 4) panel_4<R>(w, panel, x, ahead, rows, sum);
    else panel_32<R>(w, panel, x, rows, sum);
    MOTET_UNROLL
    for (int r = 0; r < R; r++) store(out[r], sum[r]);
}

void panel_of_block(const PackedLinear& w, int64_t panel, const BlockInputs& x, Prefetch ahead, int rows, float (*out)[kLanes]) {
    const uint8_t* data = w.data + panel * w.panel_bytes;
#ifdef MOTET_ONE_ROW
    for (int r = 0; r < rows; r++)
        panel_rows<1>(w, data, {at(x.quads, r), at(x.scales, r), at(x.sums, r), at(x.starts, r), at(x.dense, r), nullptr, nullptr}, ahead, rows, out + r);
#else
    using Function = void (*)(const PackedLinear&, const uint8_t*, const BlockInputs&, Prefetch, int, float (*)[kLanes]);
    static constexpr Function kFunctions[kTile + 1] = {
        nullptr,       panel_rows<1>, panel_rows<2>, panel_rows<3>, panel_rows<4>,  panel_rows<5>,  panel_rows<6>,
        panel_rows<7>, panel_rows<8>, panel_rows<9>, panel_rows<10>, panel_rows<11>, panel_rows<12>,
    };
    kFunctions[rows](w, data, x, ahead, rows, out);
#endif
    F factor = bcast(w.factor), bias = w.bias ? load(w.bias + panel * kLanes) : zero();
    for (int r = 0; r < rows; r++) store(out[r], fma(load(out[r]), factor, bias));
    for (int r = 0; x.low_rank && r < rows; r++) {
        const LowRank* update = x.low_rank[r];
        if (!update) continue;
        const float *b = update->b + panel * update->rank * kLanes, *inner = x.inner + int64_t(r) * kMaxRank;
        F sum = zero();
        for (int j = 0; j < update->rank; j++) sum = fma(load(b + j * kLanes), bcast(inner[j]), sum);
        store(out[r], add(load(out[r]), sum));
    }
}

// SwiGLU: panels 2 · panel (gate) and 2 · panel + 1 (up) make one.
void block_of_rows(const PackedLinear& w, const BlockInputs& x, int64_t panel, Prefetch ahead, int rows, float* out, int64_t ld, Epilogue epilogue) {
    alignas(64) float sum[kTile][kLanes];
    if (epilogue == Epilogue::SwiGLU) {
        alignas(64) float gate[kTile][kLanes];
        panel_of_block(w, 2 * panel, x, ahead, rows, gate);
        ahead.from += int64_t(ahead.lines) * 64 * w.groups;
        panel_of_block(w, 2 * panel + 1, x, ahead, rows, sum);
        for (int r = 0; r < rows; r++) store(out + r * ld + panel * kLanes, mul(silu(load(gate[r])), load(sum[r])));
        return;
    }
    panel_of_block(w, panel, x, ahead, rows, sum);
    for (int r = 0; r < rows; r++) {
        float* to = out + r * ld + panel * kLanes;
        F y = load(sum[r]);
        if (epilogue == Epilogue::Add) y = add(load(to), y);
        if (epilogue == Epilogue::Gelu) y = gelu(y);
        store(to, y);
    }
}

// Panels panel0…panel1 over the register blocks block0…block1. While a panel is used the next one is fetched, a part with
// every block.
void linear(const PackedLinear& w, const Activations& x, int block0, int block1, int64_t panel0, int64_t panel1, float* out,
            int64_t ld, Epilogue epilogue) {
    const int steps = w.bits == 32 ? 1 : w.groups;
    const int64_t width = epilogue == Epilogue::SwiGLU ? 2 : 1;
    const int64_t lines_each = (w.panel_bytes * width + 63) / 64;
    const int visits = block1 - block0;
    const int lines = w.bits == 32 ? 0 : int((lines_each + visits * steps * width - 1) / (visits * steps * width));
    for (int64_t panel = panel0; panel < panel1; panel++) {
        const uint8_t* next = w.data + (panel + 1) * width * w.panel_bytes;
        for (int b = block0; b < block1; b++) {
            int64_t first = x.first_row(b);
            BlockInputs inputs = {
                at(x.quads, first * (x.k / 4)), at(x.scales, first * x.groups), at(x.sums, first * x.groups), at(x.starts, first * x.groups),
                at(x.dense, first * x.k),       at(x.low_rank, first),          at(x.inner, first * kMaxRank),
            };
            Prefetch ahead = {next, lines};
            block_of_rows(w, inputs, panel, ahead, x.rows_of(b), out + first * ld, ld, epilogue);
            next += int64_t(lines) * 64 * steps * width;
        }
    }
}

// ---- attention ------------------------------------------------------------------------------------------------------

INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0;
    return uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
}

void pack_query(const float* head, float scale, int head_size, uint32_t* packed, int stride) {
    for (int i = 0; i < head_size / 2; i++)
        packed[i * stride] = uint32_t(to_bf16(head[2 * i] * scale)) | uint32_t(to_bf16(head[2 * i + 1] * scale)) << 16;
}

INLINE float quantise_head(const float* x, int size, int8_t* q) {
    float peak = peak_of(x, size);
    F inverse = bcast(peak > 0.0f ? 127.0f / peak : 0.0f);
    for (int i = 0; i < size; i += kLanes) store_bytes(q + i, to_int(mul(load(x + i), inverse)));
    return peak / 127.0f;
}

// One position. The odd partner of an even position's values is cleared: it may hold anything, and 0 · NaN is not 0.
void write_kv(const CacheView& cache, int block, int offset, const float* k, const float* v) {
    const int d = cache.head_size, tile = offset / kLanes, lane = offset % kLanes, odd = offset & 1;
    uint8_t* data = cache.data + block * cache.block_bytes;
    if (cache.kind == KV::BF16) {
        uint16_t* keys = (uint16_t*)data + tile * d * kLanes + lane * 2;
        for (int i = 0; i < d; i += 2) {
            uint32_t pair = uint32_t(to_bf16(k[i])) | uint32_t(to_bf16(k[i + 1])) << 16;
            memcpy(keys + i * kLanes, &pair, 4);
        }
        uint32_t* values = (uint32_t*)(data + d * kBlock * 2) + (offset / 2) * d;
        for (int i = 0; i < d; i++) values[i] = odd ? (values[i] & 0xFFFFu) | uint32_t(to_bf16(v[i])) << 16 : to_bf16(v[i]);
        return;
    }
    int8_t q[kMaxHeadSize];
    float* scales = (float*)(data + d * kBlock * 2);
    scales[offset] = quantise_head(k, d, q);
    int8_t* keys = (int8_t*)data + tile * d * kLanes + lane * 2;
    for (int i = 0; i < d; i += 2) memcpy(keys + i * kLanes, q + i, 2);
    scales[kBlock + offset] = quantise_head(v, d, q);
    int8_t* values = (int8_t*)data + d * kBlock + (offset / 2) * d * 2;
    for (int i = 0; i < d; i++) {
        values[2 * i + odd] = q[i];
        if (!odd) values[2 * i + 1] = 0;
    }
    if (!odd) scales[kBlock + offset + 1] = 0.0f;
}

// The blocks of a partition as bf16: where they lie, or widened into `scratch` (kPartitionBytes).
void load_partition(const CacheView& cache, const int32_t* blocks, int partition, int positions, uint8_t* scratch, PartitionView& out) {
    const int d = cache.head_size, half = d * kBlock * 2;  // bytes of K or V of a block as bf16
    for (int b = 0; b * kBlock < positions; b++) {
        const uint8_t* data = cache.data + blocks[partition * kPartitionBlocks + b] * cache.block_bytes;
        if (cache.kind == KV::BF16) {
            out.keys[b] = data;
            out.values[b] = data + half;
            continue;
        }
        uint8_t* wide = scratch + int64_t(b) * 2 * half;
        for (int i = 0; i < half; i += 32) store_pairs(wide + 2 * i, widen_pairs((const int8_t*)data + i));
        out.keys[b] = wide;
        out.values[b] = wide + half;
        out.key_scales[b] = (const float*)(data + half);
        out.value_scales[b] = out.key_scales[b] + kBlock;
    }
}

template <int Q>
INLINE void block_scores(const AttendArgs& a, const uint8_t* keys, const float* scales, float (*scores)[kPartition]) {
    const int d = a.head_size;
    F acc[2][Q];
    MOTET_UNROLL
    for (int q = 0; q < Q; q++) acc[0][q] = acc[1][q] = zero();
    for (int i = 0; i < d / 2; i++) {
        P k0 = load_pairs(keys + i * 64), k1 = load_pairs(keys + d * 32 + i * 64);
        MOTET_UNROLL
        for (int q = 0; q < Q; q++) {
            uint32_t pair = a.packed[i * Q + q];
            acc[0][q] = dot_pairs(acc[0][q], k0, pair);
            acc[1][q] = dot_pairs(acc[1][q], k1, pair);
        }
    }
    MOTET_UNROLL
    for (int q = 0; q < Q; q++) {
        store(scores[q], scales ? mul(acc[0][q], load(scales)) : acc[0][q]);
        store(scores[q] + kLanes, scales ? mul(acc[1][q], load(scales + kLanes)) : acc[1][q]);
    }
}

template <int Q, int N>  // N vectors of the head
INLINE void weighted_values(const AttendArgs& a, int pairs, const uint32_t (*probs)[kPartition / 2], int first) {
    const int d = a.head_size;
    F acc[Q][N];
    MOTET_UNROLL
    for (int q = 0; q < Q; q++)
        MOTET_UNROLL
        for (int n = 0; n < N; n++) acc[q][n] = zero();
    for (int p = 0; p < pairs; p++) {
        const uint8_t* row = a.kv.values[p / (kBlock / 2)] + (p % (kBlock / 2)) * d * 4 + first * 4;
        P v[N];
        MOTET_UNROLL
        for (int n = 0; n < N; n++) v[n] = load_pairs(row + 64 * n);
        MOTET_UNROLL
        for (int q = 0; q < Q; q++)
            MOTET_UNROLL
            for (int n = 0; n < N; n++) acc[q][n] = dot_pairs(acc[q][n], v[n], probs[q][p]);
    }
    MOTET_UNROLL
    for (int q = 0; q < Q; q++)
        MOTET_UNROLL
        for (int n = 0; n < N; n++) store(a.out + q * d + first + n * kLanes, acc[q][n]);
}

template <int Q>
void attend_rows(const AttendArgs& a) {
    const int d = a.head_size;
    int longest = 0;
    for (int q = 0; q < Q; q++) longest = a.seen[q] > longest ? a.seen[q] : longest;
    longest = longest < kPartition ? longest : kPartition;
    const int blocks = (longest + kBlock - 1) / kBlock;
    alignas(64) float scores[Q][kPartition];
    alignas(64) uint32_t probs[Q][kPartition / 2];
    for (int b = 0; b < blocks; b++)
        block_scores<Q>(a, a.kv.keys[b], a.kv.key_scales[b], (float (*)[kPartition])(&scores[0][b * kBlock]));
    for (int q = 0; q < Q; q++) {
        const F nothing = bcast(-__builtin_inff());
        F largest = nothing;
        for (int t = 0; t < blocks * 2; t++)
            largest = vmax(largest, keep_first(load(&scores[q][t * kLanes]), a.seen[q] - t * kLanes, nothing));
        const float peak = reduce_max(largest);
        F total = zero();
        for (int t = 0; t < blocks * 2; t++) {
            const int seen = a.seen[q] - t * kLanes;
            F p = keep_first(exp2_vec(sub(load(&scores[q][t * kLanes]), bcast(peak))), seen, zero());
            total = add(total, p);
            const float* scales = a.kv.value_scales[t / 2];
            if (scales) p = keep_first(mul(p, load(scales + (t % 2) * kLanes)), seen, zero());
            store_bf16((uint16_t*)&probs[q][t * kLanes / 2], p);
        }
        a.maxima[q] = peak;
        a.sums[q] = reduce_add(total);
    }
    const int pairs = (longest + 1) / 2;
    int first = 0;
    for (; first + 4 * kLanes <= d; first += 4 * kLanes) weighted_values<Q, 4>(a, pairs, probs, first);
    for (; first < d; first += kLanes) weighted_values<Q, 1>(a, pairs, probs, first);
}

void attend(const AttendArgs& a) {
    switch (a.queries) {
        case 1: return attend_rows<1>(a);
        case 2: return attend_rows<2>(a);
        case 3: return attend_rows<3>(a);
        case 4: return attend_rows<4>(a);
        case 5: return attend_rows<5>(a);
        case 6: return attend_rows<6>(a);
    }
}

void merge(float* max, float* sum, float* out, float max2, float sum2, const float* out2, int head_size) {
    if (max2 == -__builtin_inff()) return;
    const float larger = *max > max2 ? *max : max2;
    const float a = exp2_one(*max - larger), b = exp2_one(max2 - larger);
    *max = larger;
    *sum = *sum * a + sum2 * b;
    for (int i = 0; i < head_size; i += kLanes) store(out + i, fma(load(out + i), bcast(a), mul(load(out2 + i), bcast(b))));
}

// ---- probes ---------------------------------------------------------------------------------------------------------

int64_t dot_probe(int64_t iterations) {
    alignas(64) uint8_t bytes[64];
    memset(bytes, 3, sizeof bytes);
    const int32_t x = 0x01020304;
    W w = load_weights(bytes);
    I acc[16];
    MOTET_UNROLL
    for (int r = 0; r < 16; r++) acc[r] = bcast_int(int32_t(iterations));
    for (int64_t i = 0; i < iterations; i++) {
        MOTET_UNROLL
        for (int r = 0; r < 16; r++) acc[r] = dot(acc[r], w, &x);
    }
    MOTET_UNROLL
    for (int r = 1; r < 16; r++) acc[0] = add_int(acc[0], acc[r]);
    volatile int32_t keep = reduce_add_int(acc[0]);
    (void)keep;
    return iterations * 16 * 64;
}

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
        MOTET_ISA_NAME, linear, quantise_row, reduce, norm, rotate, pack_query, write_kv, load_partition, attend, merge, scale_to, dot_probe, read_probe,
    };
    return &isa;
}

}  // namespace motet

#ifdef MOTET_TARGET_END
MOTET_TARGET_END
#endif
