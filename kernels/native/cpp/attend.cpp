// Attention of a step: writes the new keys and values, then runs the plan's units over the cache's partitions.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "step.h"

namespace motet {
namespace {

constexpr int64_t kManyRows = 10, kMostRows = 64;  // between them, see collect_blocks()
constexpr float kLog2e = 1.44269504f;

}  // namespace

// The first partition of positions that a row with this context sees.
int Step::first_partition(int32_t context, int32_t window) {
    return context > window ? (context - window) / kPartition : 0;
}

// Lists the cache's blocks that a thread will attend to in the next layer, to be prefetched while it multiplies. When
// many rows are decoded, multiplying leaves the memory idle, and attention would wait for it.
void Step::collect_blocks(const RowSet& set, int layer, int thread) {
    const int32_t window = m_.layers_[size_t(layer)].window;
    std::vector<int64_t>& blocks = scratch_[size_t(thread)].blocks;
    blocks.clear();
    if (set.rows() < kManyRows || set.rows() > kMostRows) return;
    const CacheView first = m_.cache(layer, 0);
    const int64_t items = int64_t(set.units.size()) * c_.num_kv_heads, threads = pool_.active();
    for (int64_t item = items * thread / threads; item < items * (thread + 1) / threads; item++) {
        const Unit& unit = set.units[size_t(item / c_.num_kv_heads)];
        const int64_t head = m_.cache(layer, int(item % c_.num_kv_heads)).data - first.data;
        const int count = (set.contexts[size_t(unit.row0 + unit.rows - 1)] + kBlock - 1) / kBlock;
        const int first_block = first_partition(set.contexts[size_t(unit.row0)], window) * kPartitionBlocks;
        for (int b = first_block; b < count; b++) blocks.push_back(head + unit.table[b] * first.block_bytes);
    }
}

// From here on the thread prefetches the blocks of `layer`; -1: of none.
void Step::start_prefetch(int layer, int thread) {
    Scratch& s = scratch_[size_t(thread)];
    if (layer < 0 || s.blocks.empty()) {
        s.prefetch_list = {};
        return;
    }
    const CacheView kv = m_.cache(layer, 0);
    s.prefetch_list = {s.blocks.data(), s.blocks.data() + s.blocks.size(), kv.data, int(m_.head_bytes_)};
}

// Copies head `index` of the projection `all` of `heads` heads, normed and rotated.
void Step::norm_and_rotate(const float* all, int heads, int index, const std::vector<float>& norm, const Layer& layer,
                           int32_t position, float* to) const {
    const int d = c_.head_size;
    memcpy(to, all + int64_t(index) * d, size_t(d) * sizeof(float));
    if (c_.qk_norm) {
        const bool together = c_.qk_norm == MOTET_QK_NORM_PROJECTION;
        const NormStats stats = together ? isa_.norm_stats(all, c_.norm_eps, Norm::RMS, int64_t(heads) * d)
                                         : isa_.norm_stats(to, c_.norm_eps, Norm::RMS, d);
        const float* weight = norm.data() + (together ? int64_t(index) * d : 0);
        isa_.norm(to, {Norm::RMS, c_.norm_eps, weight, nullptr}, stats, 0, d, to);
    }
    if (c_.learned || layer.rotary == MOTET_NO_ROTARY) return;
    const Model::Rotary& tables = m_.rotary_[layer.rotary == MOTET_WINDOW_ROTARY];
    const int64_t at = int64_t(position) * (c_.rotary_size / 2);
    isa_.rotate(to, tables.cos.data() + at, tables.sin.data() + at, c_.rotary_size);
}

void Step::write_row(const RowSet& set, const Layer& layer, int index, int64_t row, int kv_head, const float* qkv,
                     int thread) {
    const int d = c_.head_size;
    float* key = scratch_[size_t(thread)].head;
    const float* keys = qkv + row * qkv_ld_ + q_size_;
    norm_and_rotate(keys, c_.num_kv_heads, kv_head, layer.k_norm, layer, set.contexts[size_t(row)] - 1, key);
    const int64_t slot = set.slots[size_t(row)];
    isa_.write_kv(m_.cache(index, kv_head), int(slot / kBlock), int(slot % kBlock), key,
                  keys + kv_size_ + int64_t(kv_head) * d);
}

void Step::attend(const RowSet& set, const Layer& layer, int index, const float* qkv, bool write,
                  Activations* quantise_to, int thread) {
    pool_.distribute(next_phase(thread), thread, int64_t(set.units.size()) * c_.num_kv_heads,
                     [&](int64_t item) { attend_unit(set, item, layer, index, qkv, write, quantise_to, thread); });
}

// Packs queries in chunks; query i is head i % group of row i / group.
void Step::pack_queries(const RowSet& set, const Unit& unit, const Layer& layer, int kv_head, const float* qkv,
                        Scratch& s) const {
    const int d = c_.head_size, queries = int(unit.rows) * group_;
    const float scale = kLog2e * c_.attention_scale;
    const bool tiles = attends_on_tiles(unit.rows);  // where each query is by itself
    const int most = most_queries(unit.rows);
    for (int i = 0; i < queries; i++) {
        const int64_t row = unit.row0 + i / group_;
        norm_and_rotate(qkv + row * qkv_ld_, c_.num_heads, kv_head * group_ + i % group_, layer.q_norm, layer,
                        set.contexts[size_t(row)] - 1, s.head);
        const int first = i / most * most;
        uint32_t* to = s.packed + (tiles ? int64_t(i) * (d / 2) : int64_t(first) * (d / 2) + i % most);
        isa_.pack_query(c_.kv_int8 ? KV::Int8 : KV::BF16, s.head, scale, d, to,
                        tiles ? 1 : std::min(most, queries - first), s.steps + i, s.starts + i);
    }
}

// The blocks that are attended to after partition `p` of an item: those of the unit's next partition or of the next
// item's first.
void Step::look_ahead(const RowSet& set, int64_t item, int p, int index, int32_t window,
                      const uint8_t* (&ahead)[kPartitionBlocks]) const {
    const Unit* unit = &set.units[size_t(item / c_.num_kv_heads)];
    if (unit->partition >= 0 || ++p == unit->partitions) {
        if (++item == int64_t(set.units.size()) * c_.num_kv_heads) item--;
        unit = &set.units[size_t(item / c_.num_kv_heads)];
        p = std::max(unit->partition, first_partition(set.contexts[size_t(unit->row0)], window));
    }
    const CacheView kv = m_.cache(index, int(item % c_.num_kv_heads));
    const int blocks = (set.contexts[size_t(unit->row0 + unit->rows - 1)] + kBlock - 1) / kBlock - p * kPartitionBlocks;
    for (int b = 0; b < kPartitionBlocks; b++)
        ahead[b] = b < blocks ? kv.data + unit->table[p * kPartitionBlocks + b] * kv.block_bytes : nullptr;
}

// `write`: the unit is one row; its key and value are written before its last partition is attended to.
void Step::attend_unit(const RowSet& set, int64_t item, const Layer& layer, int index, const float* qkv, bool write,
                       Activations* quantise_to, int thread) {
    const Unit& unit = set.units[size_t(item / c_.num_kv_heads)];
    const int kv_head = int(item % c_.num_kv_heads);
    Scratch& s = scratch_[size_t(thread)];
    const int d = c_.head_size, queries = int(unit.rows) * group_, most = most_queries(unit.rows);
    const int seen_first = first_partition(set.contexts[size_t(unit.row0)], layer.window);
    const int first = std::max(unit.partition, seen_first);
    const int last = unit.partition < 0 ? unit.partitions : unit.partition + 1;
    if (first < last) pack_queries(set, unit, layer, kv_head, qkv, s);  // otherwise the partition is before the window
    for (int p = first; p < last; p++) {
        AttendArgs args;
        args.kv = m_.cache(index, kv_head);
        args.blocks = unit.table + p * kPartitionBlocks;
        args.head_size = d;
        args.cap = kLog2e * c_.attention_softcap;
        args.tiles = attends_on_tiles(unit.rows);
        if (write && p + 1 == unit.partitions) write_row(set, layer, index, unit.row0, kv_head, qkv, thread);
        look_ahead(set, item, p, index, layer.window, args.ahead);
        for (int from = 0; from < queries; from += most) {
            int seen[kTileRows], unseen[kTileRows];
            args.queries = std::min(most, queries - from);
            for (int i = 0; i < args.queries; i++) {
                seen[i] = set.contexts[size_t(unit.row0 + (from + i) / group_)] - p * kPartition;
                unseen[i] = seen[i] - layer.window;
            }
            if (seen[args.queries - 1] <= 0) continue;
            args.seen = seen;
            args.unseen = unseen;
            args.packed = s.packed + int64_t(from) * (d / 2);
            args.steps = s.steps + from;
            args.starts = s.starts + from;
            args.out = p == first ? s.outs + int64_t(from) * d : s.later;
            args.maxima = p == first ? s.maxima + from : s.later_maxima;
            args.sums = p == first ? s.sums + from : s.later_sums;
            isa_.attend(args);
            std::fill_n(args.ahead, kPartitionBlocks, nullptr);  // prefetch once only
            for (int i = 0; p > first && i < args.queries; i++)
                isa_.merge(&s.maxima[from + i], &s.sums[from + i], s.outs + int64_t(from + i) * d, s.later_maxima[i],
                           s.later_sums[i], s.later + int64_t(i) * d, d);
        }
    }
    if (unit.partition < 0) {
        for (int64_t r = 0; r < unit.rows; r++)
            finish_row(s.outs + r * group_ * d, s.sums + r * group_, unit.row0 + r, kv_head, quantise_to);
        return;
    }
    float* mine = partials_ + ((unit.partial0 + unit.partition) * c_.num_kv_heads + kv_head) * partial_size_;
    if (first < last) {
        memcpy(mine, s.outs, size_t(queries * d) * sizeof(float));
        memcpy(mine + queries * d, s.maxima, size_t(queries) * sizeof(float));
        memcpy(mine + queries * (d + 1), s.sums, size_t(queries) * sizeof(float));
    }
    std::atomic<int>& arrived = arrived_[size_t(unit.partial0 * c_.num_kv_heads + kv_head)];
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == unit.partitions) {
        arrived.store(0, std::memory_order_relaxed);
        merge_partials(unit, seen_first, kv_head, quantise_to);
    }
}

// Merges in the same order as when one thread computes all partitions, so the bits are the same.
void Step::merge_partials(const Unit& unit, int first, int kv_head, Activations* quantise_to) {
    const int d = c_.head_size;
    auto partial = [&](int p) { return partials_ + ((unit.partial0 + p) * c_.num_kv_heads + kv_head) * partial_size_; };
    float* all = partial(first);
    for (int p = first + 1; p < unit.partitions; p++) {
        const float* later = partial(p);
        for (int i = 0; i < group_; i++)
            isa_.merge(&all[group_ * d + i], &all[group_ * (d + 1) + i], all + i * d, later[group_ * d + i],
                       later[group_ * (d + 1) + i], later + i * d, d);
    }
    finish_row(all, all + group_ * (d + 1), unit.row0, kv_head, quantise_to);
}

// Divides the heads of a row that share a KV head by their sums, and quantises them for the next linear layer if
// `quantise_to` is set.
void Step::finish_row(const float* outs, const float* sums, int64_t row, int kv_head, Activations* quantise_to) {
    const int d = c_.head_size, first = kv_head * group_ * d;
    float* to = attended_ + row * q_size_;
    for (int i = 0; i < group_; i++) isa_.scale_to(outs + i * d, 1.0f / sums[i], d, to + first + i * d);
    if (quantise_to) isa_.quantise(to, {}, {}, first, group_ * d, *quantise_to, row);
}

}  // namespace motet
