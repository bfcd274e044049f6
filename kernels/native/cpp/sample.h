// Mixing and sampling on the host, as kernels/oracle/reference.py defines them, with the passes of sample.inl.
#pragma once
#include <string>
#include <vector>

#include "motet.h"
#include "pool.h"
#include "sample_isa.h"

namespace motet {

std::string check(const MotetSampling&);  // why the samples cannot be drawn; empty if they can

// Samples are independent, so a result depends neither on the others nor on the threads. `pool` may be null.
void sample(const SampleIsa&, Pool* pool, const MotetSampling&);

// The work space of one thread, which draws one sample at a time.
class Sampler {
public:
    void run(const SampleIsa&, const MotetSampling&, int64_t index);

private:
    enum class State { Fine, NotFinite, NothingLeft };
    struct Weighted {
        double tempered, weight;
    };

    bool mix();       // makes the mixed row; false: all coefficients are 0, or a row has no softmax
    State measure();  // sets top_ of the mixed or adjusted row
    void view();      // sets row_, from which the later passes read
    bool is_adjusted() const;
    void adjust();  // applies edits and mask to exact_, or the mask to a copy of plain_
    template <typename T>
    void forbid(const uint32_t* mask, T* row) const;
    int64_t largest_id() const;  // lowest id with the largest value
    void collect(float distance);
    void collect_largest(int64_t count);  // the `count` largest, perhaps more
    double cut(double tempered_top);      // the value / temperature that a token must reach
    double top_k(double tempered_top);
    double top_p(double tempered_top, double least);
    double nucleus(double total, bool* sure);
    double nucleus_sorted();
    void gather(double least, double tempered_top);
    bool largest_of(const float* row, float* largest);
    void report_top();
    void report_candidates();
    void report(int64_t token);
    double value_before(int64_t id) const;

    const SampleIsa* isa_ = nullptr;
    const MotetSampling* all_ = nullptr;
    const MotetSample* sample_ = nullptr;
    int64_t index_ = 0, size_ = 0;

    std::vector<MixTerm> terms_;
    std::vector<double> exact_, exps_;
    std::vector<float> narrow_, maxima_, scratch_, masked_;
    int64_t found_ = 0;
    std::vector<int32_t> ids_;
    std::vector<Weighted> weighted_;
    struct Change {
        int64_t id;
        double before;
    };
    std::vector<Change> changes_;
    const float* plain_ = nullptr;  // the member's row if the mix is one member and nothing is edited
    RowView row_;
    double top_ = 0.0;      // the largest value
    double log_sum_ = 0.0;  // log Σ exp(value - mixed_top_) of the mixed row
    double mixed_top_ = 0.0;
};

}  // namespace motet
