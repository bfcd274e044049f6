// Attention over the paged cache. Included by kernels.inl.
//
// Each partition of 128 positions has its own softmax; partitions are merged in order. A query's result depends only on
// the positions that it sees.

INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0;
    return uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
}

void pack_query_bf16(const float* head, float scale, int head_size, uint32_t* packed, int stride) {
    for (int i = 0; i < head_size / 2; i++)
        packed[i * stride] = uint32_t(to_bf16(head[2 * i] * scale)) | uint32_t(to_bf16(head[2 * i + 1] * scale)) << 16;
}

INLINE float quantise_head(const float* x, int size, int8_t* q) {
    float peak = peak_of(x, size);
    F inverse = bcast(inverse_step(127.0f, peak));
    for (int i = 0; i < size; i += kLanes) store_bytes(q + i, to_int(mul(load(x + i), inverse)));
    return peak / 127.0f;
}

// Writes one position of the int8 cache; bytes are unsigned, value + 128.
INLINE void write_int8(uint8_t* data, int d, int offset, const float* k, const float* v) {
    int8_t q[kMaxHeadSize];
    float* scales = (float*)(data + d * kBlock * 2);
    scales[offset] = quantise_head(k, d, q);
    uint8_t* keys = data + offset / kLanes * d * kLanes + offset % kLanes * 4;
    for (int i = 0; i < d; i++) keys[i / 4 * 64 + i % 4] = uint8_t(q[i] ^ -128);
    scales[kBlock + offset] = quantise_head(v, d, q);
    uint8_t* values = data + d * kBlock + offset / 4 * d * 4 + offset % 4;
    for (int i = 0; i < d; i++) values[i * 4] = uint8_t(q[i] ^ -128);
}

// Writes one position of the bf16 cache. At an even position, the values of the odd one beside it are cleared: they
// could be NaN, and 0 · NaN is not 0.
INLINE void write_bf16(uint8_t* data, int d, int offset, const float* k, const float* v) {
    const int odd = offset & 1;
    uint16_t* keys = (uint16_t*)data + offset / kLanes * d * kLanes + offset % kLanes * 2;
    for (int i = 0; i < d; i += 2) {
        uint32_t pair = uint32_t(to_bf16(k[i])) | uint32_t(to_bf16(k[i + 1])) << 16;
        memcpy(keys + i * kLanes, &pair, 4);
    }
    uint32_t* values = (uint32_t*)(data + d * kBlock * 2) + (offset / 2) * d;
    for (int i = 0; i < d; i++) values[i] = odd ? (values[i] & 0xFFFFu) | uint32_t(to_bf16(v[i])) << 16 : to_bf16(v[i]);
}

void write_kv(const CacheView& cache, int block, int offset, const float* k, const float* v) {
    uint8_t* data = cache.data + block * cache.block_bytes;
    if (cache.kind == KV::BF16)
        write_bf16(data, cache.head_size, offset, k, v);
    else
        write_int8(data, cache.head_size, offset, k, v);
}

// ---- bf16 -----------------------------------------------------------------------------------------------------------

template <int Q>
INLINE void scores_bf16(const AttendArgs& a, const uint8_t* keys, float (*scores)[kPartition]) {
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
        store(scores[q], acc[0][q]);
        store(scores[q] + kLanes, acc[1][q]);
    }
}

template <int Q, int N>  // N vectors of the head
INLINE void values_bf16(const AttendArgs& a, int pairs, const uint32_t (*probs)[kPartition / 2], int first) {
    const int d = a.head_size;
    F acc[Q][N];
    MOTET_UNROLL
    for (int q = 0; q < Q; q++) MOTET_UNROLL
    for (int n = 0; n < N; n++) acc[q][n] = zero();
    for (int p = 0; p < pairs; p++) {
        const uint8_t* row = a.block(p / (kBlock / 2)) + d * kBlock * 2 + (p % (kBlock / 2)) * d * 4 + first * 4;
        P v[N];
        MOTET_UNROLL
        for (int n = 0; n < N; n++) v[n] = load_pairs(row + 64 * n);
        MOTET_UNROLL
        for (int q = 0; q < Q; q++) MOTET_UNROLL
        for (int n = 0; n < N; n++) acc[q][n] = dot_pairs(acc[q][n], v[n], probs[q][p]);
    }
    MOTET_UNROLL
    for (int q = 0; q < Q; q++) MOTET_UNROLL
    for (int n = 0; n < N; n++) store(a.out + q * d + first + n * kLanes, acc[q][n]);
}

// The numbers x of tile t at positions that query q sees, and `other` at the rest.
INLINE F keep_seen(const AttendArgs& a, int q, int t, F x, F other) {
    const int seen = a.seen[q] - t * kLanes, unseen = a.unseen[q] - t * kLanes;
    x = keep_first(x, seen, other);
    return unseen > 0 ? keep_first(other, unseen, x) : x;
}

// The largest score of a query among the positions that it sees.
INLINE float peak_score(const AttendArgs& a, int q, const float* scores, int tiles) {
    const F nothing = bcast(-__builtin_inff());
    F largest = nothing;
    for (int t = 0; t < tiles; t++) largest = vmax(largest, keep_seen(a, q, t, load(scores + t * kLanes), nothing));
    return reduce_max(largest);
}

// Soft cap of the first tiles of 16 scores of each query, in place.
INLINE void cap_scores(const AttendArgs& a, int tiles, float (*scores)[kPartition]) {
    if (a.cap == 0.0f) return;
    for (int q = 0; q < a.queries; q++)
        for (int t = 0; t < tiles; t++) store(scores[q] + t * kLanes, capped(load(scores[q] + t * kLanes), a.cap));
}

template <int Q>
void attend_bf16(const AttendArgs& a) {
    const int d = a.head_size, longest = a.longest(), blocks = (longest + kBlock - 1) / kBlock;
    alignas(64) float scores[Q][kPartition];
    alignas(64) uint32_t probs[Q][kPartition / 2];
    for (int b = 0; b < blocks; b++) scores_bf16<Q>(a, a.block(b), (float (*)[kPartition])(&scores[0][b * kBlock]));
    cap_scores(a, blocks * 2, scores);
    for (int q = 0; q < Q; q++) {
        const float peak = peak_score(a, q, scores[q], blocks * 2);
        F total = zero();
        for (int t = 0; t < blocks * 2; t++) {
            F p = keep_seen(a, q, t, exp2_vec(sub(load(&scores[q][t * kLanes]), bcast(peak))), zero());
            total = add(total, p);
            store_bf16((uint16_t*)&probs[q][t * kLanes / 2], p);
        }
        a.maxima[q] = peak;
        a.sums[q] = reduce_add(total);
    }
    const int pairs = (longest + 1) / 2;
    int first = 0;
    for (; first + 4 * kLanes <= d; first += 4 * kLanes) values_bf16<Q, 4>(a, pairs, probs, first);
    for (; first < d; first += kLanes) values_bf16<Q, 1>(a, pairs, probs, first);
}

// ---- int8 -----------------------------------------------------------------------------------------------------------
//
// Queries and probabilities have 16 bits, as a high and a low byte, so that all sums are exact.

constexpr float kSteps = 32512.0f;  // 127 · 256: the largest magnitude whose high byte fits

INLINE I high_byte(I x) { return shift_right_8(add_int(x, bcast_int(128))); }
INLINE I low_byte(I x, I high) { return sub_int(x, shift_left_8(high)); }

void pack_query_int8(const float* head, float scale, int d, uint32_t* packed, int stride, float* step, int32_t* start) {
    const float peak = peak_of(head, d);
    const F inverse = bcast(inverse_step(kSteps, peak));
    I total = bcast_int(0);
    for (int i = 0; i < d; i += kLanes) {
        const I x = to_int(mul(load(head + i), inverse)), high = high_byte(x);
        total = add_int(total, x);
        int32_t quads[2][4];
        store_bytes((int8_t*)quads[0], high);
        store_bytes((int8_t*)quads[1], low_byte(x, high));
        for (int j = 0; j < 4; j++) {
            packed[(i / 4 + j) * stride] = uint32_t(quads[0][j]);
            packed[(d / 4 + i / 4 + j) * stride] = uint32_t(quads[1][j]);
        }
    }
    *step = peak * scale / kSteps;
    *start = int32_t(uint32_t(kZeroPoint) * uint32_t(reduce_add_int(total)));
}

INLINE F combine(I high, I low, int32_t start, float step) {
    return mul(to_float(sub_int(add_int(shift_left_8(high), low), bcast_int(start))), bcast(step));
}

// The blocks that are attended to next are prefetched meanwhile: keys and scales in scores_int8, values in values_int8.
// Prefetches are spread over all of the work, because a core stalls if too many lines are in flight.
INLINE void fetch(const uint8_t* from, int bytes) {
    for (int at = 0; at < bytes; at += 64) prefetch_far(from + at);
}

// Scales, and keys of blocks that no block of this partition fetches: the next partition may have more.
INLINE void fetch_rest(const AttendArgs& a, int blocks) {
    const int d = a.head_size;
    for (int b = 0; b < kPartitionBlocks; b++) {
        if (!a.ahead[b]) continue;
        fetch(a.ahead[b] + d * kBlock * 2, 2 * kBlock * 4);
        if (b >= blocks) fetch(a.ahead[b], d * kBlock);
    }
}

INLINE void fetch_values(const AttendArgs& a, int quad) {
    const int d = a.head_size, b = quad / (kBlock / 4);
    if (a.ahead[b]) fetch(a.ahead[b] + d * kBlock + quad % (kBlock / 4) * d * 4, d * 4);
}

template <int Q>
INLINE void scores_int8(const AttendArgs& a, const uint8_t* keys, const uint8_t* ahead, float (*scores)[kPartition]) {
    const int d = a.head_size;
    const int32_t *high_quads = (const int32_t*)a.packed, *low_quads = high_quads + d / 4 * Q;
    I high[Q][2], low[Q][2];
    MOTET_UNROLL
    for (int q = 0; q < Q; q++) high[q][0] = high[q][1] = low[q][0] = low[q][1] = bcast_int(0);
    for (int i = 0; i < d / 4; i++) {
        W k0 = load_weights(keys + i * 64), k1 = load_weights(keys + d * kLanes + i * 64);
        if (ahead) {
            prefetch_far(ahead + i * 64);
            prefetch_far(ahead + d * kLanes + i * 64);
        }
        MOTET_UNROLL
        for (int q = 0; q < Q; q++) {
            dot_both_cached(high[q][0], high[q][1], k0, k1, high_quads + i * Q + q);
            dot_both_cached(low[q][0], low[q][1], k0, k1, low_quads + i * Q + q);
        }
    }
    const float* scales = (const float*)(keys + d * kBlock * 2);
    MOTET_UNROLL
    for (int q = 0; q < Q; q++) {
        store(scores[q], mul(combine(high[q][0], low[q][0], a.starts[q], a.steps[q]), load(scales)));
        store(scores[q] + kLanes, mul(combine(high[q][1], low[q][1], a.starts[q], a.steps[q]), load(scales + kLanes)));
    }
}

struct Weights16 {  // a query's weights over a partition: probability · scale of the value
    alignas(64) int8_t high[kPartition], low[kPartition];
    float step;
    int32_t start;
};

// Softmax of a query's scores. It overwrites the scores.
INLINE void softmax_int8(const AttendArgs& a, int q, int tiles, float* scores, Weights16& out) {
    const float peak = peak_score(a, q, scores, tiles);
    F total = zero(), largest = zero();
    for (int t = 0; t < tiles; t++) {
        const float* scales = (const float*)(a.block(t / 2) + a.head_size * kBlock * 2) + kBlock + t % 2 * kLanes;
        const F p = keep_seen(a, q, t, exp2_vec(sub(load(scores + t * kLanes), bcast(peak))), zero());
        const F weight = keep_seen(a, q, t, mul(p, load(scales)), zero());
        total = add(total, p);
        largest = vmax(largest, weight);
        store(scores + t * kLanes, weight);
    }
    const float most = reduce_max(largest);
    const F inverse = bcast(inverse_step(kSteps, most));
    I sum = bcast_int(0);
    for (int t = 0; t < tiles; t++) {
        const I x = to_int(mul(load(scores + t * kLanes), inverse)), high = high_byte(x);
        sum = add_int(sum, x);
        store_bytes(out.high + t * kLanes, high);
        store_bytes(out.low + t * kLanes, low_byte(x, high));
    }
    out.step = most / kSteps;
    out.start = int32_t(uint32_t(kZeroPoint) * uint32_t(reduce_add_int(sum)));
    a.maxima[q] = peak;
    a.sums[q] = reduce_add(total);
}

template <int Q, int N>  // N pairs of vectors of the head
INLINE void values_int8(const AttendArgs& a, int quads, const Weights16* weights, int first) {
    const int d = a.head_size;
    I high[Q][N][2], low[Q][N][2];
    MOTET_UNROLL
    for (int q = 0; q < Q; q++) MOTET_UNROLL
    for (int n = 0; n < N; n++) high[q][n][0] = high[q][n][1] = low[q][n][0] = low[q][n][1] = bcast_int(0);
    for (int p = 0; p < quads; p++) {
        const uint8_t* row = a.block(p / (kBlock / 4)) + d * kBlock + p % (kBlock / 4) * d * 4 + first * 4;
        if (first == 0) fetch_values(a, p);
        MOTET_UNROLL
        for (int n = 0; n < N; n++) {
            W v0 = load_weights(row + 128 * n), v1 = load_weights(row + 128 * n + 64);
            MOTET_UNROLL
            for (int q = 0; q < Q; q++) {
                dot_both_cached(high[q][n][0], high[q][n][1], v0, v1, (const int32_t*)(weights[q].high + 4 * p));
                dot_both_cached(low[q][n][0], low[q][n][1], v0, v1, (const int32_t*)(weights[q].low + 4 * p));
            }
        }
    }
    MOTET_UNROLL
    for (int q = 0; q < Q; q++) MOTET_UNROLL
    for (int n = 0; n < N; n++)
        for (int half = 0; half < 2; half++)
            store(a.out + q * d + first + (2 * n + half) * kLanes,
                  combine(high[q][n][half], low[q][n][half], weights[q].start, weights[q].step));
}

// The last 16 of a head whose size is an odd multiple of 16.
template <int Q>
INLINE void values_int8_single(const AttendArgs& a, int quads, const Weights16* weights, int first) {
    const int d = a.head_size;
    for (int q = 0; q < Q; q++) {
        I high = bcast_int(0), low = bcast_int(0);
        for (int p = 0; p < quads; p++) {
            W v = load_weights(a.block(p / (kBlock / 4)) + d * kBlock + p % (kBlock / 4) * d * 4 + first * 4);
            high = dot_cached(high, v, (const int32_t*)(weights[q].high + 4 * p));
            low = dot_cached(low, v, (const int32_t*)(weights[q].low + 4 * p));
        }
        store(a.out + q * d + first, combine(high, low, weights[q].start, weights[q].step));
    }
}

template <int Q>
void attend_int8(const AttendArgs& a) {
    const int d = a.head_size, longest = a.longest(), blocks = (longest + kBlock - 1) / kBlock,
              quads = (longest + 3) / 4;
    alignas(64) float scores[Q][kPartition];
    Weights16 weights[Q];
    for (int b = 0; b < blocks; b++)
        scores_int8<Q>(a, a.block(b), a.ahead[b], (float (*)[kPartition])(&scores[0][b * kBlock]));
    fetch_rest(a, blocks);
    cap_scores(a, blocks * 2, scores);
    for (int q = 0; q < Q; q++) softmax_int8(a, q, blocks * 2, scores[q], weights[q]);
    constexpr int kWide = Q <= 3 ? 2 : 1;  // as many as the registers hold
    int first = 0;
    for (; first + kWide * 2 * kLanes <= d; first += kWide * 2 * kLanes)
        values_int8<Q, kWide>(a, quads, weights, first);
    for (; first + 2 * kLanes <= d; first += 2 * kLanes) values_int8<Q, 1>(a, quads, weights, first);
    if (first < d) values_int8_single<Q>(a, quads, weights, first);
    for (int p = quads; p < kPartition / 4; p++) fetch_values(a, p);
}

template <int Q>
void attend_queries(const AttendArgs& a) {
    if (a.queries == Q)
        a.kv.kind == KV::BF16 ? attend_bf16<Q>(a) : attend_int8<Q>(a);
    else if constexpr (Q > 1)
        attend_queries<Q - 1>(a);
}

void attend(const AttendArgs& a) { attend_queries<kMaxQueries>(a); }

void pack_query(KV kind, const float* head, float scale, int head_size, uint32_t* packed, int stride, float* step,
                int32_t* start) {
    if (kind == KV::BF16)
        pack_query_bf16(head, scale, head_size, packed, stride);
    else
        pack_query_int8(head, scale, head_size, packed, stride, step, start);
}

void merge(float* max, float* sum, float* out, float max2, float sum2, const float* out2, int head_size) {
    if (max2 == -__builtin_inff()) return;
    if (*max == -__builtin_inff()) {  // the row sees nothing of the first part: the result is the later one
        *max = max2;
        *sum = sum2;
        memcpy(out, out2, size_t(head_size) * sizeof(float));
        return;
    }
    const float larger = *max > max2 ? *max : max2;
    const float a = exp2_one(*max - larger), b = exp2_one(max2 - larger);
    *max = larger;
    *sum = *sum * a + sum2 * b;
    for (int i = 0; i < head_size; i += kLanes)
        store(out + i, fma(load(out + i), bcast(a), mul(load(out2 + i), bcast(b))));
}
