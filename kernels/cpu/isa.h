// What an instruction set provides: one table of functions per path. The paths are compiled from the same kernels.inl over
// different vector types, chosen at run time.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace motet {

constexpr int kLanes = 16;        // columns of a weight panel, and floats of a vector
constexpr int kTile = 12;         // most rows of one register block
constexpr int kBlock = 32;        // positions of a block of the KV cache
constexpr int kPartition = 128;   // positions whose softmax is computed at once; partitions are merged in order
constexpr int kMaxHeadSize = 256;
constexpr int kMaxRank = 256;     // of the low-rank updates of one linear layer

// A weight [n, k] in panels of 16 columns, each one linear stream. Columns past n are zero.
//   8 bits: scales f16 [groups][16], pad to 64 bytes, then per 4 values of k: 64 bytes, byte 4 * lane + j
//   4 bits: scales f16 [groups][16], minima f16 [groups][16], pad, then per 8 values of k: 64 bytes, low nibbles first 4
//   32 bits: f32 [k][16]
// All values are divided by the power of two `factor`, so that scales lie well inside f16.
struct PackedLinear {
    int bits = 0;
    int64_t n = 0, k = 0;
    int group = 0, groups = 0;
    int64_t panels = 0, panel_bytes = 0, values_offset = 0;
    float factor = 1.0f;
    const uint8_t* data = nullptr;
    const float* bias = nullptr;  // [panels * 16] or null
};

// A low-rank update y += B (A x) of one linear layer, for the rows of one member.
struct LowRank {
    int rank = 0;
    const float* a = nullptr;  // [rank][k]
    const float* b = nullptr;  // [panels][rank][16]
};

// Rows of activations in register blocks of `rows_of(b)` ≤ kTile rows: [block][k / 4][row] of 4 bytes, with a scale per row
// and group: [block][group][row]. For 32-bit weights: f32 [block][k][row].
struct Activations {
    int64_t rows = 0, k = 0;
    int group = 0, groups = 0;
    int blocks = 0;
    int32_t* quads = nullptr;
    float* scales = nullptr;
    float* sums = nullptr;     // scale * Σ q: what a minimum multiplies
    int32_t* starts = nullptr; // -128 * Σ q: where the dot product with unsigned weights starts
    float* dense = nullptr;
    const LowRank* const* low_rank = nullptr;  // [rows] or null: whose update a row gets, null for none
    float* inner = nullptr;                    // [rows][kMaxRank]: A x

    int64_t first_row(int block) const { return block * (rows / blocks) + (block < rows % blocks ? block : rows % blocks); }
    int rows_of(int block) const { return int(rows / blocks + (block < rows % blocks ? 1 : 0)); }
};

enum class Epilogue { Store, Add, SwiGLU, Gelu };
enum class Norm { None, RMS, Layer };
enum class KV { BF16, Int8 };

// One (layer, KV head) of the cache, block by block: K as bf16 or int8 [tile of 16 positions][d / 2][position][2], V as
// [pair of positions][d][2]; int8 has f32 scales [K: 32][V: 32] behind them.
struct CacheView {
    uint8_t* data;        // of block 0
    int64_t block_bytes;  // from one block to the next
    int head_size;
    KV kind;
};

constexpr int kPartitionBlocks = kPartition / kBlock;
constexpr int kPartitionBytes = kPartition * kMaxHeadSize * 4;  // K and V of a partition as bf16
constexpr int kMaxQueries = 6;

struct PartitionView {  // per block of a partition; scales are null for bf16
    const uint8_t* keys[kPartitionBlocks] = {};
    const uint8_t* values[kPartitionBlocks] = {};
    const float* key_scales[kPartitionBlocks] = {};
    const float* value_scales[kPartitionBlocks] = {};
};

// Query rows of one KV head over one partition: scores, softmax, values (not yet divided by the sums).
struct AttendArgs {
    PartitionView kv;
    int head_size;
    int queries;             // ≤ kMaxQueries
    const int* seen;         // [queries] positions of the partition that each query sees, ≥ kPartition for all
    const uint32_t* packed;  // [d / 2][queries] pairs of bf16, scaled by log2(e) / sqrt(d)
    float* out;              // [queries][d]
    float* maxima;           // [queries]
    float* sums;             // [queries]
};

struct Isa {
    const char* name;
    void (*linear)(const PackedLinear&, const Activations&, int block0, int block1, int64_t panel0, int64_t panel1,
                   float* out, int64_t ld, Epilogue);
    void (*quantise_row)(const float* x, Activations&, int64_t row);
    void (*reduce)(const float* x, const LowRank&, int64_t k, float* inner);  // inner = A x
    void (*norm)(const float* x, const float* weight, const float* bias, float eps, Norm, int64_t size, float* out);
    void (*rotate)(float* head, const float* cos, const float* sin, int head_size);
    void (*pack_query)(const float* head, float scale, int head_size, uint32_t* packed, int stride);
    void (*write_kv)(const CacheView&, int block, int offset, const float* k, const float* v);
    void (*load_partition)(const CacheView&, const int32_t* blocks, int partition, int positions, uint8_t* scratch, PartitionView&);
    void (*attend)(const AttendArgs&);
    // (max, sum, out) of a row: merge a later partition into the first, in place.
    void (*merge)(float* max, float* sum, float* out, float max2, float sum2, const float* out2, int head_size);
    void (*scale_to)(const float* x, float factor, int64_t size, float* out);
    int64_t (*dot_probe)(int64_t iterations);       // multiply-accumulates done by a loop of the path's dot products
    uint64_t (*read_probe)(const uint8_t* data, int64_t size);
};

const Isa* isa_portable();
const Isa* isa_avx2();        // null where it was not compiled
const Isa* isa_avx512();
const Isa* isa_avx512bf16();

}  // namespace motet
