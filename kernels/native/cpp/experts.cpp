// A mixture of experts: the router chooses some MLPs for each row, and only their weights are read. Rows that chose the
// same expert run through it together.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "step.h"

namespace motet {
namespace {

// The part of a store that begins at stored row `first`, for `rows` rows.
Activations part_of(const ActivationStore& store, int64_t first, int64_t rows, const PackedLinear& w) {
    Activations x = store.take(rows, w);
    x.quads += first * (w.k / 4);
    if (w.groups) {
        x.scales += first * w.groups;
        x.sums += first * w.groups;
        x.starts += first * w.groups;
    }
    if (x.dense) x.dense += first * w.k;
    return x;
}

}  // namespace

// The largest logits of a row, of equal ones those of the lower experts; their softmax over all experts.
void Step::choose_experts(const float* logits, int64_t row, int thread) {
    const int64_t k = c_.experts_per_token;
    int32_t* chosen = chosen_ + row * k;
    float* shares = shares_ + row * k;
    int32_t* order = scratch_[size_t(thread)].order;
    std::iota(order, order + c_.num_experts, 0);
    std::partial_sort(order, order + k, order + c_.num_experts, [&](int32_t a, int32_t b) {
        const bool bad_a = std::isnan(logits[a]), bad_b = std::isnan(logits[b]);  // NaN is the largest
        if (bad_a != bad_b) return bad_a;
        return logits[a] > logits[b] || (!(logits[a] < logits[b]) && a < b);
    });
    const double largest = double(logits[order[0]]);
    double total = 0.0;
    for (int64_t i = 0; i < (c_.normalises_experts ? k : c_.num_experts); i++)
        total += std::exp(double(logits[c_.normalises_experts ? order[i] : i]) - largest);
    std::copy_n(order, k, chosen);
    std::sort(chosen, chosen + k);
    for (int64_t i = 0; i < k; i++) shares[i] = float(std::exp(double(logits[chosen[i]]) - largest) / total);
}

// Orders the pairs by expert. By one thread.
void Step::plan_experts(const Layer& layer, const RowSet& set) {
    const int64_t k = c_.experts_per_token, pairs = set.rows() * k;
    std::vector<int64_t> next(size_t(c_.num_experts) + 1, 0);
    for (int64_t i = 0; i < pairs; i++) next[size_t(chosen_[i]) + 1]++;
    std::partial_sum(next.begin(), next.end(), next.begin());
    used_.clear();
    blocks_.clear();
    int64_t stored = 0;
    for (int e = 0; e < c_.num_experts; e++) {
        const int64_t first = next[size_t(e)], rows = next[size_t(e) + 1] - first;
        if (!rows) continue;
        const Expert& expert = layer.experts[size_t(e)];
        used_.push_back({&expert, first, part_of(pairs_, stored, rows, expert.up->packed),
                         part_of(pairs_inner_, stored, rows, expert.down->packed)});
        stored += std::max(used_.back().up.stored_rows(), used_.back().down.stored_rows());
        for (int b = 0; b < used_.back().up.blocks; b++) blocks_.emplace_back(int(used_.size()) - 1, b);
    }
    for (int64_t i = 0; i < pairs; i++) {
        const int64_t pair = next[size_t(chosen_[i])]++;
        pair_row_[pair] = int32_t(i / k);
        row_pairs_[i] = int32_t(pair);
    }
}

// `to` [rows][hidden] gets the weighted sum of the rows' experts, or it is added to it.
void Step::run_experts(const Layer& layer, const RowSet& set, const Input& input, float* to, bool adds, int thread) {
    const int64_t rows = set.rows(), hidden = c_.hidden_size, k = c_.experts_per_token;
    const Activations routed = prepare(input, set, layer, kRouter, thread);
    linear(layer.packed(kRouter), routed, {router_, router_ld_, Epilogue::Store}, nullptr, thread);
    barrier_and_time(kLinears, thread);
    pool_.distribute(next_phase(thread), thread, rows,
                     [&](int64_t row) { choose_experts(router_ + row * router_ld_, row, thread); });
    barrier_and_time(kOther, thread);
    if (thread == 0) plan_experts(layer, set);
    barrier_and_time(kOther, thread);
    pool_.distribute(next_phase(thread), thread, int64_t(blocks_.size()), [&](int64_t item) {
        ExpertRows& own = used_[size_t(blocks_[size_t(item)].first)];
        const int block = blocks_[size_t(item)].second;
        for (int64_t r = own.up.first_row(block); r < own.up.first_row(block + 1); r++) {
            const float* from = input.x + pair_row_[own.first + r] * input.ld;
            isa_.quantise(from, input.norm, isa_.norm_stats(from, c_.norm_eps, input.norm.kind, hidden), 0, hidden,
                          own.up, r);
        }
    });
    barrier_and_time(kOther, thread);
    auto run_all = [&](std::shared_ptr<const Linear> Expert::* which, Activations ExpertRows::* x, float* out,
                       int64_t ld, Epilogue epilogue) {
        const int64_t panels = ((*used_[0].expert).*which)->packed.panels;  // of every expert
        pool_.distribute(next_phase(thread), thread, int64_t(used_.size()) * panels, [&](int64_t item) {
            const ExpertRows& own = used_[size_t(item / panels)];
            const Activations& rows_of = own.*x;
            isa_.linear(((*own.expert).*which)->packed, rows_of, 0, rows_of.blocks, item % panels, item % panels + 1,
                        out + own.first * ld, ld, epilogue, nullptr, scratch_[size_t(thread)].room);
        });
        barrier_and_time(kLinears, thread);
    };
    run_all(&Expert::up, &ExpertRows::up, pair_inner_, c_.expert_size, kActivations[c_.activation]);
    pool_.distribute(next_phase(thread), thread, int64_t(blocks_.size()), [&](int64_t item) {
        ExpertRows& own = used_[size_t(blocks_[size_t(item)].first)];
        const int block = blocks_[size_t(item)].second;
        for (int64_t r = own.down.first_row(block); r < own.down.first_row(block + 1); r++)
            isa_.quantise(pair_inner_ + (own.first + r) * c_.expert_size, {}, {}, 0, c_.expert_size, own.down, r);
    });
    barrier_and_time(kOther, thread);
    run_all(&Expert::down, &ExpertRows::down, pair_out_, hidden, Epilogue::Store);
    pool_.distribute(next_phase(thread), thread, rows, [&](int64_t row) {
        float* sum = to + row * hidden;
        if (!adds) std::fill_n(sum, hidden, 0.0f);
        for (int64_t j = 0; j < k; j++) {
            const float share = shares_[row * k + j];
            const float* from = pair_out_ + int64_t(row_pairs_[row * k + j]) * hidden;
            for (int64_t i = 0; i < hidden; i++) sum[i] += share * from[i];
        }
    });
    barrier_and_time(kOther, thread);
}

}  // namespace motet
