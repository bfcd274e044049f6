// What a caller of the sampler may pass. Nothing is computed before all of it was checked.

#include <cmath>
#include <limits>

#include "sample.h"

namespace motet {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::string out_of_range(const char* what, int64_t sample, int64_t value, int64_t limit) {
    return "sample " + std::to_string(sample) + ": " + what + " is " + std::to_string(value) + ", it must be in 0…" +
           std::to_string(limit);
}

std::string check_edits(const MotetSample& s, int64_t sample, int64_t vocab) {
    if (s.num_edits < 0 || (s.num_edits > 0 && !(s.edit_ids && s.edit_divisors && s.edit_penalties && s.edit_biases)))
        return "sample " + std::to_string(sample) + ": num_edits is " + std::to_string(s.num_edits) +
               ", it must be at least 0, and where it is more there must be four arrays";
    for (int64_t i = 0; i < s.num_edits; i++) {
        if (s.edit_ids[i] < 0 || s.edit_ids[i] >= vocab)
            return out_of_range("an edited id", sample, s.edit_ids[i], vocab - 1);
        const struct {
            const char* name;
            bool fine;
            double value;
        } numbers[] = {
            {"divisor", std::isfinite(s.edit_divisors[i]) && s.edit_divisors[i] > 0, s.edit_divisors[i]},
            {"penalty", !std::isnan(s.edit_penalties[i]), s.edit_penalties[i]},
            {"bias", s.edit_biases[i] < kInfinity, s.edit_biases[i]},
        };
        for (const auto& number : numbers)
            if (!number.fine)
                return "sample " + std::to_string(sample) + ": the " + number.name + " of token " +
                       std::to_string(s.edit_ids[i]) + " is " + std::to_string(number.value) + ", out of its range";
    }
    return "";
}

std::string check_candidates(const MotetSample& s, int64_t sample, int64_t vocab) {
    if (s.num_candidates < 0 || (s.num_candidates > 0 && !(s.candidates && s.candidate_logprobs && s.logprobs >= 0)))
        return "sample " + std::to_string(sample) + ": num_candidates is " + std::to_string(s.num_candidates) +
               ", it must be at least 0, and where it is more there must be two arrays and logprobs";
    for (int64_t i = 0; i < s.num_candidates; i++)
        if (s.candidates[i] < 0 || s.candidates[i] >= vocab)
            return out_of_range("a candidate", sample, s.candidates[i], vocab - 1);
    return "";
}

std::string check_numbers(const MotetSample& s, int64_t index) {
    const struct {
        const char* name;
        bool fine;
        double value;
    } numbers[] = {
        {"temperature", std::isfinite(s.temperature) && s.temperature >= 0, s.temperature},
        {"top_p", s.top_p > 0 && s.top_p <= 1, s.top_p},
        {"min_p", s.min_p >= 0 && s.min_p <= 1, s.min_p},
        {"top_k", s.top_k >= 0, double(s.top_k)},
    };
    for (const auto& number : numbers)
        if (!number.fine)
            return "sample " + std::to_string(index) + ": " + number.name + " " + std::to_string(number.value) +
                   " is out of its range";
    return "";
}

std::string check_sample(const MotetSampling& all, int64_t index) {
    const MotetSample& s = all.samples[index];
    if (s.num_terms < 1 || s.first_term < 0 || s.num_terms > all.num_terms ||
        s.first_term > all.num_terms - s.num_terms)
        return out_of_range("the end of its terms", index, s.first_term + s.num_terms, all.num_terms);
    if (s.logprobs < -1 || s.logprobs > all.top_stride)
        return out_of_range("logprobs", index, s.logprobs, all.top_stride);
    std::string problem = check_edits(s, index, all.vocab_size);
    if (problem.empty()) problem = check_candidates(s, index, all.vocab_size);
    return problem.empty() ? check_numbers(s, index) : problem;
}

}  // namespace

std::string check(const MotetSampling& all) {
    if (all.vocab_size < 1 || all.vocab_size > 1 << 28)
        return "vocab_size is " + std::to_string(all.vocab_size) + ", it must be in 1…2^28";
    if (all.num_rows < 0 || all.num_terms < 0 || all.num_samples < 0 || all.top_stride < 0)
        return "a count is negative";
    if (all.stride < all.vocab_size) return "the rows' stride " + std::to_string(all.stride) + " is below vocab_size";
    for (int64_t i = 0; i < all.num_terms; i++) {
        if (all.term_rows[i] < 0 || all.term_rows[i] >= all.num_rows)
            return "term " + std::to_string(i) + " has row " + std::to_string(all.term_rows[i]) + " of " +
                   std::to_string(all.num_rows);
        if (!std::isfinite(all.coefficients[i]))
            return "the coefficient of term " + std::to_string(i) + " is not finite";
    }
    for (int64_t i = 0; i < all.num_samples; i++) {
        const std::string problem = check_sample(all, i);
        if (!problem.empty()) return problem;
    }
    return "";
}

}  // namespace motet
