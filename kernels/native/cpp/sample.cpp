#include "sample.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace motet {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kLeastTemperature = 1e-200;  // below it quotients overflow, so the draw is greedy
constexpr int64_t kSorted = 1024;             // up to so many candidates of top-p are sorted directly
constexpr double kSumError = 1e-11;  // relative error of sums of probabilities in another order than the oracle's

}  // namespace

static Sampler& sampler_of_thread() {
    static thread_local Sampler sampler;
    return sampler;
}

void sample(const SampleIsa& isa, Pool* pool, const MotetSampling& all) {
    if (!pool || all.num_samples < 2) {
        for (int64_t i = 0; i < all.num_samples; i++) sampler_of_thread().run(isa, all, i);
        return;
    }
    struct Job {
        const SampleIsa& isa;
        Pool& pool;
        const MotetSampling& all;
    } job{isa, *pool, all};
    pool->reset(1);
    pool->run(
        [](void* context, int thread) {
            Job& j = *static_cast<Job*>(context);
            j.pool.distribute(0, thread, j.all.num_samples,
                              [&](int64_t i) { sampler_of_thread().run(j.isa, j.all, i); });
        },
        &job);
}

void Sampler::run(const SampleIsa& isa, const MotetSampling& all, int64_t index) {
    isa_ = &isa;
    all_ = &all;
    sample_ = &all.samples[index];
    index_ = index;
    size_ = all.vocab_size;
    all.token_ids[index] = -1;
    all.logprobs[index] = kNaN;
    std::fill_n(all.top_ids + index * all.top_stride, all.top_stride, int64_t(-1));
    std::fill_n(all.top_logprobs + index * all.top_stride, all.top_stride, kNaN);
    std::fill_n(all.member_logprobs + sample_->first_term, sample_->num_terms, kNaN);
    std::fill_n(sample_->candidate_logprobs, sample_->num_candidates, kNaN);
    changes_.clear();

    State state = mix() ? measure() : State::NotFinite;
    if (state == State::Fine && sample_->logprobs >= 0) {
        view();
        report_top();
        report_candidates();
    }
    if (state == State::Fine && is_adjusted()) {
        adjust();
        state = measure();
    }
    all.codes[index] = state == State::Fine        ? MOTET_SAMPLED
                       : state == State::NotFinite ? MOTET_NOT_FINITE
                                                   : MOTET_NOTHING_LEFT;
    if (state != State::Fine) return;
    view();
    const double t = sample_->temperature, tempered_top = top_ / t;
    int64_t token = largest_id();
    if (t >= kLeastTemperature && std::isfinite(tempered_top))
        token = isa.draw({row_, t, tempered_top, cut(tempered_top), token, sample_->seed, sample_->position});
    report(token);
}

// ---- the mix ----

bool Sampler::mix() {
    terms_.clear();
    int64_t taking_part = 0;
    for (int64_t i = 0; i < sample_->num_terms; i++) {
        const int64_t at = sample_->first_term + i;
        terms_.push_back({all_->logits + all_->term_rows[at] * all_->stride, all_->coefficients[at], 0.0, 0.0});
        taking_part += all_->coefficients[at] != 0;
    }
    const auto first =
        std::find_if(terms_.begin(), terms_.end(), [](const MixTerm& term) { return term.coefficient != 0; });
    const bool alone = taking_part == 1 && first->coefficient == 1;
    plain_ = alone ? first->row : nullptr;
    if (taking_part == 0) return false;
    if (alone && !sample_->num_edits) return true;
    terms_.erase(
        std::remove_if(terms_.begin(), terms_.end(), [](const MixTerm& term) { return term.coefficient == 0; }),
        terms_.end());
    exact_.resize(size_t(size_));
    plain_ = nullptr;
    if (!sample_->probs || alone) {
        isa_->mix_logits(terms_.data(), int64_t(terms_.size()), size_, exact_.data());
        return true;
    }
    for (MixTerm& term : terms_) {
        float largest;
        if (!largest_of(term.row, &largest)) return false;
        term.largest = largest;
    }
    exps_.resize(size_t(size_));
    isa_->mix_probs(terms_.data(), int64_t(terms_.size()), size_, exps_.data(), exact_.data());
    return true;
}

// The largest logit of a member's row; false if the row has no softmax.
bool Sampler::largest_of(const float* row, float* largest) {
    scratch_.resize(size_t(size_ / kSampleBlock + 1));
    return isa_->block_maxima(row, size_, scratch_.data(), largest) && std::isfinite(*largest);
}

Sampler::State Sampler::measure() {
    bool numbers = true;
    if (plain_) {
        float largest;
        maxima_.resize(size_t(size_ / kSampleBlock + 1));
        numbers = isa_->block_maxima(plain_, size_, maxima_.data(), &largest);
        row_ = {plain_, nullptr, size_, largest, maxima_.data()};
        top_ = double(largest);
    } else {
        numbers = isa_->largest(exact_.data(), size_, &top_);
    }
    if (!numbers || top_ == kInfinity) return State::NotFinite;
    return top_ == -kInfinity ? State::NothingLeft : State::Fine;
}

void Sampler::view() {
    if (plain_) return;
    float largest;
    narrow_.resize(size_t(size_));
    maxima_.resize(size_t(size_ / kSampleBlock + 1));
    isa_->narrow(exact_.data(), size_, top_, narrow_.data());
    isa_->block_maxima(narrow_.data(), size_, maxima_.data(), &largest);
    row_ = {narrow_.data(), exact_.data(), size_, 0.0f, maxima_.data()};
}

int64_t Sampler::largest_id() const {
    for (int64_t block = 0;; block++) {
        if (maxima_[size_t(block)] != row_.pivot) continue;
        const int64_t end = std::min(size_, (block + 1) * kSampleBlock);
        for (int64_t i = block * kSampleBlock; i < end; i++)
            if (row_.value(i) == top_) return i;
    }
}

// ---- edits ----

bool Sampler::is_adjusted() const { return sample_->num_edits || sample_->mask; }

void Sampler::adjust() {
    const MotetSample& s = *sample_;
    for (int64_t i = 0; i < s.num_edits; i++) {
        double& x = exact_[size_t(s.edit_ids[i])];
        if (s.logprobs >= 0) changes_.push_back({s.edit_ids[i], x});
        const double scaled = x > 0 ? x / s.edit_divisors[i] : x * s.edit_divisors[i];
        x = scaled - s.edit_penalties[i] + s.edit_biases[i];
    }
    if (!s.mask) return;
    if (plain_) {
        masked_.assign(plain_, plain_ + size_);
        forbid(s.mask, masked_.data());
        plain_ = masked_.data();
    } else {
        forbid(s.mask, exact_.data());
    }
}

template <typename T>
void Sampler::forbid(const uint32_t* mask, T* row) const {
    for (int64_t first = 0; first < size_; first += 32) {
        const uint32_t allowed = mask[first / 32];
        const int64_t count = std::min<int64_t>(32, size_ - first);
        if (allowed == 0) {
            std::fill_n(row + first, count, -std::numeric_limits<T>::infinity());
        } else if (allowed != ~uint32_t(0)) {
            for (int64_t i = 0; i < count; i++)
                if (!(allowed >> i & 1)) row[first + i] = -std::numeric_limits<T>::infinity();
        }
    }
}

// ---- truncation: every rule is a threshold ----

void Sampler::collect_largest(int64_t count) {
    const int64_t blocks = (size_ + kSampleBlock - 1) / kSampleBlock;
    float least = -std::numeric_limits<float>::infinity();
    if (count <= blocks) {  // `count` blocks have a maximum that reaches the count-th largest maximum
        scratch_.assign(maxima_.begin(), maxima_.begin() + blocks);
        std::nth_element(scratch_.begin(), scratch_.begin() + (count - 1), scratch_.end(), std::greater<float>());
        const double distance = double(scratch_[size_t(count - 1)] - row_.pivot);
        // A margin for values that differ only by rounding.
        least = float(distance - 1e-6 * std::fabs(distance) - 1e-15 * std::fabs(top_) - 1e-12);
    }
    collect(least);
}

// Sets ids_[0…found_ - 1] to the tokens whose value - largest is at least `distance`.
void Sampler::collect(float distance) {
    ids_.resize(size_t(std::max<int64_t>(size_, int64_t(ids_.size()))));
    found_ = isa_->collect(row_, distance, ids_.data());
}

double Sampler::cut(double tempered_top) {
    const MotetSample& s = *sample_;
    double least = -kInfinity;
    if (s.top_k > 0 && s.top_k < size_) least = top_k(tempered_top);
    if (s.top_p < 1) least = std::max(least, top_p(tempered_top, least));
    if (s.min_p > 0) least = std::max(least, tempered_top + std::log(s.min_p));
    return least;
}

// Sets weighted_ to those of ids_ that reach `least`, with their probabilities (not normalised).
void Sampler::gather(double least, double tempered_top) {
    weighted_.clear();
    for (int64_t i = 0; i < found_; i++) {
        const double tempered = row_.value(ids_[size_t(i)]) / sample_->temperature;
        if (tempered >= least && tempered > -kInfinity)
            weighted_.push_back({tempered, std::exp(tempered - tempered_top)});
    }
}

double Sampler::top_k(double tempered_top) {
    collect_largest(sample_->top_k);
    weighted_.clear();
    for (int64_t i = 0; i < found_; i++) weighted_.push_back({row_.value(ids_[size_t(i)]) / sample_->temperature, 0.0});
    const auto last = weighted_.begin() + (sample_->top_k - 1);
    std::nth_element(weighted_.begin(), last, weighted_.end(),
                     [](const Weighted& a, const Weighted& b) { return a.tempered > b.tempered; });
    const double least = last->tempered;
    if (sample_->top_p < 1) gather(least, tempered_top);
    return least;
}

double Sampler::top_p(double tempered_top, double least) {
    bool sure = false;
    double result = 0.0;
    if (sample_->top_k > 0 && sample_->top_k < size_) {  // weighted_ holds the tokens that top-k kept
        if (int64_t(weighted_.size()) <= kSorted) return nucleus_sorted();
        double total = 0.0;
        for (const Weighted& one : weighted_) total += one.weight;
        result = nucleus(total, &sure);
    } else {
        const double total = isa_->exp_sum(row_, top_, 1.0 / sample_->temperature);
        for (const double distance : {4.0, 8.0, 16.0, kInfinity}) {
            collect(float(-distance * sample_->temperature));
            gather(-kInfinity, tempered_top);
            double mass = 0.0;
            for (const Weighted& one : weighted_) mass += one.weight;
            if (mass >= sample_->top_p * total * (1 + 2 * kSumError)) break;
        }
        result = nucleus(total, &sure);
        if (!sure) collect(-std::numeric_limits<float>::infinity());
    }
    if (sure) return result;
    gather(least, tempered_top);
    return nucleus_sorted();
}

// The cut of top-p on all of weighted_, with the oracle's own arithmetic.
double Sampler::nucleus_sorted() {
    std::sort(weighted_.begin(), weighted_.end(),
              [](const Weighted& a, const Weighted& b) { return a.tempered > b.tempered; });
    double sum = 0.0;
    for (Weighted& one : weighted_) one.weight = sum += one.weight;
    const double target = sample_->top_p * sum;
    const auto last = std::lower_bound(weighted_.begin(), weighted_.end(), target,
                                       [](const Weighted& one, double t) { return one.weight < t; });
    return last == weighted_.end() ? weighted_.back().tempered : last->tempered;
}

// The same by selection: the values are partitioned in three around a pivot, and the part in which the sum reaches p is
// partitioned further. Sums have another order than the oracle's; a result that this could change is not `sure`.
double Sampler::nucleus(double total, bool* sure) {
    const double target = sample_->top_p * total,
                 margin = (kSumError + 1e-15 * std::fabs(top_ / sample_->temperature)) * total;
    auto first = weighted_.begin(), end = weighted_.end();
    double above = 0.0;
    while (first != end) {
        const double a = first->tempered, b = (first + (end - first) / 2)->tempered, c = (end - 1)->tempered;
        const double pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
        const auto greater_end = std::partition(first, end, [&](const Weighted& one) { return one.tempered > pivot; });
        const auto equal_end =
            std::partition(greater_end, end, [&](const Weighted& one) { return one.tempered == pivot; });
        double greater = 0.0, equal = 0.0;
        for (auto at = first; at != greater_end; ++at) greater += at->weight;
        for (auto at = greater_end; at != equal_end; ++at) equal += at->weight;
        if (above + greater >= target) {
            end = greater_end;
        } else if (above + greater + equal >= target) {
            *sure = target - (above + greater) > margin && above + greater + equal - target > margin;
            return pivot;
        } else {
            above += greater + equal;
            first = equal_end;
        }
    }
    *sure = false;
    return -kInfinity;
}

// ---- log-probabilities ----

void Sampler::report_top() {
    mixed_top_ = top_;
    log_sum_ = std::log(isa_->exp_sum(row_, top_, 1.0));
    const int64_t count = std::min<int64_t>(sample_->logprobs, size_);
    if (count == 0) return;
    collect_largest(count);
    std::vector<std::pair<double, int64_t>> best;
    for (int64_t i = 0; i < found_; i++)
        best.emplace_back(-(row_.value(ids_[size_t(i)]) - mixed_top_ - log_sum_), ids_[size_t(i)]);
    std::partial_sort(best.begin(), best.begin() + count, best.end());
    for (int64_t i = 0; i < count; i++) {
        all_->top_ids[index_ * all_->top_stride + i] = best[size_t(i)].second;
        all_->top_logprobs[index_ * all_->top_stride + i] = -best[size_t(i)].first;
    }
}

void Sampler::report_candidates() {
    for (int64_t i = 0; i < sample_->num_candidates; i++)
        sample_->candidate_logprobs[i] = row_.value(sample_->candidates[i]) - mixed_top_ - log_sum_;
}

double Sampler::value_before(int64_t id) const {
    for (const Change& one : changes_)
        if (one.id == id) return one.before;
    return row_.value(id);
}

void Sampler::report(int64_t token) {
    all_->token_ids[index_] = token;
    if (sample_->logprobs >= 0) all_->logprobs[index_] = value_before(token) - mixed_top_ - log_sum_;
    if (!sample_->member_logprobs) return;
    for (int64_t at = sample_->first_term; at < sample_->first_term + sample_->num_terms; at++) {
        const float* row = all_->logits + all_->term_rows[at] * all_->stride;
        float largest;
        if (!largest_of(row, &largest)) continue;
        const double sum = isa_->exp_sum({row, nullptr, size_, largest, nullptr}, largest, 1.0);
        all_->member_logprobs[at] = double(row[token]) - double(largest) - std::log(sum);
    }
}

}  // namespace motet
