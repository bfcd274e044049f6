// Members are mixed before the one shared head.
//
// A head with 8-bit activations rounds its input, so it is not linear: rounding the mix instead of the members would choose
// other tokens at near ties. So the members are rounded as the head would round them, then mixed, and the mix goes in as its
// own rounding (the coarse row) and the rest (the fine row): exact to the square of the 8-bit step. For a greedy choice the
// fine row is computed only for columns that can still become the largest.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "model.h"

namespace motet {
namespace {

void round_groups(const float* x, int64_t size, int group, float* out) {
    for (int64_t first = 0; first < size; first += group) {
        float peak = 0.0f;
        for (int i = 0; i < group; i++) peak = std::max(peak, std::fabs(x[first + i]));
        const float step = std::max(peak / 127.0f, 1e-30f);
        for (int i = 0; i < group; i++) out[first + i] = std::nearbyint(x[first + i] / step) * step;
    }
}

float norm_of(const float* x, int64_t size) {
    float squares = 0.0f;
    for (int64_t i = 0; i < size; i++) squares += x[i] * x[i];
    return std::sqrt(squares);
}

}  // namespace

// The longest part of a column in each (panel, group) of the head.
void Model::measure_head() {
    const PackedLinear& w = head_.packed;
    if (config_.num_members < 2 || w.bits == 32) return;
    head_norms_.assign(size_t(w.panels * w.groups), 0.0f);
    pool_.reset(1);
    pool_.run(
        [](void* context, int thread) {
            Model& m = *static_cast<Model*>(context);
            const PackedLinear& w = m.head_.packed;
            std::vector<float> row(static_cast<size_t>(w.k));
            m.pool_.share(0, thread, w.panels, [&](int64_t panel) {
                for (int64_t n = panel * kPanel; n < std::min((panel + 1) * kPanel, w.n); n++) {
                    unpack_row(w, n, row.data());
                    for (int g = 0; g < w.groups; g++)
                        m.head_norms_[size_t(panel * w.groups + g)] = std::max(m.head_norms_[size_t(panel * w.groups + g)], norm_of(row.data() + g * w.group, w.group));
                }
            });
        },
        this);
}

void Model::logits(const Mixes& mixes, float* out) {
    const int64_t size = config_.hidden_size, stride = logits_stride();
    const int group = head_.packed.bits == 32 ? 0 : head_.packed.group;
    std::vector<float> rows(size_t(mixes.rows * size)), fines, rounded(static_cast<size_t>(size));
    std::vector<int64_t> refined, added;  // rows with a fine row: for the columns that matter, for all
    std::vector<float> refined_fines;
    for (int64_t r = 0; r < mixes.rows; r++) {
        const int64_t first = mixes.offsets[r], last = mixes.offsets[r + 1];
        float* row = rows.data() + r * size;
        const float* only = mixes.hidden + int64_t(mixes.sources[first]) * size;
        if (last - first == 1 && mixes.coefficients[first] == 1.0f) {
            memcpy(row, only, size_t(size) * sizeof(float));
            continue;
        }
        for (int64_t i = first; i < last; i++) {
            const float* from = mixes.hidden + int64_t(mixes.sources[i]) * size;
            if (group) round_groups(from, size, group, rounded.data());
            const float* member = group ? rounded.data() : from;
            for (int64_t k = 0; k < size; k++) row[k] += mixes.coefficients[i] * member[k];
        }
        if (!group) continue;
        round_groups(row, size, group, rounded.data());
        std::vector<float>& to = mixes.greedy[r] ? refined_fines : fines;
        for (int64_t k = 0; k < size; k++) to.push_back(row[k] - rounded[size_t(k)]);
        memcpy(row, rounded.data(), size_t(size) * sizeof(float));
        (mixes.greedy[r] ? refined : added).push_back(r);
    }
    if (added.empty()) {
        head(rows.data(), mixes.rows, out);
    } else {
        rows.insert(rows.end(), fines.begin(), fines.end());
        const int64_t all = mixes.rows + int64_t(added.size());
        std::vector<float> together(size_t(all * stride));
        head(rows.data(), all, together.data());
        memcpy(out, together.data(), size_t(mixes.rows * stride) * sizeof(float));
        for (size_t i = 0; i < added.size(); i++) {
            const float* extra = together.data() + (mixes.rows + int64_t(i)) * stride;
            for (int64_t n = 0; n < stride; n++) out[added[i] * stride + n] += extra[n];
        }
    }
    if (refined.empty()) return;
    const auto start = std::chrono::steady_clock::now();
    struct Job {
        Model& m;
        const std::vector<int64_t>& rows;
        const std::vector<float>& fines;
        float* out;
        std::vector<ActivationStore> stores;
    } job{*this, refined, refined_fines, out, {}};
    arena_.reset();
    for (int t = 0; t < pool_.threads(); t++) job.stores.push_back(ActivationStore::make(arena_, 1, size, false, false));
    pool_.reset(1);
    pool_.run(
        [](void* context, int thread) {
            Job& j = *static_cast<Job*>(context);
            j.m.pool_.share(0, thread, int64_t(j.rows.size()), [&](int64_t i) {
                const Activations x = j.stores[size_t(thread)].take(1, j.m.head_.packed);
                j.m.refine(j.out + j.rows[size_t(i)] * j.m.logits_stride(), j.fines.data() + i * j.m.config_.hidden_size, x);
            });
        },
        &job);
    seconds_[kHead] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Adds the fine row's logits where they can matter. In a panel no logit moves by more than Σ over groups of the fine row's
// norm times the longest column's (Cauchy-Schwarz; 3 % are for the rounding of the fine row itself), so what lies further
// below the largest than both can move stays below it.
void Model::refine(float* logits, const float* fine, const Activations& x) {
    const PackedLinear& w = head_.packed;
    const int64_t best = std::max_element(logits, logits + w.n) - logits;
    std::vector<float> norms(size_t(w.groups));
    for (int g = 0; g < w.groups; g++) norms[size_t(g)] = 1.03f * norm_of(fine + g * w.group, w.group);
    auto reach = [&](int64_t panel) {
        const float* columns = head_norms_.data() + panel * w.groups;
        float total = 0.0f;
        for (int g = 0; g < w.groups; g++) total += norms[size_t(g)] * columns[g];
        return total;
    };
    const float floor = logits[best] - reach(best / kPanel);
    Activations quantised = x;
    isa_->quantise(fine, {}, {}, 0, w.k, quantised, 0);
    for (int64_t panel = 0; panel < w.panels; panel++) {
        const float* from = logits + panel * kPanel;
        const float most = *std::max_element(from, from + std::min<int64_t>(kPanel, w.n - panel * kPanel));
        if (!(most + reach(panel) < floor)) isa_->linear(w, quantised, 0, 1, panel, panel + 1, logits, logits_stride(), Epilogue::Add);
    }
}

}  // namespace motet
