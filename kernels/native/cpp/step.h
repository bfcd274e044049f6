// One step: every thread runs the same plan and waits for the others at barriers.
#pragma once
#include <atomic>
#include <chrono>
#include <memory>
#include <vector>

#include "model.h"

namespace motet {

constexpr Epilogue kActivations[] = {Epilogue::SwiGLU, Epilogue::GeGLU, Epilogue::Gelu,
                                     Epilogue::GeluErf};  // of MotetActivation

struct RowSequence {  // the rows of a sequence in a row set
    int64_t row0, rows;
    const int32_t* table;  // its block table
};

// A unit of attention work: some rows of a sequence over all partitions, or one row over one partition.
struct Unit {
    const int32_t* table;
    int64_t row0, rows;
    int partition;  // -1: all
    int partitions;
    int64_t partial0;  // index of the row's first partial result, if partitions are separate units
};

// Rows that run through the same layers.
struct RowSet {
    std::vector<int32_t> contexts;  // [rows] positions up to the row's own, which is included
    std::vector<int64_t> slots;     // [rows]
    std::vector<int32_t> members;   // [rows] member whose low-rank updates apply; -1: none, in the trunk
    std::vector<RowSequence> sequences;
    std::vector<Unit> units;
    std::vector<int64_t> runs;    // first rows of runs of one member, then rows()
    std::vector<int64_t> writes;  // first rows of runs whose keys and values one thread writes, then rows()
    int64_t num_partials = 0;
    int64_t rows() const { return int64_t(contexts.size()); }
};

// The trunk over all rows that are not cached, or one tail over the rows of all members that have it: a row of the
// batch is a row for each of them, with keys and values in the member's areas.
struct Segment {
    int first_layer, last_layer;
    bool tail;
    bool ends;                     // whether the final norm follows
    std::vector<int32_t> source;   // [all.rows] row of the batch
    RowSet all, needed;            // needed: the rows that are outputs; the last layer finishes only these
    std::vector<int32_t> outputs;  // [needed.rows] row of `all`
    std::vector<int32_t> targets;  // [needed.rows] row of the result
};

class Step {
public:
    Step(Model& model, const MotetBatch& batch, Arena& arena, float* hidden);
    void execute();

private:
    struct Scratch {  // work space of one thread
        ActivationStore activations;
        float* rows;       // normed rows of a run
        float* head;       // a head, rotated
        uint8_t* room;     // see Isa::linear
        uint32_t* packed;  // [chunk][head size / 2][queries of the chunk], or as tiles need them
        float* steps;      // [queries], see AttendArgs
        int32_t* starts;
        float *outs, *later;  // [queries][head size]
        float *maxima, *sums, *later_maxima, *later_sums;
        int32_t* order;               // [experts]
        std::vector<int64_t> blocks;  // offsets in a layer's cache of the blocks that the thread will attend to
        PrefetchList prefetch_list;   // blocks of the next layer that are not prefetched yet
    };

    struct Input {  // of a linear layer: rows [rows][ld], normed
        const float* x;
        int64_t ld;
        NormArgs norm;
    };
    // The rows of an expert: pairs first…first + up.rows - 1 of a row and the expert.
    struct ExpertRows {
        const Expert* expert;
        int64_t first;
        Activations up, down;
    };

    void add_trunk();
    void add_tail(int tail, Arena& arena);
    void add_rows(Segment& segment, int member, int32_t sequence, const int32_t* table,
                  const std::vector<int32_t>& targets) const;
    void add(Segment&& segment);
    std::vector<int32_t> targets_of(int member) const;
    const int32_t* area_table(int member, int32_t sequence, Arena& arena);
    void plan_units(RowSet& set) const;
    void take_scratch(Arena& arena);

    const float* embedded(int64_t row) const;
    void run(int thread);
    void run_segment(const Segment& segment, int thread);
    void run_experts(const Layer& layer, const RowSet& set, const Input& input, float* to, bool adds, int thread);
    void choose_experts(const float* logits, int64_t row, int thread);
    void plan_experts(const Layer& layer, const RowSet& set);
    void keep_trunk(const Segment& segment, int thread);
    void enter_tail(const Segment& segment, float* x, int thread);
    void gather(const Segment& segment, const float* x, bool with_queries, int thread);

    Activations prepare(const Input& input, const RowSet& set, const Layer& layer, Module module, int thread);
    void add_updates(const Input& input, const RowSet& set, const Layer& layer, Module module, Activations& to,
                     int thread);
    struct Output {  // of a linear layer: [rows][ld]; also quantised if `quantise_to` is set
        float* to;
        int64_t ld;
        Epilogue epilogue;
        Activations* quantise_to = nullptr;
    };
    // `next`: the weights that are used after `w`, or null.
    void linear(const PackedLinear& w, const Activations& x, const Output& out, const PackedLinear* next, int thread);
    // Whether the queries of so many rows of a sequence are attended with on matrix tiles, and how many together.
    bool attends_on_tiles(int64_t rows) const { return isa_.tiles && c_.kv_int8 && rows * group_ > kMaxQueries; }
    int most_queries(int64_t rows) const { return attends_on_tiles(rows) ? kTileRows : kMaxQueries; }
    static int first_partition(int32_t context, int32_t window);
    void collect_blocks(const RowSet& set, int layer, int thread);
    void start_prefetch(int layer, int thread);
    void write_row(const RowSet& set, const Layer& layer, int index, int64_t row, int kv_head, const float* qkv,
                   int thread);
    void attend(const RowSet& set, const Layer& layer, int index, const float* qkv, bool write,
                Activations* quantise_to, int thread);
    void look_ahead(const RowSet& set, int64_t item, int partition, int index, int32_t window,
                    const uint8_t* (&ahead)[kPartitionBlocks]) const;
    void attend_unit(const RowSet& set, int64_t item, const Layer& layer, int index, const float* qkv, bool write,
                     Activations* quantise_to, int thread);
    void pack_queries(const RowSet& set, const Unit& unit, const Layer& layer, int kv_head, const float* qkv,
                      Scratch& s) const;
    void merge_partials(const Unit& unit, int first, int kv_head, Activations* quantise_to);
    void finish_row(const float* outs, const float* sums, int64_t row, int kv_head, Activations* quantise_to);
    void norm_and_rotate(const float* all, int heads, int index, const std::vector<float>& norm, const Layer& layer,
                         int32_t position, float* to) const;
    NormArgs norm_args(const std::vector<float>& weight, const std::vector<float>& bias) const;
    void add_branch(const RowSet& set, const NormArgs& norm, float* x, int thread);

    void barrier_and_time(Part part, int thread);
    int next_phase(int thread) { return phases_[size_t(thread)].next++; }

    Model& m_;
    const MotetConfig& c_;
    const MotetBatch& b_;
    const Isa& isa_;
    Pool& pool_;
    float* hidden_;
    const int64_t q_size_, kv_size_, qkv_ld_;
    const int group_;  // query heads per KV head
    const Norm norm_;
    int64_t partial_size_;
    std::vector<Segment> segments_;
    std::vector<int32_t> trunk_row_;  // [rows of the batch] row of x_; -1: its trunk is cached
    std::vector<Scratch> scratch_;
    struct alignas(64) Phase {
        int next = 0;
    };
    std::vector<Phase> phases_;
    ActivationStore many_, many_inner_;
    float *x_, *x_tail_, *x_needed_, *qkv_, *qkv_needed_, *attended_, *inner_, *partials_ = nullptr;
    float* branch_ = nullptr;  // [rows][hidden] what a layer adds, if it is changed first
    // Experts. A pair is a row and one of its experts; pairs are ordered by expert, then by row.
    ActivationStore pairs_, pairs_inner_;
    float *router_ = nullptr, *pair_inner_ = nullptr, *pair_out_ = nullptr;   // logits [rows][router_ld_], [pairs][…]
    int32_t *chosen_ = nullptr, *pair_row_ = nullptr, *row_pairs_ = nullptr;  // [rows][k] ascending, [pairs], [rows][k]
    float* shares_ = nullptr;                                                 // [rows][k] weights of the chosen experts
    std::vector<ExpertRows> used_;
    std::vector<std::pair<int, int>> blocks_;  // (index of used_, register block)
    int64_t router_ld_ = 0;
    std::unique_ptr<std::atomic<int>[]> arrived_;
    std::chrono::steady_clock::time_point lap_;
};

}  // namespace motet
