#include "step.h"

#include <algorithm>
#include <cstring>

namespace motet {
namespace {

constexpr int64_t kFew = 6;           // up to so many rows every thread prepares all of them: cheaper than a barrier
constexpr int64_t kSuperblock = 288;  // most rows whose activations stay in the L2 cache
constexpr int64_t kUnitRows = 16;     // prompt rows that share a widened partition
constexpr int64_t kFewUnits = 4;      // per thread; with fewer, the partitions of a row are spread over the threads
constexpr int64_t kFetch = 16384;     // bytes of the next weights that a thread prefetches before a barrier

int partitions_of(int64_t context) { return int((context + kPartition - 1) / kPartition); }

}  // namespace

// ---- the plan -------------------------------------------------------------------------------------------------------

Step::Step(Model& model, const MotetBatch& batch, Arena& arena, float* hidden)
    : m_(model), c_(model.config_), b_(batch), isa_(*model.isa_), pool_(model.pool_), hidden_(hidden),
      q_size_(int64_t(c_.num_heads) * c_.head_size), kv_size_(int64_t(c_.num_kv_heads) * c_.head_size),
      qkv_ld_((q_size_ + 2 * kv_size_ + kLanes - 1) / kLanes * kLanes), group_(c_.num_heads / c_.num_kv_heads),
      norm_(c_.layer_norm ? Norm::Layer : Norm::RMS), phases_(size_t(pool_.threads())) {
    add_trunk();
    for (int tail = 0; tail < c_.num_tails; tail++) add_tail(tail, arena);
    take_scratch(arena);
}

// The result's row of each row of the batch that is an output of `member`; -1: it is none.
std::vector<int32_t> Step::targets_of(int member) const {
    std::vector<int32_t> result(size_t(b_.num_rows), -1);
    for (int64_t i = 0; i < b_.num_outputs; i++)
        if (b_.output_members[i] == member) result[size_t(b_.output_rows[i])] = int32_t(i);
    return result;
}

void Step::add_trunk() {
    const bool tails = m_.has_tails();
    Segment segment{0, c_.split_layer, false, !tails, {}, {}, {}, {}, {}};
    const std::vector<int32_t> targets = tails ? std::vector<int32_t>(size_t(b_.num_rows), -1) : targets_of(0);
    trunk_row_.assign(size_t(b_.num_rows), -1);
    for (int32_t s = 0; s < b_.num_seqs; s++)
        if (!b_.trunk_cached || !b_.trunk_cached[s])
            add_rows(segment, tails ? -1 : 0, s, b_.block_tables + s * b_.max_blocks, targets);
    for (size_t i = 0; i < segment.source.size(); i++) trunk_row_[size_t(segment.source[i])] = int32_t(i);
    add(std::move(segment));
}

void Step::add_tail(int tail, Arena& arena) {
    const int layers = m_.tail_layers(), first = c_.split_layer + tail * layers;
    Segment segment{first, first + layers, true, true, {}, {}, {}, {}, {}};
    for (int member = 0; member < c_.num_members; member++) {
        if (m_.tail_of_[size_t(member)] != tail) continue;
        const int64_t from = b_.member_offsets[member], to = b_.member_offsets[member + 1];
        if (from == to) continue;
        const std::vector<int32_t> targets = targets_of(member);
        for (int64_t i = from; i < to; i++) {
            const int32_t s = b_.member_seqs[i];
            add_rows(segment, member, s, area_table(member, s, arena), targets);
        }
    }
    add(std::move(segment));
}

// A sequence's table of the member's areas. Those of blocks that the member's tail has not run over are taken.
const int32_t* Step::area_table(int member, int32_t sequence, Arena& arena) {
    const int32_t* table = b_.block_tables + sequence * b_.max_blocks;
    const int64_t blocks = (b_.context_lens[sequence] + kBlock - 1) / kBlock;
    int32_t* areas = arena.take<int32_t>(blocks);
    for (int64_t i = 0; i < blocks; i++) areas[i] = m_.areas_.take(member, table[i]);
    return areas;
}

void Step::add_rows(Segment& segment, int member, int32_t sequence, const int32_t* table,
                    const std::vector<int32_t>& targets) const {
    const int64_t all0 = segment.all.rows(), needed0 = segment.needed.rows();
    auto add = [&](RowSet& set, int64_t row) {
        const int32_t position = b_.positions[row];
        set.contexts.push_back(position + 1);
        set.slots.push_back(int64_t(table[position / kBlock]) * kBlock + position % kBlock);
        set.members.push_back(member);
    };
    for (int64_t row = b_.cu_seqlens[sequence]; row < b_.cu_seqlens[sequence + 1]; row++) {
        if (targets[size_t(row)] >= 0) {
            segment.outputs.push_back(int32_t(segment.all.rows()));
            segment.targets.push_back(targets[size_t(row)]);
            add(segment.needed, row);
        }
        segment.source.push_back(int32_t(row));
        add(segment.all, row);
    }
    segment.all.sequences.push_back({all0, segment.all.rows() - all0, table});
    if (segment.needed.rows() > needed0)
        segment.needed.sequences.push_back({needed0, segment.needed.rows() - needed0, table});
}

void Step::add(Segment&& segment) {
    if (segment.all.rows() == 0) return;
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
    for (int64_t row = 0; row < set.rows(); row++)
        if (set.runs.empty() || row - set.runs.back() == kRunRows ||
            set.members[size_t(row)] != set.members[size_t(row) - 1])
            set.runs.push_back(row);
    set.runs.push_back(set.rows());
}

void Step::take_scratch(Arena& arena) {
    int64_t rows = 1, needed = 0, partials = 0, tail_rows = 0;
    for (const Segment& s : segments_) {
        rows = std::max(rows, s.all.rows());
        needed = std::max(needed, s.needed.rows());
        partials = std::max({partials, s.all.num_partials, s.needed.num_partials});
        if (s.tail) tail_rows = std::max(tail_rows, s.all.rows());
    }
    const int64_t d = c_.head_size, inner = (c_.intermediate_size + kLanes - 1) / kLanes * kLanes;
    const int64_t widest = std::max({m_.widest_, int64_t(c_.intermediate_size), q_size_});
    x_ = arena.take<float>(b_.num_rows * c_.hidden_size);
    x_tail_ = arena.take<float>(tail_rows * c_.hidden_size);
    x_needed_ = arena.take<float>(needed * c_.hidden_size);
    qkv_ = arena.take<float>(rows * qkv_ld_);
    qkv_needed_ = arena.take<float>(needed * qkv_ld_);
    attended_ = arena.take<float>(rows * q_size_);
    inner_ = arena.take<float>(rows * inner);
    many_ = ActivationStore::make(arena, isa_, rows, widest, m_.dense_, m_.adapters_);
    many_inner_ = ActivationStore::make(arena, isa_, rows, widest, m_.dense_, m_.adapters_);
    if (c_.num_experts) {
        const int64_t pairs = rows * c_.experts_per_token;
        const int64_t longest = std::max(c_.hidden_size, c_.expert_size);
        router_ld_ = (c_.num_experts + kLanes - 1) / kLanes * kLanes;
        router_ = arena.take<float>(rows * router_ld_);
        chosen_ = arena.take<int32_t>(pairs);
        pair_row_ = arena.take<int32_t>(pairs);
        row_pairs_ = arena.take<int32_t>(pairs);
        shares_ = arena.take<float>(pairs);
        pair_inner_ = arena.take<float>(pairs * c_.expert_size);
        pair_out_ = arena.take<float>(pairs * c_.hidden_size);
        const int64_t stored = pairs + (isa_.tiles ? std::min<int64_t>(pairs, c_.num_experts) * (kTileBlock - 1) : 0);
        pairs_ = ActivationStore::make(arena, isa_, stored, longest, m_.dense_, false);
        pairs_inner_ = ActivationStore::make(arena, isa_, stored, longest, m_.dense_, false);
    }
    if (m_.changes_branches()) branch_ = arena.take<float>(rows * c_.hidden_size);
    partial_size_ = group_ * (d + 2);
    partials_ = arena.take<float>(partials * c_.num_kv_heads * partial_size_);
    arrived_ = std::make_unique<std::atomic<int>[]>(size_t(partials * c_.num_kv_heads + 1));
    const int64_t most = most_queries(std::min(kUnitRows, rows));
    const int64_t queries = (std::min(kUnitRows, rows) * group_ + most - 1) / most * most;  // whole chunks
    for (int t = 0; t < pool_.threads(); t++) {
        Scratch s;
        s.activations = ActivationStore::make(arena, isa_, std::min(rows, kFew), widest, m_.dense_, m_.adapters_);
        s.rows = arena.take<float>(kRunRows * widest);
        s.head = arena.take<float>(2 * kMaxHeadSize);
        s.order = arena.take<int32_t>(c_.num_experts);
        s.room = m_.panel_room(arena, widest);
        s.packed = arena.take<uint32_t>(queries * d / 2);
        s.steps = arena.take<float>(queries);
        s.starts = arena.take<int32_t>(queries);
        s.outs = arena.take<float>(queries * d);
        s.later = arena.take<float>(most * d);
        s.maxima = arena.take<float>(queries);
        s.sums = arena.take<float>(queries);
        s.later_maxima = arena.take<float>(most);
        s.later_sums = arena.take<float>(most);
        scratch_.push_back(s);
    }
}

// ---- running it -----------------------------------------------------------------------------------------------------

void Step::execute() {
    int phases = 4;
    for (const Segment& s : segments_) phases += 24 * (s.last_layer - s.first_layer) + 8;
    pool_.reset(phases);
    lap_ = std::chrono::steady_clock::now();
    pool_.run([](void* step, int thread) { static_cast<Step*>(step)->run(thread); }, this);
}

// The embedding that is given for a row of the batch; null if its token is looked up.
const float* Step::embedded(int64_t row) const {
    const int32_t* end = b_.embedded_rows + b_.num_embedded;
    const int32_t* found = b_.num_embedded ? std::lower_bound(b_.embedded_rows, end, int32_t(row)) : end;
    return found == end || *found != row ? nullptr : b_.embedded + (found - b_.embedded_rows) * c_.hidden_size;
}

void Step::run(int thread) {
    pool_.distribute(next_phase(thread), thread, b_.num_rows, [&](int64_t row) {
        if (trunk_row_[size_t(row)] < 0) return;
        float* to = x_ + int64_t(trunk_row_[size_t(row)]) * c_.hidden_size;
        if (const float* given = embedded(row)) {
            memcpy(to, given, size_t(c_.hidden_size) * sizeof(float));
        } else {
            unpack_row(c_.tied_head ? m_.head_.packed : m_.embedding_.packed, b_.token_ids[row], to);
            if (c_.embedding_scale != 1.0f)
                for (int i = 0; i < c_.hidden_size; i++) to[i] *= c_.embedding_scale;
        }
        if (!c_.learned) return;
        const float* position = m_.positions_.data() + int64_t(b_.positions[row]) * c_.hidden_size;
        for (int i = 0; i < c_.hidden_size; i++) to[i] += position[i];
    });
    barrier_and_time(kOther, thread);
    for (const Segment& segment : segments_) {
        run_segment(segment, thread);
        if (!segment.tail && m_.keeps_trunk()) keep_trunk(segment, thread);
    }
}

// Puts the trunk's output of each row into its block. It is read in later steps only.
void Step::keep_trunk(const Segment& segment, int thread) {
    pool_.distribute(next_phase(thread), thread, segment.all.rows(), [&](int64_t row) {
        memcpy(m_.trunk_output(segment.all.slots[size_t(row)]), x_ + row * c_.hidden_size,
               size_t(c_.hidden_size) * sizeof(float));
    });
}

// Copies the trunk's output of each row: this step's, or the one that its block keeps.
void Step::enter_tail(const Segment& segment, float* x, int thread) {
    pool_.distribute(next_phase(thread), thread, segment.all.rows(), [&](int64_t row) {
        const int32_t source = segment.source[size_t(row)], own = trunk_row_[size_t(source)];
        const float* from = own < 0 ? m_.trunk_output(b_.slot_mapping[source]) : x_ + int64_t(own) * c_.hidden_size;
        memcpy(x + row * c_.hidden_size, from, size_t(c_.hidden_size) * sizeof(float));
    });
    barrier_and_time(kOther, thread);
}

void Step::run_segment(const Segment& segment, int thread) {
    float* x = segment.tail ? x_tail_ : x_;
    if (segment.tail) enter_tail(segment, x, thread);
    bool gathered = segment.ends && segment.first_layer == segment.last_layer;  // no layers: only the norm
    if (gathered) gather(segment, x, false, thread);
    if (segment.first_layer < segment.last_layer) {
        collect_blocks(segment.all, segment.first_layer, thread);
        start_prefetch(segment.first_layer, thread);
    }
    for (int index = segment.first_layer; index < segment.last_layer; index++) {
        const Layer& layer = m_.layers_[size_t(index)];
        const bool last = segment.ends && index + 1 == segment.last_layer;
        const RowSet* set = &segment.all;
        const float* qkv = qkv_;
        const bool routed = !layer.experts.empty();
        const PackedLinear& to_out = layer.packed(kOut);
        const Input attention_input{x, c_.hidden_size, norm_args(layer.attention_norm, layer.attention_norm_bias)};
        const Activations normed = prepare(attention_input, *set, layer, kQKV, thread);
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
        Activations attended = many_.take(set->rows(), to_out);
        const bool quantise_attended = quantise_early && group_ * c_.head_size % attended.unit() == 0;
        attend(*set, layer, index, qkv, fused, quantise_attended ? &attended : nullptr, thread);
        const Layer* following = index + 1 < segment.last_layer ? &m_.layers_[size_t(index) + 1] : nullptr;
        if (following && following->window != layer.window) collect_blocks(segment.all, index + 1, thread);
        start_prefetch(following ? index + 1 : -1, thread);
        barrier_and_time(kAttention, thread);
        const Input out_input{attended_, q_size_, {}};
        if (quantise_attended)
            add_updates(out_input, *set, layer, kOut, attended, thread);
        else
            attended = prepare(out_input, *set, layer, kOut, thread);
        const Output add{branch_ ? branch_ : x, c_.hidden_size, branch_ ? Epilogue::Store : Epilogue::Add};
        linear(to_out, attended, add, &layer.packed(routed ? kRouter : kUp), thread);
        barrier_and_time(kLinears, thread);
        const bool parallel = c_.parallel_residual;  // both are added to branch_, then to x
        if (branch_ && !parallel)
            add_branch(*set, norm_args(layer.attention_out_norm, layer.attention_out_norm_bias), x, thread);
        const Input mlp_input{x, c_.hidden_size, norm_args(layer.mlp_norm, layer.mlp_norm_bias)};
        if (routed) {
            run_experts(layer, *set, mlp_input, branch_ ? branch_ : x, !branch_, thread);
            if (branch_) add_branch(*set, norm_args(layer.mlp_out_norm, layer.mlp_out_norm_bias), x, thread);
            continue;
        }
        const PackedLinear &up = layer.packed(kUp), &down = layer.packed(kDown);
        Activations inner = many_inner_.take(set->rows(), down);
        const Activations middle = prepare(mlp_input, *set, layer, kUp, thread);
        linear(up, middle,
               {inner_, c_.intermediate_size, kActivations[c_.activation], quantise_early ? &inner : nullptr}, &down,
               thread);
        barrier_and_time(kLinears, thread);
        const Input down_input{inner_, c_.intermediate_size, {}};
        if (quantise_early)
            add_updates(down_input, *set, layer, kDown, inner, thread);
        else
            inner = prepare(down_input, *set, layer, kDown, thread);
        const Output add_mlp{add.to, add.ld, parallel ? Epilogue::Add : add.epilogue};
        linear(down, inner, add_mlp, following ? &following->packed(kQKV) : nullptr, thread);
        barrier_and_time(kLinears, thread);
        if (branch_) add_branch(*set, norm_args(layer.mlp_out_norm, layer.mlp_out_norm_bias), x, thread);
    }
    if (!segment.ends) return;
    pool_.distribute(next_phase(thread), thread, segment.needed.rows(), [&](int64_t row) {
        const size_t member = size_t(segment.needed.members[size_t(row)]);
        const std::vector<float>&weight = m_.final_norms_[member], &bias = m_.final_norm_biases_[member];
        const int64_t from = gathered ? row : segment.outputs[size_t(row)];
        const float* source = (gathered ? x_needed_ : x) + from * c_.hidden_size;
        isa_.norm(source, norm_args(weight, bias), isa_.norm_stats(source, c_.norm_eps, norm_, c_.hidden_size), 0,
                  c_.hidden_size, hidden_ + int64_t(segment.targets[size_t(row)]) * c_.hidden_size);
    });
    barrier_and_time(kOther, thread);
}

// Without a weight there is no norm.
NormArgs Step::norm_args(const std::vector<float>& weight, const std::vector<float>& bias) const {
    if (weight.empty()) return {};
    return {norm_, c_.norm_eps, weight.data(), bias.empty() ? nullptr : bias.data()};
}

// x += scale · norm(branch_), for the rows of the set.
void Step::add_branch(const RowSet& set, const NormArgs& norm, float* x, int thread) {
    pool_.distribute(next_phase(thread), thread, set.rows(), [&](int64_t row) {
        float *from = branch_ + row * c_.hidden_size, *to = x + row * c_.hidden_size;
        if (norm.kind != Norm::None)
            isa_.norm(from, norm, isa_.norm_stats(from, c_.norm_eps, norm.kind, c_.hidden_size), 0, c_.hidden_size,
                      from);
        for (int i = 0; i < c_.hidden_size; i++) to[i] += c_.residual_scale * from[i];
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

// The input of a linear layer normed and quantised. If there are few rows, every thread quantises all of them.
Activations Step::prepare(const Input& input, const RowSet& set, const Layer& layer, Module module, int thread) {
    const PackedLinear& w = layer.packed(module);
    const bool few = set.rows() <= kFew;
    Activations out = (few ? scratch_[size_t(thread)].activations : many_).take(set.rows(), w);
    auto quantise = [&](int64_t row, int64_t first, int64_t size) {
        const float* from = input.x + row * input.ld;
        const NormStats stats = isa_.norm_stats(from, c_.norm_eps, input.norm.kind, w.k);
        isa_.quantise(from, input.norm, stats, first, size, out, row);
    };
    if (few) {
        for (int64_t row = 0; row < set.rows(); row++) quantise(row, 0, w.k);
        add_updates(input, set, layer, module, out, thread);
        return out;
    }
    // The rows of a register block are interleaved, so a thread takes some columns of all of them, not some rows.
    const int64_t unit = out.unit(), units = w.k / unit;
    const int64_t cuts = std::min<int64_t>(units, out.blocks >= 4 * pool_.threads() ? 1 : 2 * pool_.threads());
    pool_.distribute(next_phase(thread), thread, out.blocks * cuts, [&](int64_t item) {
        const int64_t cut = item % cuts, first = units * cut / cuts * unit, last = units * (cut + 1) / cuts * unit;
        const int block = int(item / cuts);
        for (int64_t row = out.first_row(block); row < out.first_row(block + 1); row++)
            quantise(row, first, last - first);
    });
    if (layer.ranks[module])
        add_updates(input, set, layer, module, out, thread);
    else
        barrier_and_time(kOther, thread);
    return out;
}

// A x of the rows with low-rank updates, some ranks of a row by each thread. Ends with a barrier if there are any.
void Step::add_updates(const Input& input, const RowSet& set, const Layer& layer, Module module, Activations& to,
                       int thread) {
    const int chunks = (layer.ranks[module] + kRankChunk - 1) / kRankChunk;
    if (!chunks) return;
    to.low_rank = many_.low_rank;
    to.inner = many_.inner;
    pool_.distribute(next_phase(thread), thread, (int64_t(set.runs.size()) - 1) * chunks, [&](int64_t item) {
        const int64_t run = item / chunks, first = item % chunks * kRankChunk;
        const int64_t row = set.runs[size_t(run)], end = set.runs[size_t(run) + 1];
        const int32_t member = set.members[size_t(row)];
        const LowRank* update = member < 0 ? nullptr : &layer.adapters[module][size_t(member)].view;
        if (update && !update->rank) update = nullptr;
        if (first == 0) std::fill(many_.low_rank + row, many_.low_rank + end, update);
        if (!update || first >= update->rank) return;
        const float* x = input.x + row * input.ld;
        int64_t ld = input.ld;
        if (input.norm.kind != Norm::None) {
            float* normed = scratch_[size_t(thread)].rows;
            for (int64_t r = row; r < end; r++) {
                const float* from = input.x + r * input.ld;
                const NormStats stats = isa_.norm_stats(from, c_.norm_eps, input.norm.kind, to.k);
                isa_.norm(from, input.norm, stats, 0, to.k, normed + (r - row) * to.k);
            }
            x = normed;
            ld = to.k;
        }
        isa_.reduce(x, ld, int(end - row), *update, to.k, int(first), many_.inner + row * kMaxRank);
    });
    barrier_and_time(kLinears, thread);
}

// Panels are handed out to the threads, in multiples of a quantisation group when the output is quantised for the next
// layer.
void Step::linear(const PackedLinear& w, const Activations& x, const Output& out, const PackedLinear* next,
                  int thread) {
    const int64_t columns = is_gated(out.epilogue) ? kPanel / 2 : kPanel;
    const int64_t together = out.quantise_to ? std::max<int64_t>(1, out.quantise_to->unit() / columns) : 1;
    const int64_t items = (w.panels + together - 1) / together;
    const int64_t superblocks = (x.rows + kSuperblock - 1) / kSuperblock;
    pool_.distribute(next_phase(thread), thread, items * superblocks, [&](int64_t item) {
        const int64_t panel = item % items * together, end = std::min(panel + together, w.panels);
        const int64_t part = item / items;
        const int first = int(x.blocks * part / superblocks), last = int(x.blocks * (part + 1) / superblocks);
        isa_.linear(w, x, first, last, panel, end, out.to, out.ld, out.epilogue,
                    &scratch_[size_t(thread)].prefetch_list, scratch_[size_t(thread)].room);
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
