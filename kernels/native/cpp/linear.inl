// 8-bit activations and linear layers. Included by kernels.inl.

// ---- activations ----------------------------------------------------------------------------------------------------

// The largest |x|. NaN if x has a NaN or infinity, so that the scale is NaN too.
INLINE float peak_of(const float* x, int size) {
    F largest = zero(), bad = zero();
    for (int i = 0; i < size; i += kLanes) {
        F value = load(x + i);
        largest = vmax(largest, vabs(value));
        bad = fma(value, zero(), bad);
    }
    return reduce_max(largest) + reduce_add(bad);
}

// Steps per unit, where the largest magnitude has so many. Numbers too small for a finite result count as zeros.
INLINE float inverse_step(float steps, float peak) { return peak >= 1e-30f ? steps / peak : 0.0f; }

void quantise(const float* x, const NormArgs& n, NormStats stats, int64_t first, int64_t size, Activations& out,
              int64_t row) {
    const int block = out.block_of(row), rows = out.rows_of(block);
    const int64_t base = out.first_row(block), r = row - base;
    if (out.dense) {
        float values[kLanes];
        for (int64_t i = first; i < first + size; i += kLanes) {
            store(values, normed(x, n, stats, i));
            for (int j = 0; j < kLanes; j++) out.dense[base * out.k + (i + j) * rows + r] = values[j];
        }
        return;
    }
    int32_t* quads = out.quads + base * (out.k / 4) + r;
    const int64_t at = out.first_stored_row(block) * out.groups + r;
    float values[128];
    for (int64_t i = first; i < first + size; i += out.group) {
        for (int j = 0; j < out.group; j += kLanes) store(values + j, normed(x, n, stats, i + j));
        const float peak = peak_of(values, out.group);
        F inverse = bcast(inverse_step(127.0f, peak));
        I total = bcast_int(0);
        for (int j = 0; j < out.group; j += kLanes) {
            I q = to_int(mul(load(values + j), inverse));
            total = add_int(total, q);
            int32_t four[4];
            if (out.tiles) {
                store_bytes(out.bytes(block, r, i + j), q);
                continue;
            }
            store_bytes((int8_t*)four, q);
            for (int t = 0; t < 4; t++) quads[((i + j) / 4 + t) * rows] = four[t];
        }
        const int32_t sum = reduce_add_int(total);
        const int64_t g = at + i / out.group * rows;
        out.scales[g] = peak / 127.0f;
        out.sums[g] = out.scales[g] * float(sum);
        out.starts[g] = int32_t(uint32_t(sum) * uint32_t(-kZeroPoint));  // wraps around if the row has a NaN
    }
}

// A row as quantise rounds it, as floats.
void round_groups(const float* x, int64_t size, int group, float* out) {
    for (int64_t first = 0; first < size; first += group) {
        const float peak = peak_of(x + first, group);
        const F inverse = bcast(inverse_step(127.0f, peak)), step = bcast(peak / 127.0f);
        for (int64_t i = first; i < first + group; i += kLanes)
            store(out + i, mul(to_float(to_int(mul(load(x + i), inverse))), step));
    }
}

// ---- linear layers --------------------------------------------------------------------------------------------------

struct BlockInputs {  // the activations of one register block
    const int32_t* quads;
    const float* scales;
    const float* sums;
    const int32_t* starts;
    const float* dense;
    const LowRank* const* low_rank;  // [rows] or null
    const float* inner;
};

// J ranks for R rows. Each sum has an order of its own, whatever J and R are.
template <int R, int J>
INLINE void reduce_ranks(const float* x, int64_t ld, const int8_t* a, const float* scales, int64_t k, float* inner) {
    F sum[R][J];
    MOTET_UNROLL
    for (int r = 0; r < R; r++)
        for (int j = 0; j < J; j++) sum[r][j] = zero();
    for (int64_t i = 0; i < k; i += kLanes) {
        F value[R];
        MOTET_UNROLL
        for (int r = 0; r < R; r++) value[r] = load(x + r * ld + i);
        MOTET_UNROLL
        for (int j = 0; j < J; j++) {
            if (i % 64 == 0) prefetch_far((const uint8_t*)a + (J + j) * k + i);  // of the next ranks
            const F weight = load_int8(a + j * k + i);
            MOTET_UNROLL
            for (int r = 0; r < R; r++) sum[r][j] = fma(value[r], weight, sum[r][j]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < J; j++) inner[r * kMaxRank + j] = scales[j] * reduce_add(sum[r][j]);
}

template <int R>
void reduce_some(const float* x, int64_t ld, int rows, const LowRank& update, int64_t k, int first, float* inner) {
    if (rows < R) {
        if constexpr (R > 1) reduce_some<R - 1>(x, ld, rows, update, k, first, inner);
        return;
    }
    constexpr int J = R == 1 ? 4 : 2;  // enough sums to hide the latency of an addition
    const int end = first + kRankChunk < update.rank ? first + kRankChunk : update.rank;
    int j = first;
    for (; j + J <= end; j += J) reduce_ranks<R, J>(x, ld, update.a + j * k, update.scales + j, k, inner + j);
    for (; j < end; j++) reduce_ranks<R, 1>(x, ld, update.a + j * k, update.scales + j, k, inner + j);
}

void reduce(const float* x, int64_t ld, int rows, const LowRank& update, int64_t k, int first, float* inner) {
    reduce_some<kRunRows>(x, ld, rows, update, k, first, inner);
}

template <class T>
INLINE T* at(T* array, int64_t index) {
    return array ? array + index : nullptr;
}

struct Prefetch {  // per group of this panel: some cache lines of the next panel and of a block of the KV cache
    const uint8_t* panel;
    int panel_lines;
    const uint8_t* block = nullptr;
    int block_lines = 0;

    inline __attribute__((always_inline)) void step() {
        for (int i = 0; i < panel_lines; i++, panel += 64) prefetch_far(panel);
        for (int i = 0; i < block_lines; i++, block += 64) prefetch_far(block);
    }
};

// The sums over one panel for R rows of a register block of `rows` rows: two vectors per row. The accumulators stay in
// registers because the loops over rows are unrolled; compilers would spill them otherwise. The loop over a group takes
// 16 values of k per iteration and is not unrolled.
template <int R>
INLINE void panel_8(const PackedLinear& w, const uint8_t* panel, const BlockInputs& x, Prefetch ahead, int rows,
                    F (&sum)[R][2]) {
    const uint16_t* scales = (const uint16_t*)panel;
    const uint8_t* values = panel + w.values_offset;
    const int32_t* quads = x.quads;
    const int turns = w.group / 16;
    for (int g = 0; g < w.groups; g++) {
        I acc[R][2];
        MOTET_UNROLL
        for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = bcast_int(x.starts[g * rows + r]);
        ahead.step();
        for (int s = 0; s < turns; s++, values += 512, quads += 4 * rows) {
            MOTET_UNROLL
            for (int t = 0; t < 4; t++) {
                W w0 = load_weights(values + 128 * t), w1 = load_weights(values + 128 * t + 64);
                MOTET_UNROLL
                for (int r = 0; r < R; r++) dot_both(acc[r][0], acc[r][1], w0, w1, quads + t * rows + r);
            }
        }
        F scale0 = load_half(scales + g * kPanel), scale1 = load_half(scales + g * kPanel + kLanes);
        MOTET_UNROLL
        for (int r = 0; r < R; r++) {
            F scale = bcast(x.scales[g * rows + r]);
            sum[r][0] = fma(mul(to_float(acc[r][0]), scale), scale0, sum[r][0]);
            sum[r][1] = fma(mul(to_float(acc[r][1]), scale), scale1, sum[r][1]);
        }
    }
}

template <int R>
INLINE void panel_4(const PackedLinear& w, const uint8_t* panel, const BlockInputs& x, Prefetch ahead, int rows,
                    F (&sum)[R][2]) {
    const uint16_t* scales = (const uint16_t*)panel;
    const uint16_t* minima = scales + w.groups * kPanel;
    const uint8_t* values = panel + w.values_offset;
    const int32_t* quads = x.quads;
    const int turns = w.group / 16;
    for (int g = 0; g < w.groups; g++) {
        I acc[R][2];
        MOTET_UNROLL
        for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = bcast_int(0);
        ahead.step();
        for (int s = 0; s < turns; s++, values += 256, quads += 4 * rows) {
            MOTET_UNROLL
            for (int t = 0; t < 2; t++) {
                W both0 = load_nibbles(values + 128 * t), both1 = load_nibbles(values + 128 * t + 64);
                W low0 = low_nibbles(both0), low1 = low_nibbles(both1);
                MOTET_UNROLL
                for (int r = 0; r < R; r++) dot_both_small(acc[r][0], acc[r][1], low0, low1, quads + 2 * t * rows + r);
                W high0 = high_nibbles(both0), high1 = high_nibbles(both1);
                MOTET_UNROLL
                for (int r = 0; r < R; r++)
                    dot_both_small(acc[r][0], acc[r][1], high0, high1, quads + (2 * t + 1) * rows + r);
            }
        }
        F scale0 = load_half(scales + g * kPanel), scale1 = load_half(scales + g * kPanel + kLanes);
        F minimum0 = load_half(minima + g * kPanel), minimum1 = load_half(minima + g * kPanel + kLanes);
        MOTET_UNROLL
        for (int r = 0; r < R; r++) {
            F scale = bcast(x.scales[g * rows + r]), total = bcast(x.sums[g * rows + r]);
            sum[r][0] = fma(total, minimum0, fma(mul(to_float(acc[r][0]), scale), scale0, sum[r][0]));
            sum[r][1] = fma(total, minimum1, fma(mul(to_float(acc[r][1]), scale), scale1, sum[r][1]));
        }
    }
}

template <int R>
INLINE void panel_32(const PackedLinear& w, const uint8_t* panel, const BlockInputs& x, int rows, F (&sum)[R][2]) {
    const float* values = (const float*)panel;
    for (int64_t i = 0; i < w.k; i++) {
        F w0 = load(values + i * kPanel), w1 = load(values + i * kPanel + kLanes);
        MOTET_UNROLL
        for (int r = 0; r < R; r++) {
            F value = bcast(x.dense[i * rows + r]);
            sum[r][0] = fma(w0, value, sum[r][0]);
            sum[r][1] = fma(w1, value, sum[r][1]);
        }
    }
}

template <int R>
__attribute__((noinline)) void panel_rows(const PackedLinear& w, const uint8_t* panel, const BlockInputs& x,
                                          Prefetch ahead, int rows, float (*out)[kPanel]) {
    F sum[R][2];
    MOTET_UNROLL
    for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = zero();
    const int stride = kRegisterRows >= kRows ? R : rows;  // a constant if a whole block fits the registers
    if (w.bits == 8)
        panel_8<R>(w, panel, x, ahead, stride, sum);
    else if (w.bits == 4)
        panel_4<R>(w, panel, x, ahead, stride, sum);
    else
        panel_32<R>(w, panel, x, stride, sum);
    MOTET_UNROLL
    for (int r = 0; r < R; r++) {
        store(out[r], sum[r][0]);
        store(out[r] + kLanes, sum[r][1]);
    }
}

// Calls panel_rows with a constant number of rows: `count`, which is at most R.
template <int R>
void panel_of_rows(const PackedLinear& w, const uint8_t* panel, const BlockInputs& x, Prefetch ahead, int count,
                   int rows, float (*out)[kPanel]) {
    if (count == R)
        panel_rows<R>(w, panel, x, ahead, rows, out);
    else if constexpr (R > 1)
        panel_of_rows<R - 1>(w, panel, x, ahead, count, rows, out);
}

// Adds B · inner to a panel of R rows.
template <int R>
INLINE void expand_rows(const LowRank& update, int64_t panel, const float* inner, float (*out)[kPanel]) {
    for (int half = 0; half < 2; half++) {
        const LowRank::Ranks& own = update.ranks[2 * panel + half];
        const int8_t* b = update.b + own.at;
        F sum[R];
        MOTET_UNROLL
        for (int r = 0; r < R; r++) sum[r] = zero();
        for (int j = 0; j < own.count; j++) {
            if (j % 4 == 0) prefetch_far((const uint8_t*)b + own.count * kPanel + j * kLanes);  // of the next panel
            const F value = load_int8(b + j * kLanes);
            MOTET_UNROLL
            for (int r = 0; r < R; r++) sum[r] = fma(value, bcast(inner[r * kMaxRank + own.first + j]), sum[r]);
        }
        MOTET_UNROLL
        for (int r = 0; r < R; r++) store(out[r] + half * kLanes, add(load(out[r] + half * kLanes), sum[r]));
    }
}

template <int R>
void expand_some(const LowRank& update, int64_t panel, const float* inner, int rows, float (*out)[kPanel]) {
    if (rows == R)
        expand_rows<R>(update, panel, inner, out);
    else if constexpr (R > 1)
        expand_some<R - 1>(update, panel, inner, rows, out);
}

// The sums over one panel for the rows of a block.
void panel_of_block(const PackedLinear& w, int64_t panel, const BlockInputs& x, Prefetch ahead, int rows,
                    float (*out)[kPanel]) {
    const uint8_t* data = w.data + panel * w.panel_bytes;
    for (int r = 0; r < rows; r += kRegisterRows) {
        const BlockInputs some = {at(x.quads, r), at(x.scales, r), at(x.sums, r), at(x.starts, r),
                                  at(x.dense, r), nullptr,         nullptr};
        panel_of_rows<kRegisterRows>(w, data, some, ahead, rows - r < kRegisterRows ? rows - r : kRegisterRows, rows,
                                     out + r);
    }
}

// What follows the sums over one panel: factor, bias, low-rank updates, epilogue.
void finish_block(const PackedLinear& w, const BlockInputs& x, int64_t panel, int rows, float (*sum)[kPanel],
                  float* out, int64_t ld, Epilogue epilogue) {
    const F factor = bcast(w.factor);
    for (int half = 0; half < kPanel; half += kLanes) {
        const F bias = w.bias ? load(w.bias + panel * kPanel + half) : zero();
        for (int r = 0; r < rows; r++) store(sum[r] + half, fma(load(sum[r] + half), factor, bias));
    }
    for (int r = 0; x.low_rank && r < rows;) {
        const LowRank* update = x.low_rank[r];
        int end = r + 1;
        while (end < rows && end < r + kRows && x.low_rank[end] == update) end++;
        if (update) expand_some<kRows>(*update, panel, x.inner + int64_t(r) * kMaxRank, end - r, sum + r);
        r = end;
    }
    if (is_gated(epilogue)) {
        for (int r = 0; r < rows; r++) {
            const F gate = load(sum[r]), up = load(sum[r] + kLanes);
            store(out + r * ld + panel * kLanes, mul(epilogue == Epilogue::SwiGLU ? silu(gate) : gelu(gate), up));
        }
        return;
    }
    const int64_t column = panel * kPanel;
    for (int half = 0; half < kPanel && column + half < w.n; half += kLanes)
        for (int r = 0; r < rows; r++) {
            float* to = out + r * ld + column + half;
            F y = load(sum[r] + half);
            if (epilogue == Epilogue::Add) y = add(load(to), y);
            if (epilogue == Epilogue::Gelu) y = gelu(y);
            if (epilogue == Epilogue::GeluErf) y = gelu_erf(y);
            store(to, y);
        }
}

BlockInputs inputs_of(const Activations& x, int block) {
    const int64_t first = x.first_row(block), stored = x.first_stored_row(block);
    return {at(x.quads, stored * (x.k / 4)), at(x.scales, stored * x.groups), at(x.sums, stored * x.groups),
            at(x.starts, stored * x.groups), at(x.dense, first * x.k),        at(x.low_rank, first),
            at(x.inner, first * kMaxRank)};
}

// Calls body(panel, block, what to prefetch meanwhile) for panels panel0…panel1 - 1 and the blocks block0…block1 - 1.
// While a panel is used, each block prefetches a part of the next panel and one block of `prefetch_list`.
template <class Body>
INLINE void visit(const PackedLinear& w, int block0, int block1, int64_t panel0, int64_t panel1,
                  PrefetchList* prefetch_list, Body body) {
    const int visits = block1 - block0, steps = w.bits == 32 ? 1 : w.groups;
    const int lines = w.bits == 32 ? 0 : int((w.panel_bytes / 64 + visits * steps - 1) / (visits * steps));
    for (int64_t panel = panel0; panel < panel1; panel++) {
        const uint8_t* next = w.data + (panel + 1) * w.panel_bytes;
        for (int b = block0; b < block1; b++) {
            Prefetch ahead = {next, lines};
            if (prefetch_list && prefetch_list->next < prefetch_list->end) {
                ahead.block = prefetch_list->base + *prefetch_list->next++;
                ahead.block_lines = (prefetch_list->bytes / 64 + steps - 1) / steps;
            }
            body(panel, b, ahead);
            next += int64_t(lines) * 64 * steps;
        }
    }
}

void linear(const PackedLinear& w, const Activations& x, int block0, int block1, int64_t panel0, int64_t panel1,
            float* out, int64_t ld, Epilogue epilogue, PrefetchList* prefetch_list, uint8_t*) {
    alignas(64) float sum[kRows][kPanel];
    visit(w, block0, block1, panel0, panel1, prefetch_list, [&](int64_t panel, int b, Prefetch ahead) {
        const BlockInputs inputs = inputs_of(x, b);
        const int rows = x.rows_of(b);
        panel_of_block(w, panel, inputs, ahead, rows, sum);
        finish_block(w, inputs, panel, rows, sum, out + x.first_row(b) * ld, ld, epilogue);
    });
}
