// What a path provides for mixing and sampling: passes over one row of logits. Part of the table of `isa.h`.
#pragma once
#include <stdint.h>

namespace motet {

constexpr int kSampleBlock = 64;  // logits whose largest is kept, so that later passes skip most of a row

// A row of logits as passes read it: `x - pivot` are distances from the largest, at most 0. The values themselves are
// `exact` where there is such an array, else x.
struct RowView {
    const float* x = nullptr;
    const double* exact = nullptr;
    int64_t size = 0;
    float pivot = 0.0f;
    const float* maxima = nullptr;  // [ceil(size / 64)] of x
    double value(int64_t i) const { return exact ? exact[i] : double(x[i]); }
};

struct DrawArgs {
    RowView row;
    double temperature = 1.0;
    double top = 0.0;   // the largest value / temperature
    double cut = 0.0;   // tokens below it, in the same measure, are not drawn
    int64_t first = 0;  // a token with the largest value
    uint64_t seed = 0;
    uint32_t position = 0;
};

struct MixTerm {
    const float* row;
    double coefficient;
    double largest, log_sum;  // probs space, finite: log-softmax of the row is (row - largest) - log_sum
};

struct SampleIsa {
    // Largest of each block; false where there is NaN.
    bool (*block_maxima)(const float* x, int64_t size, float* maxima, float* largest);
    // Largest of a row of doubles; false where there is NaN.
    bool (*largest)(const double* x, int64_t size, double* result);
    void (*narrow)(const double* x, int64_t size, double pivot, float* out);  // float(x - pivot)
    void (*mix_logits)(const MixTerm* terms, int64_t count, int64_t size, double* out);
    // Sets each term's log_sum; `exps` [size] is work space.
    void (*mix_probs)(MixTerm* terms, int64_t count, int64_t size, double* exps, double* out);
    // Σ exp((value - top) · scale), in an order that is the same on every path.
    double (*exp_sum)(const RowView&, double top, double scale);
    int64_t (*collect)(const RowView&, float distance, int32_t* ids);  // ids with x - pivot ≥ distance, ascending
    int64_t (*draw)(const DrawArgs&);
};

}  // namespace motet
