// Passes over one row of logits, which each path provides for mixing and sampling. Part of the table of `isa.h`.
#pragma once
#include <stdint.h>

namespace motet {

constexpr int kSampleBlock = 64;  // logits per block; its maximum is kept, so that later passes skip most blocks

// A row of logits as passes read it: `x - pivot` are distances from the largest value, at most 0. The exact values are
// in `exact` if it is set, else in x.
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
    double cut = 0.0;   // tokens whose value / temperature is below it are not drawn
    int64_t first = 0;  // a token with the largest value
    uint64_t seed = 0;
    uint32_t position = 0;
};

struct MixTerm {
    const float* row;
    double coefficient;
    double largest, log_sum;  // probs space only: log-softmax of the row is (row - largest) - log_sum
};

struct SampleIsa {
    // The largest of each block and of all; false if there is NaN.
    bool (*block_maxima)(const float* x, int64_t size, float* maxima, float* largest);
    // The largest of a row of doubles; false if there is NaN.
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
