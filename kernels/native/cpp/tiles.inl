// Linear layers of many rows and attention of many queries on matrix tiles. Included by kernels.inl where there are
// any.
//
// The bits are those of the other paths: a tile's sums are integers, so they are exact, and the floats of a row are
// added in the same order, group by group.

// Shapes: tile 4 is [16 rows][first bytes] and multiplies tile 6, 5 is [16][second] and multiplies 7; 0…3 are results.
thread_local int tile_shapes = 0;  // first · 128 + second; 0: none

void use_tiles(int first, int second) {
    if (tile_shapes == first * 128 + second) return;
    TileShapes shapes;
    for (int t = 0; t < 4; t++) shapes.rows[t] = kTileRows, shapes.row_bytes[t] = 64;
    for (int t = 0; t < 2; t++) {
        const int bytes = t ? second : first;
        shapes.rows[4 + t] = kTileRows, shapes.row_bytes[4 + t] = uint16_t(bytes);
        shapes.rows[6 + t] = uint8_t(bytes / 4), shapes.row_bytes[6 + t] = 64;
    }
    configure_tiles(&shapes);
    tile_shapes = first * 128 + second;
}

// Other code of the process may use tiles on the same thread.
void leave_tiles() {
    if (tile_shapes) release_tiles();
    tile_shapes = 0;
}

// ---- linear layers --------------------------------------------------------------------------------------------------

using Products =
    int32_t[4][kTileRows][kTileRows];  // rows 0…15 × columns 0…15, 0…15 × 16…31, 16…31 × 0…15, 16…31 × 16…31

// A panel's weights as signed bytes [k / 4][32][4].
void unpack_panel(const PackedLinear& w, const uint8_t* panel, uint8_t* out) {
    const uint8_t* values = panel + w.values_offset;
    const int64_t size = w.k * kPanel;
    if (w.bits == 8) {
        for (int64_t i = 0; i < size; i += 64) store_weights(out + i, flip_signs(load_weights(values + i)));
        return;
    }
    for (int64_t i = 0; i < size / 2; i += 128) {
        const W both0 = load_nibbles(values + i), both1 = load_nibbles(values + i + 64);
        store_weights(out + 2 * i, low_nibbles(both0));
        store_weights(out + 2 * i + 64, low_nibbles(both1));
        store_weights(out + 2 * i + 128, high_nibbles(both0));
        store_weights(out + 2 * i + 192, high_nibbles(both1));
    }
}

// The sums over one panel for the rows of a block. While the tiles multiply a group, the sums of the group before are
// scaled and added, some rows at a time between the instructions. `Full`: the block has kTileBlock rows.
template <bool Minima, bool Full>
struct PanelTiles {
    const PackedLinear& w;
    const uint16_t *scales, *minima;  // f16 [groups][32]
    const uint8_t* weights;           // as unpack_panel writes them
    const BlockInputs& x;
    Prefetch ahead;
    const int rows;
    float (*sum)[kPanel];
    Products* products;  // [2] of even and of odd groups
    const int chunk = tile_chunk(w.group), steps = w.group / chunk;
    const int64_t below = kTileRows * w.k;  // from the bytes of rows 0…15 to those of 16…31

    inline __attribute__((always_inline)) bool lower() const { return Full || rows > kTileRows; }  // has rows 16…31

    struct Columns {  // scales and minima of a group
        F scale[2], minimum[2];
    };
    inline __attribute__((always_inline)) Columns columns(int g) const {
        Columns c;
        MOTET_UNROLL
        for (int half = 0; half < 2; half++) {
            c.scale[half] = load_half(scales + g * kPanel + half * kLanes);
            c.minimum[half] = Minima ? load_half(minima + g * kPanel + half * kLanes) : zero();
        }
        return c;
    }

    inline __attribute__((always_inline)) void add_row(int g, const Columns& c, int r) {
        const int32_t (*from)[kTileRows][kTileRows] = products[g & 1] + r / kTileRows * 2;
        const int64_t at = int64_t(g) * (Full ? kTileBlock : rows) + r;
        const F scale = bcast(x.scales[at]), total = Minima ? bcast(x.sums[at]) : zero();
        MOTET_UNROLL
        for (int half = 0; half < 2; half++) {
            float* to = sum[r] + half * kLanes;
            F y = fma(mul(to_float(load_ints(from[half][r % kTileRows])), scale), c.scale[half], load(to));
            store(to, Minima ? fma(total, c.minimum[half], y) : y);
        }
    }
    template <bool Adds>
    inline __attribute__((always_inline)) void add_eight(int g, const Columns& c, int first) {
        if (!Adds) return;
        if (Full) {
            MOTET_UNROLL
            for (int r = 0; r < 8; r++) add_row(g, c, first + r);
        } else {
            for (int r = first; r < first + 8 && r < rows; r++) add_row(g, c, r);
        }
    }

    // Multiplies group g, and adds the products of group g - 1.
    template <bool Multiplies, bool Adds>
    inline __attribute__((always_inline)) void turn(int g) {
        const int8_t* a = (const int8_t*)x.quads + int64_t(g) * w.group * kTileRows;
        const uint8_t* b = weights + int64_t(g) * w.group * kPanel;
        int32_t (*to)[kTileRows][kTileRows] = products[g & 1];
        const Columns c = Adds ? columns(g - 1) : Columns{};
        if (Multiplies) {
            ahead.step();
            tile_load<4>(a, chunk);
            tile_load<6>(b, 4 * kPanel);
            tile_zero<0>();
            tile_dot_signed<0, 4, 6>();
        }
        add_eight<Adds>(g - 1, c, 0);
        if (Multiplies) {
            tile_load<7>(b + 64, 4 * kPanel);
            tile_zero<1>();
            tile_dot_signed<1, 4, 7>();
        }
        if (Multiplies && lower()) {
            tile_load<5>(a + below, chunk);
            tile_zero<2>();
            tile_dot_signed<2, 5, 6>();
        }
        add_eight<Adds>(g - 1, c, 8);
        if (Multiplies && lower()) {
            tile_zero<3>();
            tile_dot_signed<3, 5, 7>();
        }
        if (Multiplies && steps == 2) second_half(a + kTileRows * chunk, b + chunk * kPanel);
        if (Multiplies) tile_store<0>(to[0], 64);
        add_eight<Adds>(g - 1, c, 16);
        if (Multiplies) tile_store<1>(to[1], 64);
        if (Multiplies && lower()) tile_store<2>(to[2], 64);
        add_eight<Adds>(g - 1, c, 24);
        if (Multiplies && lower()) tile_store<3>(to[3], 64);
    }

    // A tile has 64 bytes of a row: the second 64 of a group of 128 are added to the same products.
    inline __attribute__((always_inline)) void second_half(const int8_t* a, const uint8_t* b) {
        tile_load<4>(a, chunk);
        tile_load<6>(b, 4 * kPanel);
        tile_dot_signed<0, 4, 6>();
        tile_load<7>(b + 64, 4 * kPanel);
        tile_dot_signed<1, 4, 7>();
        if (!lower()) return;
        tile_load<5>(a + below, chunk);
        tile_dot_signed<2, 5, 6>();
        tile_dot_signed<3, 5, 7>();
    }

    inline __attribute__((always_inline)) void run() {
        for (int r = 0; r < rows; r++)
            for (int half = 0; half < kPanel; half += kLanes) store(sum[r] + half, zero());
        turn<true, false>(0);
        for (int g = 1; g < w.groups; g++) turn<true, true>(g);
        turn<false, true>(w.groups);
    }
};

template <bool Minima, bool Full>
__attribute__((noinline)) void panel_tiles(const PackedLinear& w, const uint8_t* panel, const uint8_t* weights,
                                           const BlockInputs& x, Prefetch ahead, int rows, float (*sum)[kPanel]) {
    const uint16_t* scales = (const uint16_t*)panel;
    alignas(64) Products products[2];
    PanelTiles<Minima, Full>{w, scales, scales + int64_t(w.groups) * kPanel, weights, x, ahead, rows, sum, products}
        .run();
}

void linear_tiles(const PackedLinear& w, const Activations& x, int block0, int block1, int64_t panel0, int64_t panel1,
                  float* out, int64_t ld, Epilogue epilogue, PrefetchList* prefetch_list, uint8_t* room) {
    if (!x.tiles) return linear(w, x, block0, block1, panel0, panel1, out, ld, epilogue, prefetch_list, nullptr);
    alignas(64) float sum[kTileBlock][kPanel];
    use_tiles(tile_chunk(w.group), tile_chunk(w.group));
    visit(w, block0, block1, panel0, panel1, prefetch_list, [&](int64_t panel, int b, Prefetch ahead) {
        const uint8_t* data = w.data + panel * w.panel_bytes;
        if (b == block0) unpack_panel(w, data, room);
        const BlockInputs inputs = inputs_of(x, b);
        const int rows = x.rows_of(b);
        const auto run = w.bits == 4 ? (rows == kTileBlock ? panel_tiles<true, true> : panel_tiles<true, false>)
                                     : (rows == kTileBlock ? panel_tiles<false, true> : panel_tiles<false, false>);
        run(w, data, room, inputs, ahead, rows, sum);
        finish_block(w, inputs, panel, rows, sum, out + x.first_row(b) * ld, ld, epilogue);
    });
}

// ---- attention ------------------------------------------------------------------------------------------------------

void scores_tiles(const AttendArgs& a, const uint8_t* keys, const uint8_t* ahead, float (*scores)[kPartition]) {
    const int d = a.head_size, chunk = tile_chunk(d);
    alignas(64) Products products;  // high × positions 0…15, low × 0…15, high × 16…31, low × 16…31
    const uint8_t *high = (const uint8_t*)a.packed, *low = high + d;  // [queries][high, low][d]
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    for (int i = 0; i < d; i += chunk) {
        const uint8_t *first = keys + i * kLanes, *second = first + d * kLanes;
        tile_load<4>(high + i, 2 * d);
        tile_load<6>(first, 64);
        tile_dot_unsigned<0, 4, 6>();
        tile_load<6>(second, 64);
        tile_dot_unsigned<2, 4, 6>();
        tile_load<4>(low + i, 2 * d);
        tile_dot_unsigned<3, 4, 6>();
        tile_load<6>(first, 64);
        tile_dot_unsigned<1, 4, 6>();
        for (int at = 0; ahead && at < chunk * kLanes; at += 64) {
            prefetch_far(ahead + i * kLanes + at);
            prefetch_far(ahead + (d + i) * kLanes + at);
        }
    }
    tile_store<0>(products[0], 64);
    tile_store<1>(products[1], 64);
    tile_store<2>(products[2], 64);
    tile_store<3>(products[3], 64);
    const float* scales = (const float*)(keys + d * kBlock * 2);
    for (int q = 0; q < a.queries; q++)
        for (int half = 0; half < 2; half++) {
            const F score = combine(load_ints(products[2 * half][q]), load_ints(products[2 * half + 1][q]), a.starts[q],
                                    a.steps[q]);
            store(scores[q] + half * kLanes, mul(score, load(scales + half * kLanes)));
        }
}

// Columns first…first + 31 of the output, or the last 16 of a head.
void values_tiles(const AttendArgs& a, int blocks, const Weights16* weights, int first) {
    const int d = a.head_size;
    const bool both = first + kLanes < d;
    alignas(64) Products products;  // high × columns 0…15, low × 0…15, high × 16…31, low × 16…31
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    for (int b = 0; b < blocks; b++) {
        const uint8_t* values = a.block(b) + d * kBlock + first * 4;
        for (int p = 0; first == 0 && p < kBlock / 4; p++) fetch_values(a, b * (kBlock / 4) + p);
        tile_load<5>(weights[0].high + b * kBlock, sizeof(Weights16));
        tile_load<7>(values, d * 4);
        tile_dot_unsigned<0, 5, 7>();
        if (both) {
            tile_load<7>(values + 64, d * 4);
            tile_dot_unsigned<2, 5, 7>();
        }
        tile_load<5>(weights[0].low + b * kBlock, sizeof(Weights16));
        if (both) {
            tile_dot_unsigned<3, 5, 7>();
            tile_load<7>(values, d * 4);
        }
        tile_dot_unsigned<1, 5, 7>();
    }
    tile_store<0>(products[0], 64);
    tile_store<1>(products[1], 64);
    tile_store<2>(products[2], 64);
    tile_store<3>(products[3], 64);
    for (int q = 0; q < a.queries; q++)
        for (int half = 0; half < 1 + both; half++)
            store(a.out + q * d + first + half * kLanes,
                  combine(load_ints(products[2 * half][q]), load_ints(products[2 * half + 1][q]), weights[q].start,
                          weights[q].step));
}

void attend_tiles(const AttendArgs& a) {
    if (!a.tiles) return attend(a);
    const int d = a.head_size, blocks = (a.longest() + kBlock - 1) / kBlock;
    alignas(64) float scores[kTileRows][kPartition];
    Weights16 weights[kTileRows];
    use_tiles(tile_chunk(d), kBlock);
    for (int b = 0; b < blocks; b++)
        scores_tiles(a, a.block(b), a.ahead[b], (float (*)[kPartition])(&scores[0][b * kBlock]));
    fetch_rest(a, blocks);
    cap_scores(a, blocks * 2, scores);
    for (int q = 0; q < a.queries; q++) softmax_int8(a, q, blocks * 2, scores[q], weights[q]);
    for (int first = 0; first < d; first += 2 * kLanes) values_tiles(a, blocks, weights, first);
    for (int p = blocks * (kBlock / 4); p < kPartition / 4; p++) fetch_values(a, p);
}

// ---- probe ----------------------------------------------------------------------------------------------------------

int64_t dot_probe(int64_t iterations) {
    alignas(64) uint8_t bytes[kTileRows * 64] = {};
    use_tiles(64, 64);
    tile_load<4>(bytes, 64);
    tile_load<5>(bytes, 64);
    tile_load<6>(bytes, 64);
    tile_load<7>(bytes, 64);
    for (int64_t i = 0; i < iterations / 64; i++) {
        tile_dot_signed<0, 4, 6>();
        tile_dot_signed<1, 4, 7>();
        tile_dot_signed<2, 5, 6>();
        tile_dot_signed<3, 5, 7>();
    }
    return iterations / 64 * 4 * kTileRows * kTileRows * 64;
}
