// Members are mixed before the head that they share.
//
// A head with 8-bit activations rounds its input, so it is not linear: rounding the mix instead of the members would
// choose other tokens at near ties. So each member is rounded as the head would round it, then they are mixed. The mix
// goes into the head as two rows, its own rounding (coarse) and the remainder (fine): exact to the square of the 8-bit
// step. For a greedy choice the fine row is computed only for columns that can still become the largest.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "model.h"

namespace motet {
namespace {

float norm_of(const float* x, int64_t size) {
    float squares = 0.0f;
    for (int64_t i = 0; i < size; i++) squares += x[i] * x[i];
    return std::sqrt(squares);
}

void divide_rows(const MotetMixes& mixes, float* logits, int64_t stride) {
    for (int64_t r = 0; r < mixes.rows; r++)
        if (mixes.temperatures[r] != 1.0f)
            for (int64_t n = 0; n < stride; n++) logits[r * stride + n] /= mixes.temperatures[r];
}

}  // namespace

// For each (group, block of columns) of the head, the largest norm of a column's part in the group. Any quantised head
// needs it: with views, a request can mix the only member of a model with itself.
void Model::measure_head() {
    const PackedLinear& w = head_.packed;
    if (w.bits == 32) return;
    head_norms_.assign(size_t(w.groups * head_blocks()), 0.0f);
    pool_.reset(1);
    pool_.run(
        [](void* context, int thread) {
            Model& m = *static_cast<Model*>(context);
            const PackedLinear& w = m.head_.packed;
            std::vector<float> row(static_cast<size_t>(w.k));
            const int64_t blocks = m.head_blocks();
            m.pool_.distribute(0, thread, blocks, [&](int64_t block) {
                for (int64_t n = block * kSampleBlock; n < std::min((block + 1) * kSampleBlock, w.n); n++) {
                    unpack_row(w, n, row.data());
                    for (int g = 0; g < w.groups; g++) {
                        float& longest = m.head_norms_[size_t(g * blocks + block)];
                        longest = std::max(longest, norm_of(row.data() + g * w.group, w.group));
                    }
                }
            });
        },
        this);
}

std::string Model::check(const MotetMixes& mixes, int64_t num_hidden) const {
    if (mixes.rows < 0) return "there is a negative number of rows";
    for (int64_t r = 0; r < mixes.rows; r++) {
        if (mixes.offsets[0] != 0 || mixes.offsets[r + 1] <= mixes.offsets[r])
            return "row " + std::to_string(r) + " has no terms";
        if (!std::isfinite(mixes.temperatures[r]) || mixes.temperatures[r] <= 0)
            return "the temperature of row " + std::to_string(r) + " is not a finite number above 0";
        for (int64_t i = mixes.offsets[r]; i < mixes.offsets[r + 1]; i++)
            if (mixes.sources[i] < 0 || mixes.sources[i] >= num_hidden)
                return "row " + std::to_string(r) + " mixes a hidden state that is not there";
            else if (!std::isfinite(mixes.coefficients[i]))
                return "a coefficient of row " + std::to_string(r) + " is not finite";
    }
    if (mixes.num_written < 0) return "there is a negative number of written rows";
    for (int64_t i = 0; i < mixes.num_written; i++)
        if (mixes.written_rows[i] < 0 || mixes.written_rows[i] >= mixes.rows)
            return "written row " + std::to_string(mixes.written_rows[i]) + " is not in 0…" +
                   std::to_string(mixes.rows - 1);
    return "";
}

const float* Model::logits(const MotetMixes& mixes, const float* hidden) {
    const int64_t size = config_.hidden_size, stride = logits_stride();
    const int group = head_.packed.bits == 32 ? 0 : head_.packed.group;
    std::vector<float> rows(size_t(mixes.rows * size)), fines, rounded(static_cast<size_t>(size));
    std::vector<int64_t> refined, added;  // rows with a fine row: computed for some columns, for all columns
    std::vector<float> refined_fines;
    for (int64_t r = 0; r < mixes.rows; r++) {
        const int64_t first = mixes.offsets[r], last = mixes.offsets[r + 1];
        float* row = rows.data() + r * size;
        const float* only = hidden + int64_t(mixes.sources[first]) * size;
        if (last - first == 1 && mixes.coefficients[first] == 1.0f) {
            memcpy(row, only, size_t(size) * sizeof(float));
            continue;
        }
        for (int64_t i = first; i < last; i++) {
            const float* from = hidden + int64_t(mixes.sources[i]) * size;
            if (group) isa_->round_groups(from, size, group, rounded.data());
            const float* member = group ? rounded.data() : from;
            for (int64_t k = 0; k < size; k++) row[k] += mixes.coefficients[i] * member[k];
        }
        if (!group) continue;
        isa_->round_groups(row, size, group, rounded.data());
        std::vector<float>& to = mixes.greedy[r] ? refined_fines : fines;
        for (int64_t k = 0; k < size; k++) to.push_back(row[k] - rounded[size_t(k)]);
        memcpy(row, rounded.data(), size_t(size) * sizeof(float));
        (mixes.greedy[r] ? refined : added).push_back(r);
    }
    rows.insert(rows.end(), fines.begin(), fines.end());
    const int64_t all = mixes.rows + int64_t(added.size());
    float* out = room(logits_, all * stride);
    if (all) head(rows.data(), all, out);
    for (size_t i = 0; i < added.size(); i++) {
        const float* extra = out + (mixes.rows + int64_t(i)) * stride;
        for (int64_t n = 0; n < stride; n++) out[added[i] * stride + n] += extra[n];
    }
    if (refined.empty()) {
        finish_logits(out, mixes.rows);
        divide_rows(mixes, out, stride);
        return out;
    }
    const auto start = std::chrono::steady_clock::now();
    struct Job {
        Model& m;
        const std::vector<int64_t>& rows;
        const std::vector<float>& fines;
        float* out;
        std::vector<ActivationStore> stores;
    } job{*this, refined, refined_fines, out, {}};
    arena_.reset();
    for (int t = 0; t < pool_.threads(); t++)
        job.stores.push_back(ActivationStore::make(arena_, *isa_, 1, size, false, false));
    pool_.reset(1);
    pool_.run(
        [](void* context, int thread) {
            Job& j = *static_cast<Job*>(context);
            j.m.pool_.distribute(0, thread, int64_t(j.rows.size()), [&](int64_t i) {
                const Activations x = j.stores[size_t(thread)].take(1, j.m.head_.packed);
                j.m.refine(j.out + j.rows[size_t(i)] * j.m.logits_stride(),
                           j.fines.data() + i * j.m.config_.hidden_size, x);
            });
        },
        &job);
    finish_logits(out, mixes.rows);
    divide_rows(mixes, out, stride);
    seconds_[kHead] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return out;
}

// Adds the fine row's logits to the columns that can become the largest. In a block of columns no logit changes by more
// than Σ over groups of the fine row's norm times the largest norm of a column (Cauchy-Schwarz; 3 % are added for the
// rounding of the fine row). A logit that is further below the largest than both can change cannot pass it.
void Model::refine(float* logits, const float* fine, const Activations& x) {
    const PackedLinear& w = head_.packed;
    const int64_t blocks = head_blocks();
    std::vector<float> maxima(static_cast<size_t>(blocks)), reach(static_cast<size_t>(blocks), 0.0f);
    float largest;
    if (!isa_->sample.block_maxima(logits, w.n, maxima.data(), &largest)) return;  // NaN: no token will be drawn
    for (int g = 0; g < w.groups; g++) {
        const float norm = 1.03f * norm_of(fine + g * w.group, w.group);
        const float* columns = head_norms_.data() + g * blocks;
        for (int64_t b = 0; b < blocks; b++) reach[size_t(b)] += norm * columns[b];
    }
    float floor = largest;
    for (int64_t b = 0; b < blocks; b++)
        if (maxima[size_t(b)] == largest) floor = std::min(floor, largest - reach[size_t(b)]);
    Activations quantised = x;
    isa_->quantise(fine, {}, {}, 0, w.k, quantised, 0);
    constexpr int64_t kPanels = kSampleBlock / kPanel;
    for (int64_t b = 0; b < blocks; b++)
        if (!(maxima[size_t(b)] + reach[size_t(b)] < floor))
            isa_->linear(w, quantised, 0, 1, b * kPanels, std::min((b + 1) * kPanels, w.panels), logits,
                         logits_stride(), Epilogue::Add, nullptr, nullptr);
}

}  // namespace motet
