#include "model.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <stdexcept>

#include "step.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

namespace motet {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kSlack = 1 << 16;  // prefetches and whole vectors may read past the end

}  // namespace

Pages::Pages(size_t bytes) : size_((bytes + kSlack + kHugePage - 1) / kHugePage * kHugePage) {
    void* memory =
        mmap(nullptr, size_ + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    const uintptr_t start = uintptr_t(memory), aligned = (start + kHugePage - 1) / kHugePage * kHugePage;
    if (aligned != start) munmap(memory, aligned - start);
    if (start + kHugePage != aligned) munmap((void*)(aligned + size_), start + kHugePage - aligned);
    data_ = (uint8_t*)aligned;
#if defined(MADV_HUGEPAGE)
    madvise(data_, size_, MADV_HUGEPAGE);
#endif
}

Pages::Pages(Pages&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr; }

Pages& Pages::operator=(Pages&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

Pages::~Pages() {
    if (!data_) return;
    ASAN_UNPOISON_MEMORY_REGION(data_, size_);
    munmap(data_, size_);
}

void Arena::reset() {
    if (chunks_.size() > 1) chunks_.erase(chunks_.begin(), chunks_.end() - 1);  // the last one is the largest
    used_ = 0;
}

uint8_t* Arena::take_bytes(size_t bytes) {
    const size_t padded = (bytes + 127) / 128 * 128 + 128;
    if (chunks_.empty() || used_ + padded > chunks_.back().size() - kSlack) {
        const size_t last = chunks_.empty() ? 0 : chunks_.back().size();
        chunks_.emplace_back(std::max(2 * last, padded));
        used_ = 0;
    }
    uint8_t* result = chunks_.back().data() + used_;
    ASAN_POISON_MEMORY_REGION(result, padded);
    ASAN_UNPOISON_MEMORY_REGION(result, bytes);
    used_ += padded;
    return result;
}

ActivationStore ActivationStore::make(Arena& arena, const Isa& isa, int64_t rows, int64_t k, bool dense,
                                      bool adapters) {
    const int64_t groups = k / 16;  // of the smallest size
    ActivationStore store;
    store.tiles = isa.tiles;
    store.inner = adapters ? arena.take<float>(rows * kMaxRank) : nullptr;
    store.low_rank = adapters ? arena.take<const LowRank*>(rows) : nullptr;
    if (store.tiles) rows = (rows + kTileBlock - 1) / kTileBlock * kTileBlock;
    store.quads = arena.take<int32_t>(rows * k / 4);
    store.starts = arena.take<int32_t>(rows * groups);
    store.scales = arena.take<float>(rows * groups);
    store.sums = arena.take<float>(rows * groups);
    store.dense = dense ? arena.take<float>(rows * k) : nullptr;
    return store;
}

Activations ActivationStore::take(int64_t rows, const PackedLinear& w) const {
    Activations x;
    x.rows = rows;
    x.k = w.k;
    x.group = w.group;
    x.groups = w.groups;
    x.tiles = tiles && rows > kRows && w.bits != 32;
    const int most = x.tiles ? kTileBlock : kRows;
    x.blocks = int((rows + most - 1) / most);
    x.quads = quads;
    x.starts = starts;
    x.scales = scales;
    x.sums = sums;
    x.dense = w.bits == 32 ? dense : nullptr;
    x.inner = inner;
    return x;
}

int32_t Areas::take(int64_t member, int64_t block) {
    int32_t& area = of_[size_t(member * blocks_ + block)];
    if (area < 0 && free_.empty()) {
        area = next_++;
    } else if (area < 0) {
        area = free_.back();
        free_.pop_back();
    }
    return area;
}

void Areas::release(int64_t block) {
    for (size_t i = size_t(block); i < of_.size(); i += size_t(blocks_)) {
        if (of_[i] >= 0) free_.push_back(of_[i]);
        of_[i] = -1;
    }
}

Model::Model(const MotetConfig& config, const Isa* isa)
    : config_(config), isa_(isa), pool_(config.threads, isa->leave),
      areas_(config.num_tails ? config.num_members : 0, config.num_blocks) {
    if (has_tails()) tail_of_.assign(config.tail_of, config.tail_of + config.num_members);
    layers_.resize(size_t(config.split_layer + config.num_tails * tail_layers()));
    for (Layer& layer : layers_) layer.window = config.max_positions;
    final_norms_.resize(size_t(config.num_members));
    final_norm_biases_.resize(final_norms_.size());
    const int64_t d = config.head_size, blocks = config.num_blocks;
    head_bytes_ = config.kv_int8 ? d * kBlock * 2 + 2 * kBlock * int64_t(sizeof(float)) : d * kBlock * 4;
    layer_bytes_ = head_bytes_ * config.num_kv_heads;
    // A block and an area hold all their layers, so memory is touched as they are used.
    block_bytes_ = layer_bytes_ * config.split_layer;
    if (keeps_trunk()) block_bytes_ += kBlock * config.hidden_size * int64_t(sizeof(float));
    area_bytes_ = layer_bytes_ * tail_layers();
    if (block_bytes_) cache_ = Pages(size_t(block_bytes_ * blocks));
    if (has_tails() && area_bytes_) tail_cache_ = Pages(size_t(area_bytes_ * config.num_members * blocks));
}

CacheView Model::cache(int layer, int kv_head) const {
    const KV kind = config_.kv_int8 ? KV::Int8 : KV::BF16;
    const int64_t head = kv_head * head_bytes_;
    if (layer < config_.split_layer)
        return {cache_.data() + layer * layer_bytes_ + head, block_bytes_, config_.head_size, kind};
    const int own = (layer - config_.split_layer) % tail_layers();
    return {tail_cache_.data() + own * layer_bytes_ + head, area_bytes_, config_.head_size, kind};
}

float* Model::trunk_output(int64_t slot) const {
    uint8_t* block = cache_.data() + slot / kBlock * block_bytes_ + config_.split_layer * layer_bytes_;
    return (float*)block + slot % kBlock * config_.hidden_size;
}

void Model::set_linear(MotetLinear which, int layer, int expert, const MotetTensor& t) {
    const int64_t hidden = config_.hidden_size, q = int64_t(config_.num_heads) * config_.head_size;
    const int64_t kv = int64_t(config_.num_kv_heads) * config_.head_size;
    const int64_t inner = expert < 0 ? config_.intermediate_size : config_.expert_size;
    struct Shape {
        int64_t rows, columns;
    } expected[] = {{q + 2 * kv, hidden},
                    {hidden, q},
                    {gated() ? 2 * inner : inner, hidden},
                    {hidden, inner},
                    {config_.num_experts, hidden},
                    {config_.vocab_size, hidden},
                    {config_.vocab_size, hidden}};
    if (which < MOTET_QKV || which > MOTET_EMBEDDING) throw std::invalid_argument("no such linear layer");
    const bool own_layer = which <= MOTET_ROUTER;
    if (own_layer) linear_at(which, layer, expert);
    if (which == MOTET_ROUTER && !t.dense) throw std::invalid_argument("a router is not quantised");
    if (t.rows != expected[which].rows || t.columns != expected[which].columns)
        throw std::invalid_argument("it is [" + std::to_string(t.rows) + ", " + std::to_string(t.columns) +
                                    "], the model needs [" + std::to_string(expected[which].rows) + ", " +
                                    std::to_string(expected[which].columns) + "]");
    if ((t.values == nullptr) == (t.dense == nullptr))
        throw std::invalid_argument("it needs values or dense weights, one of them");
    if (t.values) {
        if (t.bits != 4 && t.bits != 8)
            throw std::invalid_argument("bits must be 4 or 8, got " + std::to_string(t.bits));
        if (t.group_size != 16 && t.group_size != 32 && t.group_size != 64 && t.group_size != 128)
            throw std::invalid_argument("group_size must be 16, 32, 64 or 128, got " + std::to_string(t.group_size));
        if (t.columns % t.group_size) throw std::invalid_argument("group_size does not divide its columns");
        if (!t.scales || (t.bits == 4 && !t.minima)) throw std::invalid_argument("scales or minima are missing");
    }
    auto packed = std::make_shared<Linear>(pack(t, which == MOTET_UP && gated(), pool_, weights_));
    widest_ = std::max(widest_, t.columns);
    dense_ = dense_ || t.dense;
    if (own_layer) {
        linear_at(which, layer, expert) = std::move(packed);
    } else {
        (which == MOTET_HEAD ? head_ : embedding_) = std::move(*packed);
    }
}

Layer& Model::layer_at(int index) {
    if (index < 0 || size_t(index) >= layers_.size())
        throw std::invalid_argument("there is no layer " + std::to_string(index));
    return layers_[size_t(index)];
}

std::shared_ptr<const Linear>& Model::linear_at(MotetLinear which, int index, int expert) {
    if (which < MOTET_QKV || which > MOTET_ROUTER) throw std::invalid_argument("no such linear layer");
    Layer& layer = layer_at(index);
    if (which == MOTET_ROUTER && !config_.num_experts) throw std::invalid_argument("the model has no experts");
    if (expert < 0) return layer.linears[which];
    if ((which != MOTET_UP && which != MOTET_DOWN) || expert >= config_.num_experts)
        throw std::invalid_argument("there is no expert " + std::to_string(expert) + " of this linear layer");
    layer.experts.resize(size_t(config_.num_experts));
    Expert& own = layer.experts[size_t(expert)];
    return which == MOTET_UP ? own.up : own.down;
}

void Model::share_linear(MotetLinear which, int layer, int expert, int source) {
    const std::shared_ptr<const Linear> found = linear_at(which, source, expert);
    linear_at(which, layer, expert) = found;
}

void Model::set_adapter(MotetLinear which, int layer, int member, int64_t rank, const float* a, int64_t columns,
                        const float* b, int64_t rows) {
    if (which < MOTET_QKV || which > MOTET_DOWN) throw std::invalid_argument("no such linear layer");
    if (member < 0 || member >= config_.num_members)
        throw std::invalid_argument("there is no member " + std::to_string(member));
    if (has_tails() && layer < config_.split_layer)
        throw std::invalid_argument("layer " + std::to_string(layer) + " is below split_layer " +
                                    std::to_string(config_.split_layer) + ", and members share it");
    Layer& to = layer_at(layer);
    if (!to.linears[which]) throw std::invalid_argument("an adapter comes after the weight that it changes");
    const PackedLinear& w = to.linears[which]->packed;
    if (columns != w.k || rows != w.n)
        throw std::invalid_argument("the adapter is for a weight of [" + std::to_string(rows) + ", " +
                                    std::to_string(columns) + "], this one is [" + std::to_string(w.n) + ", " +
                                    std::to_string(w.k) + "]");
    if (rank < 1 || rank > kMaxRank)
        throw std::invalid_argument("the rank is " + std::to_string(rank) + ", allowed are 1 to " +
                                    std::to_string(kMaxRank));
    to.adapters[which].resize(size_t(config_.num_members));
    to.adapters[which][size_t(member)] = pack_adapter(w, a, b, int(rank), which == MOTET_UP && gated());
    to.ranks[which] = std::max(to.ranks[which], int(rank));
    adapters_ = true;
}

void Model::set_vector(MotetVector which, int index, const float* values, int64_t count) {
    const int64_t hidden = config_.hidden_size;
    std::vector<float>* to = nullptr;
    int64_t expected = hidden;
    if (which >= MOTET_ATTENTION_NORM && which <= MOTET_K_NORM) {
        Layer& layer = layer_at(index);
        std::vector<float>* parts[] = {
            &layer.attention_norm, &layer.attention_norm_bias, &layer.mlp_norm,
            &layer.mlp_norm_bias,  &layer.attention_out_norm,  &layer.attention_out_norm_bias,
            &layer.mlp_out_norm,   &layer.mlp_out_norm_bias,   &layer.q_norm,
            &layer.k_norm};
        to = parts[which];
        if (which >= MOTET_Q_NORM) {
            const int heads = which == MOTET_Q_NORM ? config_.num_heads : config_.num_kv_heads;
            expected = int64_t(config_.qk_norm == MOTET_QK_NORM_PROJECTION ? heads : 1) * config_.head_size;
        }
    } else if (which == MOTET_FINAL_NORM || which == MOTET_FINAL_NORM_BIAS) {
        if (index < 0 || size_t(index) >= final_norms_.size()) throw std::invalid_argument("no such member");
        to = which == MOTET_FINAL_NORM ? &final_norms_[size_t(index)] : &final_norm_biases_[size_t(index)];
    } else if (which == MOTET_POSITIONS) {
        to = &positions_;
        expected = hidden * config_.max_positions;
    } else if (which >= MOTET_COS && which <= MOTET_WINDOW_SIN) {
        Rotary& tables = rotary_[which >= MOTET_WINDOW_COS];
        to = which == MOTET_COS || which == MOTET_WINDOW_COS ? &tables.cos : &tables.sin;
        expected = int64_t(config_.rotary_size / 2) * config_.max_positions;
    } else {
        throw std::invalid_argument("no such vector");
    }
    if (count != expected)
        throw std::invalid_argument("it has " + std::to_string(count) + " values, the model needs " +
                                    std::to_string(expected));
    to->assign(values, values + count);
}

void Model::set_window(int layer, int32_t window) {
    if (window < 1) throw std::invalid_argument("the window is " + std::to_string(window) + ", it must be at least 1");
    layer_at(layer).window = std::min(window, config_.max_positions);
}

void Model::set_rotary(int layer, MotetRotary tables) {
    if (tables < MOTET_NO_ROTARY || tables > MOTET_WINDOW_ROTARY) throw std::invalid_argument("no such tables");
    layer_at(layer).rotary = tables;
}

std::string Model::missing() const {
    if (!head_) return "the head";
    if (!config_.tied_head && !embedding_) return "the embedding";
    if (config_.learned && positions_.empty()) return "the position tables";
    const bool before = config_.norm_places != MOTET_NORM_AFTER, after = config_.norm_places != MOTET_NORM_BEFORE;
    auto lacks = [&](const std::vector<float>& weight, const std::vector<float>& bias) {
        return weight.empty() || (config_.layer_norm && bias.empty());
    };
    for (size_t i = 0; i < layers_.size(); i++) {
        const Layer& layer = layers_[i];
        bool has_mlp = layer.linears[kUp] && layer.linears[kDown];
        if (!layer.experts.empty()) {
            has_mlp = bool(layer.linears[kRouter]);
            for (const Expert& one : layer.experts) {
                has_mlp = has_mlp && one.up && one.down;
                const Expert& first = layer.experts[0];
                if (has_mlp && (one.up->packed.group != first.up->packed.group ||
                                one.down->packed.group != first.down->packed.group))
                    return "a common group size of the experts of layer " + std::to_string(i);
            }
        }
        if (!layer.linears[kQKV] || !layer.linears[kOut] || !has_mlp ||
            (before &&
             (lacks(layer.attention_norm, layer.attention_norm_bias) || lacks(layer.mlp_norm, layer.mlp_norm_bias))) ||
            (after && (lacks(layer.attention_out_norm, layer.attention_out_norm_bias) ||
                       lacks(layer.mlp_out_norm, layer.mlp_out_norm_bias))) ||
            (config_.qk_norm && (layer.q_norm.empty() || layer.k_norm.empty())))
            return "a weight of layer " + std::to_string(i);
        if (config_.learned || layer.rotary == MOTET_NO_ROTARY) continue;
        const Rotary& tables = rotary_[layer.rotary == MOTET_WINDOW_ROTARY];
        if (tables.cos.empty() || tables.sin.empty()) return "the position tables of layer " + std::to_string(i);
    }
    for (size_t i = 0; i < final_norms_.size(); i++)
        if (lacks(final_norms_[i], final_norm_biases_[i])) return "a final norm";
    return "";
}

std::string Model::check(const MotetBatch& b) const {
    auto text = [](int64_t value) { return std::to_string(value); };
    if (b.num_rows < 1 || b.num_seqs < 1 || b.max_blocks < 1 || b.num_outputs < 0) return "an empty batch";
    if (b.cu_seqlens[0] != 0 || b.cu_seqlens[b.num_seqs] != b.num_rows) return "cu_seqlens do not span the rows";
    for (int64_t s = 0; s < b.num_seqs; s++) {
        const int64_t first = b.cu_seqlens[s], rows = b.cu_seqlens[s + 1] - first, context = b.context_lens[s];
        if (rows < 1 || first < 0 || first + rows > b.num_rows) return "sequence " + text(s) + " has no rows";
        if (context < rows || context > config_.max_positions)
            return "sequence " + text(s) + " has a context of " + text(context) + ", allowed are " + text(rows) +
                   " to " + text(config_.max_positions);
        if (b.trunk_cached && b.trunk_cached[s] && !keeps_trunk())
            return "sequence " + text(s) + " has no trunk that could be cached";
        const int64_t blocks = (context + kBlock - 1) / kBlock;
        if (blocks > b.max_blocks) return "the block table of sequence " + text(s) + " is too short";
        const int32_t* table = b.block_tables + s * b.max_blocks;
        for (int64_t i = 0; i < blocks; i++)
            if (table[i] < 0 || table[i] >= config_.num_blocks)
                return "block " + text(table[i]) + " is not in the cache";
        for (int64_t r = 0; r < rows; r++) {
            const int64_t position = context - rows + r;
            if (b.positions[first + r] != position)
                return "row " + text(first + r) + " is not at position " + text(position);
            if (b.slot_mapping[first + r] != int64_t(table[position / kBlock]) * kBlock + position % kBlock)
                return "row " + text(first + r) + " has a slot outside of its block table";
            const int64_t token = b.token_ids[first + r];
            if (token < 0 || token >= config_.vocab_size)
                return "token id " + text(token) + " is not in 0…" + text(config_.vocab_size - 1);
        }
    }
    if (b.num_embedded < 0 || b.num_embedded > b.num_rows) return "more rows are embedded than there are";
    for (int64_t i = 0; i < b.num_embedded; i++)
        if (b.embedded_rows[i] < 0 || b.embedded_rows[i] >= b.num_rows ||
            (i && b.embedded_rows[i] <= b.embedded_rows[i - 1]))
            return "the embedded rows are not ascending rows of the batch";
    if (b.num_freed < 0) return "a negative number of freed blocks";
    for (int64_t i = 0; i < b.num_freed; i++)
        if (b.freed_blocks[i] < 0 || b.freed_blocks[i] >= config_.num_blocks)
            return "the freed block " + text(b.freed_blocks[i]) + " is not in the cache";
    const bool tails = has_tails();
    const int64_t members = tails ? config_.num_members : 1;
    std::vector<char> seen(size_t(members * b.num_seqs), char(!tails));
    if (tails) {
        if (!b.member_offsets || b.member_offsets[0] != 0) return "the members' sequences are missing";
        for (int64_t m = 0; m < members; m++) {
            if (b.member_offsets[m + 1] < b.member_offsets[m] ||
                b.member_offsets[m + 1] - b.member_offsets[m] > b.num_seqs)
                return "the members' sequences are inconsistent";
            int64_t last = -1;
            for (int64_t i = b.member_offsets[m]; i < b.member_offsets[m + 1]; i++) {
                if (b.member_seqs[i] <= last || b.member_seqs[i] >= b.num_seqs)
                    return "the members' sequences are not ascending";
                last = b.member_seqs[i];
                seen[size_t(m * b.num_seqs + last)] = 1;
            }
        }
    }
    for (int64_t i = 0, s = 0; i < b.num_outputs; i++) {
        const int64_t m = b.output_members[i], row = b.output_rows[i];
        if (m < 0 || m >= members || row < 0 || row >= b.num_rows) return "an output is outside of the batch";
        const bool same = i > 0 && b.output_members[i - 1] == m;
        if (i > 0 && (b.output_members[i - 1] > m || (same && b.output_rows[i - 1] >= row)))
            return "the outputs are not ascending";
        if (!same) s = 0;
        while (b.cu_seqlens[s + 1] <= row) s++;
        if (!seen[size_t(m * b.num_seqs + s)]) return "an output asks for a member that does not see its row";
    }
    return "";
}

void Model::step(const MotetBatch& batch, float* hidden) {
    for (int64_t i = 0; i < batch.num_freed; i++) areas_.release(batch.freed_blocks[i]);
    arena_.reset();
    Step(*this, batch, arena_, hidden).execute();
}

void Model::head(const float* hidden, int64_t rows, float* logits) {
    const auto start = std::chrono::steady_clock::now();
    arena_.reset();
    struct Job {
        Model& m;
        const float* hidden;
        float* logits;
        Activations x;
        int64_t stride;
        std::vector<uint8_t*> rooms;
    } job{*this,
          hidden,
          logits,
          ActivationStore::make(arena_, *isa_, rows, config_.hidden_size, dense_, false).take(rows, head_.packed),
          logits_stride(),
          {}};
    for (int t = 0; t < pool_.threads(); t++) job.rooms.push_back(panel_room(arena_, config_.hidden_size));
    pool_.reset(2);
    pool_.run(
        [](void* context, int thread) {
            Job& j = *static_cast<Job*>(context);
            Model& m = j.m;
            m.pool_.distribute(0, thread, j.x.blocks, [&](int64_t block) {
                for (int64_t row = j.x.first_row(int(block)); row < j.x.first_row(int(block) + 1); row++)
                    m.isa_->quantise(j.hidden + row * m.config_.hidden_size, {}, {}, 0, m.config_.hidden_size, j.x,
                                     row);
            });
            m.pool_.barrier();
            const PackedLinear& w = m.head_.packed;
            constexpr int64_t kGrain = 4;
            m.pool_.distribute(1, thread, (w.panels + kGrain - 1) / kGrain, [&](int64_t i) {
                m.isa_->linear(w, j.x, 0, j.x.blocks, i * kGrain, std::min(w.panels, (i + 1) * kGrain), j.logits,
                               j.stride, Epilogue::Store, nullptr, j.rooms[size_t(thread)]);
            });
        },
        &job);
    seconds_[kHead] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void Model::finish_logits(float* logits, int64_t rows) {
    if (config_.logit_scale == 1.0f && config_.logit_softcap == 0.0f) return;
    struct Job {
        Model& m;
        float* logits;
        int64_t chunks;
    } job{*this, logits, rows * logits_stride() / kLanes};
    pool_.reset(1);
    pool_.run(
        [](void* context, int thread) {
            Job& j = *static_cast<Job*>(context);
            constexpr int64_t kGrain = 256;
            j.m.pool_.distribute(0, thread, (j.chunks + kGrain - 1) / kGrain, [&](int64_t i) {
                const int64_t first = i * kGrain, last = std::min(first + kGrain, j.chunks);
                j.m.isa_->softcap(j.logits + first * kLanes, (last - first) * kLanes, j.m.config_.logit_scale,
                                  j.m.config_.logit_softcap);
            });
        },
        &job);
}

float* Model::room(Pages& pages, int64_t count) {
    const size_t bytes = size_t(count) * sizeof(float);
    if (bytes > pages.size()) pages = Pages(bytes);
    return reinterpret_cast<float*>(pages.data());
}

void Model::reset_seconds() { std::fill(seconds_, seconds_ + kParts, 0.0); }

}  // namespace motet
