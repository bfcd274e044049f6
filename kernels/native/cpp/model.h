// A decoder: its packed weights, its paged KV cache, and a step of a packed batch over both.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "isa.h"
#include "motet.h"
#include "pool.h"

namespace motet {

// Memory for large arrays: aligned, on huge pages where the system has them, zero until written.
class Pages {
public:
    Pages() = default;
    explicit Pages(size_t bytes);
    Pages(Pages&& other) noexcept;
    Pages& operator=(Pages&& other) noexcept;
    ~Pages();
    uint8_t* data() const { return data_; }
    size_t size() const { return size_; }

private:
    uint8_t* data_ = nullptr;
    size_t size_ = 0;
};

// Memory that is taken piece by piece and freed together. A step's is kept for the next step.
class Arena {
public:
    template <class T>
    T* take(int64_t count) {
        return reinterpret_cast<T*>(take_bytes(size_t(count > 0 ? count : 1) * sizeof(T)));
    }
    void reset();

private:
    uint8_t* take_bytes(size_t bytes);
    std::vector<Pages> chunks_;
    size_t used_ = 0;  // bytes of the last chunk
};

// Storage for activations of any layer.
struct ActivationStore {
    Activations take(int64_t rows, const PackedLinear& w) const;
    static ActivationStore make(Arena& arena, const Isa& isa, int64_t rows, int64_t k, bool dense, bool adapters);
    bool tiles;
    int32_t *quads, *starts;
    float *scales, *sums, *dense, *inner;
    const LowRank** low_rank;
};

struct Linear {
    PackedLinear packed;
    std::vector<float> bias;
    explicit operator bool() const { return packed.data != nullptr; }
};

// The weight's row that is column `lane` of a panel; -1 for padding.
int64_t source_row(int64_t rows, int64_t panel, int lane, bool pairs);
// Repacks a bundle's tensor (see docs/bundle.md). `pairs`: rows i and n/2 + i (gate and up) become neighbours in each
// panel. The result is in `memory`: with pages of its own, small matrices would waste most of a huge page each.
Linear pack(const MotetTensor& tensor, bool pairs, Pool& pool, Arena& memory);
// Row `row` of a packed matrix as f32: used for embeddings, which may share the head's matrix.
void unpack_row(const PackedLinear& w, int64_t row, float* out);

enum Module {
    kQKV,
    kOut,
    kUp,
    kDown,
    kRouter,
    kModules
};  // the linear layers of a layer, with the numbers of MotetLinear

// A member's low-rank update of one linear layer.
struct Adapter {
    LowRank view;
    std::vector<int8_t> a, b;
    std::vector<float> scales;
    std::vector<LowRank::Ranks> ranks;
};
// `a` [rank, k] and `b` [n, rank] as the kernels read them. `pairs`: see pack().
Adapter pack_adapter(const PackedLinear& w, const float* a, const float* b, int rank, bool pairs);

struct Expert {
    std::shared_ptr<const Linear> up, down;
};

struct Layer {
    std::shared_ptr<const Linear> linears[kModules];  // shared by the members that have no own weight
    std::vector<Adapter> adapters[kModules];          // [members], or empty if no member has one
    int ranks[kModules] = {};                         // the largest of their ranks
    const PackedLinear& packed(Module module) const { return linears[module]->packed; }
    std::vector<Expert> experts;  // empty: the layer's MLP is kUp and kDown
    std::vector<float> attention_norm, attention_norm_bias, mlp_norm, mlp_norm_bias, q_norm, k_norm;
    std::vector<float> attention_out_norm, attention_out_norm_bias, mlp_out_norm, mlp_out_norm_bias;
    MotetRotary rotary = MOTET_ROTARY;
    int32_t window = 0;  // positions that a row attends to, its own included; max_positions: all
};

enum Part { kLinears, kAttention, kHead, kOther, kParts };

// Which areas hold the keys and values of members' tails. An area has those of one member for the positions of one
// block. It is taken when the member's tail first runs over the block and given back when the block's content dies, so
// memory is used for the (block, member) pairs that exist, not for all that could.
class Areas {
public:
    Areas(int64_t members, int64_t blocks) : of_(size_t(members * blocks), -1), blocks_(blocks) {}
    int32_t take(int64_t member, int64_t block);
    void release(int64_t block);  // of all members

private:
    std::vector<int32_t> of_, free_;  // of_ [members][blocks] -1: none
    int64_t blocks_;
    int32_t next_ = 0;  // areas that were never taken begin here
};

class Model {
public:
    Model(const MotetConfig& config, const Isa* isa);

    void set_linear(MotetLinear which, int layer, int expert, const MotetTensor& tensor);
    void share_linear(MotetLinear which, int layer, int expert, int source);
    void set_adapter(MotetLinear which, int layer, int member, int64_t rank, const float* a, int64_t columns,
                     const float* b, int64_t rows);
    void set_vector(MotetVector which, int index, const float* values, int64_t count);
    void set_window(int layer, int32_t window);
    void set_rotary(int layer, MotetRotary tables);
    std::string missing() const;  // what has not been set; empty if the model is complete

    std::string check(const MotetBatch& batch) const;  // why the batch cannot run; empty if it can
    void step(const MotetBatch& batch, float* hidden);
    void head(const float* hidden, int64_t rows, float* logits);  // logits [rows, logits_stride()]
    std::string check(const MotetMixes& mixes, int64_t num_hidden) const;
    // Scale and soft cap of logits [rows, logits_stride()], in place.
    void finish_logits(float* logits, int64_t rows);
    // Logits [rows, logits_stride()] of mixes of the states `hidden`; valid until the next call.
    const float* logits(const MotetMixes& mixes, const float* hidden);  // mixing.cpp
    float* hidden_room(int64_t rows) { return room(hidden_, rows * config_.hidden_size); }
    void measure_head();

    const MotetConfig& config() const { return config_; }
    int64_t logits_stride() const { return (int64_t(config_.vocab_size) + kLanes - 1) / kLanes * kLanes; }
    // Tails may have no layers: then members differ only in their final norms.
    bool has_tails() const { return config_.num_tails > 0; }
    // Whether the trunk's output for each position is kept in its block, so that another tail can run from it.
    bool keeps_trunk() const { return has_tails() && config_.split_layer > 0; }
    const double* seconds() const { return seconds_; }
    void reset_seconds();
    Pool& pool() { return pool_; }
    const Isa* isa() const { return isa_; }

private:
    friend class Step;
    struct Rotary {
        std::vector<float> cos, sin;  // [max_positions][rotary_size / 2]
    };
    bool gated() const { return config_.activation < MOTET_GELU; }
    // Whether what a layer adds to the residual stream is changed first, or waits.
    bool changes_branches() const {
        return config_.norm_places != MOTET_NORM_BEFORE || config_.residual_scale != 1.0f || config_.parallel_residual;
    }
    Layer& layer_at(int index);
    std::shared_ptr<const Linear>& linear_at(MotetLinear which, int layer, int expert);
    int64_t head_blocks() const { return (head_.packed.n + kSampleBlock - 1) / kSampleBlock; }
    void refine(float* logits, const float* fine, const Activations& x);
    int tail_layers() const { return config_.num_layers - config_.split_layer; }
    // For Isa::linear, over matrices of up to k columns; null if it needs none.
    uint8_t* panel_room(Arena& arena, int64_t k) const {
        return isa_->tiles ? arena.take<uint8_t>(k * kPanel) : nullptr;
    }
    CacheView cache(int layer, int kv_head) const;
    float* trunk_output(int64_t slot) const;          // [hidden] of a position, if keeps_trunk()
    static float* room(Pages& pages, int64_t count);  // kept from step to step

    const MotetConfig config_;
    const Isa* isa_;
    Pool pool_;
    std::vector<int32_t> tail_of_;                                     // [members] members may share a tail
    std::vector<Layer> layers_;                                        // trunk, then each tail
    std::vector<std::vector<float>> final_norms_, final_norm_biases_;  // per member
    Linear head_, embedding_;                                          // embedding_ only if the head is untied
    std::vector<float> positions_;
    Rotary rotary_[2];  // of MOTET_ROTARY and MOTET_WINDOW_ROTARY
    Pages cache_, tail_cache_, hidden_, logits_;
    int64_t head_bytes_ = 0, layer_bytes_ = 0, block_bytes_ = 0, area_bytes_ = 0;
    Areas areas_;
    Arena arena_, weights_;
    int64_t widest_ = 0;             // columns of the widest matrix
    std::vector<float> head_norms_;  // [groups][head_blocks()] see measure_head(); empty if the head is dense
    bool dense_ = false;             // whether some matrix is not quantised
    bool adapters_ = false;          // whether some member has low-rank updates
    double seconds_[kParts] = {};
};

}  // namespace motet
