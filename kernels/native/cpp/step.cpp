#include "step.h"

#include <algorithm>
#include <cstring>

namespace motet {
namespace {

constexpr int64_t kFew = 6;        // up to so many rows every thread prepares all of them: cheaper than a barrier
constexpr int kSuperblock = 48;    // most register blocks whose activations stay in the L2 cache
constexpr int64_t kUnitRows = 16;  // prompt rows that share a widened partition
constexpr int64_t kFewUnits = 4;   // per thread; with fewer, the partitions of a row are spread over the threads
constexpr int64_t kFetch = 16384;  // bytes of the next weights that a thread prefetches before a barrier

int partitions_of(int64_t context) { return int((context + kPartition - 1) / kPartition); }

}  // namespace

// ---- the plan -------------------------------------------------------------------------------------------------------

Step::Step(Model& model, const MotetBatch& batch, Arena& arena, float* hidden)
    : m_(model), c_(model.config_), b_(batch), isa_(*model.isa_), pool_(model.pool_), hidden_(hidden),
      q_size_(int64_t(c_.num_heads) * c_.head_size), kv_size_(int64_t(c_.num_kv_heads) * c_.head_size),
      qkv_ld_((q_size_ + 2 * kv_size_ + kLanes - 1) / kLanes * kLanes), group_(c_.num_heads / c_.num_kv_heads),
      norm_(c_.layer_norm ? Norm::Layer : Norm::RMS), phases_(size_t(pool_.threads())) {
    const bool tails = m_.has_tails();
    std::vector<int32_t> all_sequences(size_t(b_.num_seqs));
    for (size_t s = 0; s < all_sequences.size(); s++) all_sequences[s] = int32_t(s);
    add_segment(0, c_.split_layer, tails ? -1 : 0, all_sequences);
    const int tail = c_.num_layers - c_.split_layer;
    for (int member = 0; tails && member < c_.num_members; member++) {
        const int64_t from = b_.member_offsets[member], to = b_.member_offsets[member + 1];
        if (from == to) continue;
        const int first = c_.split_layer + member * tail;
        add_segment(first, first + tail, member, std::vector<int32_t>(b_.member_seqs + from, b_.member_seqs + to));
    }
    take_scratch(arena);
}

void Step::add_segment(int first_layer, int last_layer, int member, const std::vector<int32_t>& sequences) {
    Segment segment{first_layer, last_layer, member, {}, {}, {}, {}, {}};
    std::vector<int32_t> target(size_t(b_.num_rows), -1);
    for (int64_t i = 0; member >= 0 && i < b_.num_outputs; i++)
        if (b_.output_members[i] == member) target[size_t(b_.output_rows[i])] = int32_t(i);
    for (int32_t s : sequences) {
        const int32_t* table = b_.block_tables + s * b_.max_blocks;
        const int32_t adapter = b_.adapters ? b_.adapters[s] : -1;
        const int64_t all0 = segment.all.rows(), needed0 = segment.needed.rows();
        for (int64_t row = b_.cu_seqlens[s]; row < b_.cu_seqlens[s + 1]; row++) {
            if (target[size_t(row)] >= 0) {
                segment.outputs.push_back(int32_t(segment.all.rows()));
                segment.targets.push_back(target[size_t(row)]);
                segment.needed.contexts.push_back(b_.positions[row] + 1);
                segment.needed.slots.push_back(b_.slot_mapping[row]);
                segment.needed.adapters.push_back(adapter);
            }
            segment.source.push_back(int32_t(row));
            segment.all.contexts.push_back(b_.positions[row] + 1);
            segment.all.slots.push_back(b_.slot_mapping[row]);
            segment.all.adapters.push_back(adapter);
        }
        segment.all.sequences.push_back({all0, segment.all.rows() - all0, table});
        if (segment.needed.rows() > needed0)
            segment.needed.sequences.push_back({needed0, segment.needed.rows() - needed0, table});
    }
    plan_units(segment.all);
    plan_units(segment.needed);
    segments_.push_back(std::move(segment));
}

void Step::plan_units(RowSet& set) const {
    const int64_t few = kFewUnits * pool_.threads();
    const bool apart = int64_t(set.sequences.size()) == set.rows() && set.rows() * c_.num_kv_heads < few;
    for (const RowSequence& s : set.sequences) {
        // Runs begin at tiles of positions: two positions share a word of the cache, and must have one writer.
        for (int64_t row = s.row0; row < s.row0 + s.rows; row++)
            if (row == s.row0 || set.slots[size_t(row)] % kLanes == 0) set.writes.push_back(row);
        const int64_t last = s.row0 + s.rows;
        for (int64_t row = s.row0; row < last; row += kUnitRows) {
            const int64_t rows = std::min(kUnitRows, last - row);
            const int partitions = partitions_of(set.contexts[size_t(row + rows - 1)]);
            if (!apart || partitions == 1) {
                set.units.push_back({s.table, row, rows, -1, partitions, 0});
                continue;
            }
            for (int p = 0; p < partitions; p++)
                set.units.push_back({s.table, row, rows, p, partitions, set.num_partials});
            set.num_partials += partitions;
        }
    }
    set.writes.push_back(set.rows());
}

void Step::take_scratch(Arena& arena) {
    int64_t rows = 0, needed = 0, partials = 0, tail_rows = 0;
    for (const Segment& s : segments_) {
        rows = std::max(rows, s.all.rows());
        needed = std::max(needed, s.needed.rows());
        partials = std::max({partials, s.all.num_partials, s.needed.num_partials});
        if (s.first_layer >= c_.split_layer) tail_rows = std::max(tail_rows, s.all.rows());
    }
    const int64_t d = c_.head_size, inner = (c_.intermediate_size + kLanes - 1) / kLanes * kLanes;
    const int64_t widest = std::max({m_.widest_, int64_t(c_.intermediate_size), q_size_});
    x_ = arena.take<float>(rows * c_.hidden_size);
    x_tail_ = arena.take<float>(tail_rows * c_.hidden_size);
    x_needed_ = arena.take<float>(needed * c_.hidden_size);
    qkv_ = arena.take<float>(rows * qkv_ld_);
    qkv_needed_ = arena.take<float>(needed * qkv_ld_);
    attended_ = arena.take<float>(rows * q_size_);
    inner_ = arena.take<float>(rows * inner);
    many_ = ActivationStore::make(arena, rows, widest, m_.dense_, m_.adapters_);
    many_inner_ = ActivationStore::make(arena, rows, widest, m_.dense_, m_.adapters_);
    partial_size_ = group_ * (d + 2);
    partials_ = arena.take<float>(partials * c_.num_kv_heads * partial_size_);
    arrived_ = std::make_unique<std::atomic<int>[]>(size_t(partials * c_.num_kv_heads + 1));
    const int64_t queries = std::min(kUnitRows, rows) * group_;
    for (int t = 0; t < pool_.threads(); t++) {
        Scratch s;
        s.activations = ActivationStore::make(arena, std::min(rows, kFew), widest, m_.dense_, m_.adapters_);
        s.row = arena.take<float>(widest);
        s.head = arena.take<float>(2 * kMaxHeadSize);
        s.packed = arena.take<uint32_t>(queries * d / 2);
        s.steps = arena.take<float>(queries);
        s.starts = arena.take<int32_t>(queries);
        s.outs = arena.take<float>(queries * d);
        s.later = arena.take<float>(kMaxQueries * d);
        s.maxima = arena.take<float>(queries);
        s.sums = arena.take<float>(queries);
        s.later_maxima = arena.take<float>(kMaxQueries);
        s.later_sums = arena.take<float>(kMaxQueries);
        scratch_.push_back(s);
    }
}

// ---- running it -----------------------------------------------------------------------------------------------------

void Step::execute() {
    int phases = 4;
    for (const Segment& s : segments_) phases += 16 * (s.last_layer - s.first_layer) + 8;
    pool_.reset(phases);
    lap_ = std::chrono::steady_clock::now();
    pool_.run([](void* step, int thread) { static_cast<Step*>(step)->run(thread); }, this);
}

void Step::run(int thread) {
    pool_.distribute(next_phase(thread), thread, b_.num_rows, [&](int64_t row) {
        float* to = x_ + row * c_.hidden_size;
        unpack_row(c_.tied_head ? m_.head_.packed : m_.embedding_.packed, b_.token_ids[row], to);
        if (!c_.learned) return;
        const float* position = m_.positions_.data() + int64_t(b_.positions[row]) * c_.hidden_size;
        for (int i = 0; i < c_.hidden_size; i++) to[i] += position[i];
    });
    barrier_and_time(kOther, thread);
    for (const Segment& segment : segments_) run_segment(segment, thread);
}

void Step::run_segment(const Segment& segment, int thread) {
    const bool tail = segment.first_layer >= c_.split_layer && segment.member >= 0 && &segment != &segments_[0];
    float* x = tail ? x_tail_ : x_;
    if (tail) {
        pool_.distribute(next_phase(thread), thread, segment.all.rows(), [&](int64_t row) {
            memcpy(x + row * c_.hidden_size, x_ + int64_t(segment.source[size_t(row)]) * c_.hidden_size,
                   size_t(c_.hidden_size) * sizeof(float));
        });
        barrier_and_time(kOther, thread);
    }
    const std::vector<float> none;
    bool gathered = segment.member >= 0 && segment.first_layer == segment.last_layer;  // no layers: only the norm
    if (gathered) gather(segment, x, false, thread);
    if (segment.first_layer < segment.last_layer) {
        collect_blocks(segment.all, m_.layers_[size_t(segment.first_layer)].window, thread);
        start_prefetch(segment.first_layer, thread);
    }
    for (int index = segment.first_layer; index < segment.last_layer; index++) {
        const Layer& layer = m_.layers_[size_t(index)];
        const bool last = segment.member >= 0 && index + 1 == segment.last_layer;
        const RowSet* set = &segment.all;
        const float* qkv = qkv_;
        const PackedLinear &to_out = layer.packed(kOut), &up = layer.packed(kUp), &down = layer.packed(kDown);
        Activations normed = prepare(x, c_.hidden_size, *set, layer, kQKV, norm_, layer.attention_norm,
                                     layer.attention_norm_bias, thread);
        linear(layer.packed(kQKV), normed, {qkv_, qkv_ld_, Epilogue::Store}, &to_out, thread);
        barrier_and_time(kLinears, thread);
        const bool all_needed = !last || segment.needed.rows() == set->rows();
        const bool fused = all_needed && int64_t(set->sequences.size()) == set->rows();
        if (!fused) {
            pool_.distribute(next_phase(thread), thread, int64_t(set->writes.size()) - 1, [&](int64_t i) {
                for (int64_t row = set->writes[size_t(i)]; row < set->writes[size_t(i) + 1]; row++)
                    for (int h = 0; h < c_.num_kv_heads; h++) write_row(*set, layer, index, row, h, qkv_, thread);
            });
            barrier_and_time(kAttention, thread);
        }
        if (last) {
            if (segment.needed.rows() == 0) return;
            if (!all_needed) {
                gather(segment, x, true, thread);
                set = &segment.needed;
                x = x_needed_;
                qkv = qkv_needed_;
                gathered = true;
            }
        }
        // With many rows, a thread quantises a group of columns as soon as it has computed them.
        const bool quantise_early = set->rows() > kFew;
        Activations attended = many_.take(set->rows(), to_out), inner = many_inner_.take(set->rows(), down);
        const bool quantise_attended =
            quantise_early && layer.adapters[kOut].empty() && group_ * c_.head_size % attended.unit() == 0;
        const bool quantise_inner = quantise_early && layer.adapters[kDown].empty();
        attend(*set, layer, index, qkv, fused, quantise_attended ? &attended : nullptr, thread);
        const Layer* following = index + 1 < segment.last_layer ? &m_.layers_[size_t(index) + 1] : nullptr;
        if (following && following->window != layer.window) collect_blocks(segment.all, following->window, thread);
        start_prefetch(following ? index + 1 : -1, thread);
        barrier_and_time(kAttention, thread);
        if (!quantise_attended)
            attended = prepare(attended_, q_size_, *set, layer, kOut, Norm::None, none, none, thread);
        linear(to_out, attended, {x, c_.hidden_size, Epilogue::Add}, &up, thread);
        barrier_and_time(kLinears, thread);
        Activations middle =
            prepare(x, c_.hidden_size, *set, layer, kUp, norm_, layer.mlp_norm, layer.mlp_norm_bias, thread);
        linear(up, middle,
               {inner_, c_.intermediate_size, c_.gelu ? Epilogue::Gelu : Epilogue::SwiGLU,
                quantise_inner ? &inner : nullptr},
               &down, thread);
        barrier_and_time(kLinears, thread);
        if (!quantise_inner)
            inner = prepare(inner_, c_.intermediate_size, *set, layer, kDown, Norm::None, none, none, thread);
        linear(down, inner, {x, c_.hidden_size, Epilogue::Add}, following ? &following->packed(kQKV) : nullptr, thread);
        barrier_and_time(kLinears, thread);
    }
    if (segment.member < 0) return;
    const std::vector<float>& weight = m_.final_norms_[size_t(segment.member)];
    const std::vector<float>& bias = m_.final_norm_biases_[size_t(segment.member)];
    pool_.distribute(next_phase(thread), thread, segment.needed.rows(), [&](int64_t row) {
        const int64_t from = gathered ? row : segment.outputs[size_t(row)];
        const float* source = (gathered ? x_needed_ : x) + from * c_.hidden_size;
        const NormArgs args{norm_, c_.norm_eps, weight.data(), bias.empty() ? nullptr : bias.data()};
        isa_.norm(source, args, isa_.norm_stats(source, c_.norm_eps, norm_, c_.hidden_size), 0, c_.hidden_size,
                  hidden_ + int64_t(segment.targets[size_t(row)]) * c_.hidden_size);
    });
    barrier_and_time(kOther, thread);
}

// Copies the rows that are outputs, one after the other.
void Step::gather(const Segment& segment, const float* x, bool with_queries, int thread) {
    pool_.distribute(next_phase(thread), thread, segment.needed.rows(), [&](int64_t row) {
        const int64_t from = segment.outputs[size_t(row)];
        memcpy(x_needed_ + row * c_.hidden_size, x + from * c_.hidden_size, size_t(c_.hidden_size) * sizeof(float));
        if (with_queries) memcpy(qkv_needed_ + row * qkv_ld_, qkv_ + from * qkv_ld_, size_t(q_size_) * sizeof(float));
    });
    barrier_and_time(kOther, thread);
}

// x normed and quantised for a linear layer, and A x for rows with a low-rank update of it. If there are few rows,
// every thread computes all of them.
Activations Step::prepare(const float* x, int64_t ld, const RowSet& set, const Layer& layer, Module module, Norm norm,
                          const std::vector<float>& weight, const std::vector<float>& bias, int thread) {
    const PackedLinear& w = layer.packed(module);
    const bool few = set.rows() <= kFew;
    Scratch& s = scratch_[size_t(thread)];
    const ActivationStore& store = few ? s.activations : many_;
    Activations out = store.take(set.rows(), w);
    const std::vector<Adapter>& adapters = layer.adapters[module];
    if (!adapters.empty()) out.low_rank = store.low_rank;
    const NormArgs args{norm, c_.norm_eps, weight.data(), bias.empty() ? nullptr : bias.data()};
    auto one = [&](int64_t row, int64_t first, int64_t size) {
        const float* from = x + row * ld;
        const NormStats stats = isa_.norm_stats(from, c_.norm_eps, norm, w.k);
        isa_.quantise(from, args, stats, first, size, out, row);
        if (adapters.empty() || first > 0) return;
        const int32_t member = set.adapters[size_t(row)];
        const LowRank* update =
            member >= 0 && adapters[size_t(member)].view.rank ? &adapters[size_t(member)].view : nullptr;
        store.low_rank[row] = update;
        if (!update) return;
        isa_.norm(from, args, stats, 0, w.k, s.row);
        isa_.reduce(s.row, *update, w.k, store.inner + row * kMaxRank);
    };
    if (few) {
        for (int64_t row = 0; row < set.rows(); row++) one(row, 0, w.k);
        return out;
    }
    // The rows of a register block are interleaved, so a thread takes some columns of all of them, not some rows.
    const int64_t unit = out.unit(), units = w.k / unit;
    const int64_t cuts = std::min<int64_t>(units, out.blocks >= 4 * pool_.threads() ? 1 : 2 * pool_.threads());
    pool_.distribute(next_phase(thread), thread, out.blocks * cuts, [&](int64_t item) {
        const int64_t cut = item % cuts, first = units * cut / cuts * unit, last = units * (cut + 1) / cuts * unit;
        const int block = int(item / cuts);
        for (int64_t row = out.first_row(block); row < out.first_row(block + 1); row++) one(row, first, last - first);
    });
    barrier_and_time(kOther, thread);
    return out;
}

// Panels are handed out to the threads, in multiples of a quantisation group when the output is quantised for the next
// layer.
void Step::linear(const PackedLinear& w, const Activations& x, const Output& out, const PackedLinear* next,
                  int thread) {
    const int64_t columns = out.epilogue == Epilogue::SwiGLU ? kPanel / 2 : kPanel;
    const int64_t together = out.quantise_to ? std::max<int64_t>(1, out.quantise_to->unit() / columns) : 1;
    const int64_t items = (w.panels + together - 1) / together;
    const int64_t superblocks = (x.blocks + kSuperblock - 1) / kSuperblock;
    pool_.distribute(next_phase(thread), thread, items * superblocks, [&](int64_t item) {
        const int64_t panel = item % items * together, end = std::min(panel + together, w.panels);
        const int64_t part = item / items;
        const int first = int(x.blocks * part / superblocks), last = int(x.blocks * (part + 1) / superblocks);
        isa_.linear(w, x, first, last, panel, end, out.to, out.ld, out.epilogue,
                    &scratch_[size_t(thread)].prefetch_list);
        if (!out.quantise_to) return;
        const int64_t from = panel * columns, size = std::min(end * columns, out.quantise_to->k) - from;
        for (int64_t row = x.first_row(first); row < x.first_row(last); row++)
            isa_.quantise(out.to + row * out.ld, {}, {}, from, size, *out.quantise_to, row);
    });
    if (!next || superblocks > 1) return;  // prefetch: the first of the next weights arrive during the barrier
    const uint8_t* mine = next->data + next->panels * thread / pool_.active() * next->panel_bytes;
    for (int64_t at = 0; at < std::min(kFetch, next->panel_bytes); at += 64) __builtin_prefetch(mine + at, 0, 2);
}

void Step::barrier_and_time(Part part, int thread) {
    pool_.barrier();
    if (thread) return;
    const auto now = std::chrono::steady_clock::now();
    m_.seconds_[part] += std::chrono::duration<double>(now - lap_).count();
    lap_ = now;
}

}  // namespace motet
