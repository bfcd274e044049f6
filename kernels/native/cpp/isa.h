// The functions of one path: one table per instruction set. All paths are compiled from the same kernels.inl, with
// different vector types. The path is chosen at run time.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "sample_isa.h"

namespace motet {

constexpr int kLanes = 16;       // floats of a vector
constexpr int kPanel = 32;       // columns of a weight panel: two vectors, so a broadcast activation is used twice
constexpr int kRows = 6;         // most rows of one register block
constexpr int kTileRows = 16;    // rows of a matrix tile
constexpr int kTileBlock = 32;   // most rows of a block on matrix tiles: two of them
constexpr int kBlock = 32;       // positions of a block of the KV cache
constexpr int kPartition = 128;  // positions of one softmax; partitions are merged in order
constexpr int kMaxHeadSize = 256;
constexpr int kMaxRank = 256;  // largest rank of a low-rank update

// A weight [n, k] in panels of 32 columns. A panel is read from front to back. Columns past n are zero. A panel of a
// gated matrix has 16 columns of the gate and the same 16 columns of up.
//   8 bits: scales f16 [groups][32], pad to 64 bytes, then per 4 values of k: 128 bytes, byte 4 * column + j
//   4 bits: scales f16 [groups][32], minima f16 [groups][32], pad, then per 8 values of k: 128 bytes, low nibbles first
//   32 bits: f32 [k][32]
// Scales and minima are divided by `factor`, a power of two, so that they are well inside the range of f16.
struct PackedLinear {
    int bits = 0;
    int64_t n = 0, k = 0;
    int group = 0, groups = 0;
    int64_t panels = 0, panel_bytes = 0, values_offset = 0;
    float factor = 1.0f;
    const uint8_t* data = nullptr;
    const float* bias = nullptr;  // [panels * 32] or null
};

// A low-rank update y += B (A x) of one linear layer, for the rows of one member. A and B are int8, with one scale for
// each rank. A fused layer's parts have ranks of their own: most of B is zero, and each vector of columns (half of a
// panel) has only the ranks that it uses.
struct LowRank {
    struct Ranks {
        int first = 0, count = 0;
        int64_t at = 0;  // in b: [count][kLanes]
    };
    int rank = 0;
    const int8_t* a = nullptr;  // [rank][k]
    const int8_t* b = nullptr;
    const float* scales = nullptr;  // [rank] the product of A's and B's
    const Ranks* ranks = nullptr;   // [panels * 2]
};
constexpr int kRankChunk = 16;  // ranks of A x that a thread computes together, for up to kRunRows rows
constexpr int kRunRows = 4;

// Bytes of a row of a matrix tile over numbers that come in groups of `group`, which 16 divides.
inline int tile_chunk(int group) { return group % 64 == 0 ? 64 : group % 32 == 0 ? 32 : 16; }

// Rows of activations, in register blocks of `rows_of(b)` ≤ kRows rows: 4 bytes at [block][k / 4][row], and one scale
// per row and group at [block][group][row]. For 32-bit weights: f32 [block][k][row].
// On matrix tiles, blocks of ≤ kTileBlock rows, with room for kTileBlock: bytes at [block][tile][k / c][row][c] for
// tiles of kTileRows rows and c = tile_chunk(group).
struct Activations {
    int64_t rows = 0, k = 0;
    int group = 0, groups = 0;
    int blocks = 0;
    bool tiles = false;
    int32_t* quads = nullptr;
    float* scales = nullptr;
    float* sums = nullptr;      // scale * Σ q, which a minimum is multiplied with
    int32_t* starts = nullptr;  // -z * Σ q, the first value of a dot product with weights that are read z too large
    float* dense = nullptr;
    const LowRank* const* low_rank = nullptr;  // [rows] or null: the update of each row, null: none
    float* inner = nullptr;                    // [rows][kMaxRank]: see reduce

    int64_t stored_rows() const { return tiles ? int64_t(blocks) * kTileBlock : rows; }
    int64_t first_stored_row(int block) const { return tiles ? int64_t(block) * kTileBlock : first_row(block); }
    // Tiles: where the bytes from `column` on are, of row r of a block. A run ends at a multiple of the chunk.
    int8_t* bytes(int block, int64_t r, int64_t column) const {
        const int chunk = tile_chunk(group);
        const int64_t tile = first_stored_row(block) + r / kTileRows * kTileRows;
        return (int8_t*)quads + tile * k + column / chunk * kTileRows * chunk + r % kTileRows * chunk + column % chunk;
    }
    int64_t unit() const { return dense ? kLanes : group; }  // columns that are quantised together
    int64_t first_row(int block) const {
        if (tiles) return block * int64_t(kTileBlock) < rows ? block * int64_t(kTileBlock) : rows;
        return block * (rows / blocks) + (block < rows % blocks ? block : rows % blocks);
    }
    int block_of(int64_t row) const {
        if (tiles) return int(row / kTileBlock);
        const int64_t size = rows / blocks, larger = rows % blocks, edge = larger * (size + 1);
        return int(row < edge ? row / (size + 1) : larger + (row - edge) / size);
    }
    int rows_of(int block) const { return int(first_row(block + 1) - first_row(block)); }
};

enum class Epilogue { Store, Add, SwiGLU, GeGLU, Gelu, GeluErf };
inline bool is_gated(Epilogue epilogue) { return epilogue == Epilogue::SwiGLU || epilogue == Epilogue::GeGLU; }
enum class Norm { None, RMS, Layer };

struct NormArgs {
    Norm kind = Norm::None;
    float eps = 0.0f;
    const float* weight = nullptr;
    const float* bias = nullptr;  // null: none
};
struct NormStats {
    float mean = 0.0f, scale = 1.0f;
};

enum class KV { BF16, Int8 };

// One (layer, KV head) of the cache, block by block of 32 positions.
//   bf16: K [tile of 16 positions][d / 2][position][2], V [pair of positions][d][2]
//   int8: K [tile of 16 positions][d / 4][position][4], V [4 positions][d][4], both bytes plus 128; f32 scales K [32],
//   V [32]
struct CacheView {
    uint8_t* data;        // of block 0
    int64_t block_bytes;  // from one block to the next
    int head_size;
    KV kind;
};

constexpr int kPartitionBlocks = kPartition / kBlock;
constexpr int kMaxQueries = 6;  // of one call; kTileRows on matrix tiles

// Attention of query rows of one KV head over one partition. The output is not yet divided by the sums.
struct AttendArgs {
    CacheView kv;
    const int32_t* blocks;                   // blocks of the partition
    const uint8_t* ahead[kPartitionBlocks];  // blocks to prefetch, which are attended to next; null: none
    int head_size;
    int queries;             // ≤ kMaxQueries, or kTileRows
    bool tiles = false;      // int8 only
    const int* seen;         // [queries] positions of the partition up to each query's own; ≥ kPartition: all
    const int* unseen;       // [queries] those of them that lie before its window; ≤ 0: none
    const uint32_t* packed;  // bf16: [d / 2][queries] pairs; int8: [high, low][d / 4][queries] bytes; tiles:
                             // [kTileRows][high, low][d] bytes; in units of log2(e) · scale
    const float* steps;      // [queries], int8: the value of one unit of the 16 bits
    const int32_t*
        starts;        // [queries], int8: z times the sum of the query, where the cache's bytes are read z too large
    float cap = 0.0f;  // c: scores s become c · tanh(s / c), in the queries' units; 0: none
    float* out;        // [queries][d]
    float* maxima;     // [queries]
    float* sums;       // [queries]

    const uint8_t* block(int index) const { return kv.data + blocks[index] * kv.block_bytes; }
    int longest() const {
        int most = 0;
        for (int q = 0; q < queries; q++) most = seen[q] > most ? seen[q] : most;
        return most < kPartition ? most : kPartition;
    }
};

// Blocks of the KV cache that a thread prefetches while it multiplies.
struct PrefetchList {
    const int64_t *next = nullptr, *end = nullptr;  // offsets of the blocks that are not yet prefetched
    const uint8_t* base = nullptr;
    int bytes = 0;  // bytes per block
};

struct Isa {
    const char* name;
    bool tiles;       // whether it has matrix tiles, so that activations and queries may be laid out for them
    void (*leave)();  // to be called by each thread when it has used these functions; null: need not be
    // `room`: k · kPanel bytes of the caller's, aligned to 64, used if the activations are laid out for tiles.
    void (*linear)(const PackedLinear&, const Activations&, int block0, int block1, int64_t panel0, int64_t panel1,
                   float* out, int64_t ld, Epilogue, PrefetchList*, uint8_t* room);
    NormStats (*norm_stats)(const float* x, float eps, Norm, int64_t size);
    void (*norm)(const float* x, const NormArgs&, NormStats, int64_t first, int64_t size, float* out);
    // Normalise and quantise columns first…first + size - 1 (whole groups) of a row.
    void (*quantise)(const float* x, const NormArgs&, NormStats, int64_t first, int64_t size, Activations&,
                     int64_t row);
    void (*round_groups)(const float* x, int64_t size, int group, float* out);  // round as quantise does
    // inner [rows][kMaxRank] = scales · (A x) for x [rows][ld], from rank `first` on, at most kRankChunk of them.
    void (*reduce)(const float* x, int64_t ld, int rows, const LowRank&, int64_t k, int first, float* inner);
    // Of the first `size` channels.
    void (*rotate)(float* head, const float* cos, const float* sin, int size);
    void (*pack_query)(KV, const float* head, float scale, int head_size, uint32_t* packed, int stride, float* step,
                       int32_t* start);
    void (*write_kv)(const CacheView&, int block, int offset, const float* k, const float* v);
    void (*attend)(const AttendArgs&);
    // Merge a later partition's (max, sum, out) of a row into the first ones, in place.
    void (*merge)(float* max, float* sum, float* out, float max2, float sum2, const float* out2, int head_size);
    void (*scale_to)(const float* x, float factor, int64_t size, float* out);
    void (*softcap)(float* x, int64_t size, float scale, float cap);  // cap · tanh(x · scale / cap); 0: no cap
    int64_t (*dot_probe)(int64_t iterations);                         // returns the number of multiply-accumulates done
    uint64_t (*read_probe)(const uint8_t* data, int64_t size);
    SampleIsa sample;
};

const Isa* isa_portable();
const Isa* isa_avx2();  // null if it was not compiled
const Isa* isa_avxvnni();
const Isa* isa_avx512();
const Isa* isa_avx512bf16();
const Isa* isa_neon();
const Isa* isa_amx();
const Isa* isa_amx_emulated();
// Whether the CPU has matrix tiles of bytes, the system lets this process use them, and they multiply rightly. To be
// called only where the rest of isa_amx() runs.
bool may_use_amx();

}  // namespace motet
