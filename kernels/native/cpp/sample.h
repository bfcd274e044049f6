// Mixing and sampling on the host: the rules of kernels/oracle/reference.py over the passes of sample.inl.
#pragma once
#include <string>
#include <vector>

#include "motet.h"
#include "pool.h"
#include "sample_isa.h"

namespace motet {

std::string check(const MotetSampling&);  // why it cannot run; empty when it can

// Every sample for itself, so neither its neighbours nor the threads matter; `pool` may be null.
void sample(const SampleIsa&, Pool* pool, const MotetSampling&);

// The work space of one thread, and one sample at a time in it.
class Sampler {
public:
    void run(const SampleIsa&, const MotetSampling&, int64_t index);

private:
    enum class State { Fine, NotFinite, NothingLeft };
    struct Weighted {
        double tempered, weight;
    };

    bool mix();       // the mixed row; false: nothing takes part, or a row has no softmax
    State measure();  // top_ of the mixed or adjusted row
    void view();      // row_: what the passes over it need
    bool is_adjusted() const;
    void adjust();               // edits and mask, on exact_
    int64_t largest_id() const;  // lowest id with the largest value
    void collect(float distance);
    void collect_largest(int64_t count);  // at least the `count` largest
    double cut(double tempered_top);      // the value / temperature that a token must reach
    double top_k(double tempered_top);
    double top_p(double tempered_top, double least);
    double nucleus(double total, bool* sure);
    double nucleus_sorted();
    void gather(double least, double tempered_top);
    bool largest_of(const float* row, float* largest);
    void report_top();
    void report(int64_t token);
    double value_before(int64_t id) const;

    const SampleIsa* isa_ = nullptr;
    const MotetSampling* all_ = nullptr;
    const MotetSample* sample_ = nullptr;
    int64_t index_ = 0, size_ = 0;

    std::vector<MixTerm> terms_;
    std::vector<double> exact_, exps_;
    std::vector<float> narrow_, maxima_, scratch_;
    int64_t found_ = 0;
    std::vector<int32_t> ids_;
    std::vector<Weighted> weighted_;
    struct Change {
        int64_t id;
        double before;
    };
    std::vector<Change> changes_;
    const float* plain_ = nullptr;  // the row itself, where the mix is one member and nothing is adjusted
    RowView row_;
    double top_ = 0.0;      // the largest value
    double log_sum_ = 0.0;  // log Σ exp(value - mixed_top_) of the mixed row
    double mixed_top_ = 0.0;
};

}  // namespace motet
