// Every path of this CPU computes a small random decoder, through the C interface alone: a program without Python, for
// emulators of other CPUs. It prints each path, and fails unless paths on the same instructions have the same bits and
// all of them nearly the same values.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "../../kernels/native/cpp/motet.h"

namespace {

constexpr int kHidden = 128, kInner = 256, kHeads = 6, kKvHeads = 2, kHead = 64, kVocab = 256, kLayers = 2;
constexpr int kPositions = 352, kBlocks = 32;

struct Weight {  // as a bundle stores it
    std::vector<uint8_t> values;
    std::vector<float> scales, minima, bias;
    MotetTensor tensor{};

    Weight(std::mt19937& rng, int64_t rows, int64_t columns, int bits, int group, bool biased) {
        values.resize(size_t(rows * columns * bits / 8));
        for (uint8_t& value : values) value = uint8_t(rng());
        for (int64_t i = 0; i < rows * columns / group; i++) {
            const float spread = (0.5f + float(rng() % 1000) / 1000) / (bits == 8 ? 80.0f : 5.0f);
            scales.push_back(spread / std::sqrt(float(columns)));
            minima.push_back(-scales.back() * (7.0f + float(rng() % 100) / 100));
        }
        bias.assign(size_t(rows), 0.01f);
        tensor = {rows,
                  columns,
                  bits,
                  group,
                  values.data(),
                  scales.data(),
                  bits == 4 ? minima.data() : nullptr,
                  nullptr,
                  biased ? bias.data() : nullptr};
    }
};

void must(int code) {
    if (code != MOTET_OK) {
        printf("failed: %s\n", motet_error());
        exit(1);
    }
}

MotetModel* random_model(const char* isa, int bits, int group, bool kv_int8, int activation) {
    MotetConfig c{};
    c.vocab_size = kVocab, c.hidden_size = kHidden, c.intermediate_size = kInner, c.num_layers = kLayers;
    c.num_heads = kHeads, c.num_kv_heads = kKvHeads, c.head_size = kHead, c.max_positions = kPositions;
    c.activation = activation, c.rotary_size = kHead, c.tied_head = 1, c.split_layer = kLayers, c.num_members = 1;
    c.kv_int8 = kv_int8, c.num_blocks = kBlocks, c.threads = 2, c.norm_eps = 1e-5f;
    c.embedding_scale = c.residual_scale = c.logit_scale = 1.0f, c.attention_scale = 0.125f;
    MotetModel* model = nullptr;
    must(motet_create(&c, isa, &model));
    std::mt19937 rng(7);
    auto linear = [&](int which, int layer, int64_t rows, int64_t columns, int own_bits, bool biased) {
        const Weight w(rng, rows, columns, own_bits, group, biased);
        must(motet_set_linear(model, which, layer, -1, &w.tensor));
    };
    auto vector = [&](int which, int index, std::vector<float> values) {
        must(motet_set_vector(model, which, index, values.data(), int64_t(values.size())));
    };
    const bool gated = activation < MOTET_GELU;
    linear(MOTET_HEAD, 0, kVocab, kHidden, 8, false);
    for (int layer = 0; layer < kLayers; layer++) {
        linear(MOTET_QKV, layer, (kHeads + 2 * kKvHeads) * kHead, kHidden, bits, true);
        linear(MOTET_OUT, layer, kHidden, kHeads * kHead, bits, false);
        linear(MOTET_UP, layer, gated ? 2 * kInner : kInner, kHidden, bits, false);
        linear(MOTET_DOWN, layer, kHidden, kInner, bits, false);
        vector(MOTET_ATTENTION_NORM, layer, std::vector<float>(kHidden, 1.1f));
        vector(MOTET_MLP_NORM, layer, std::vector<float>(kHidden, 0.9f));
    }
    vector(MOTET_FINAL_NORM, 0, std::vector<float>(kHidden, 1.0f));
    std::vector<float> cos, sin;
    for (int p = 0; p < kPositions; p++)
        for (int i = 0; i < kHead / 2; i++) {
            cos.push_back(float(std::cos(p * std::pow(10000.0, -2.0 * i / kHead))));
            sin.push_back(float(std::sin(p * std::pow(10000.0, -2.0 * i / kHead))));
        }
    vector(MOTET_COS, 0, cos);
    vector(MOTET_SIN, 0, sin);
    must(motet_ready(model));
    return model;
}

// Hidden states of texts of these lengths as prompts in one batch, then of one more token of each.
std::vector<float> states(MotetModel* model, const std::vector<int>& lengths) {
    std::vector<float> all;
    for (const int step : {0, 1}) {
        std::vector<int64_t> tokens, slots;
        std::vector<int32_t> positions, starts{0}, contexts, tables, members, rows;
        const int width = kPositions / 32;
        int next = 0;
        for (size_t s = 0; s < lengths.size(); s++) {
            const int blocks = (lengths[s] + 1 + 31) / 32, first = step ? lengths[s] : 0, last = lengths[s] + step;
            for (int p = first; p < last; p++) {
                tokens.push_back((p * 31 + int(s) * 7 + 3) % kVocab);
                positions.push_back(p);
                slots.push_back(int64_t(next + p / 32) * 32 + p % 32);
                members.push_back(0);
                rows.push_back(int32_t(rows.size()));
            }
            for (int b = 0; b < width; b++) tables.push_back(b < blocks ? next + b : -1);
            next += blocks;
            starts.push_back(int32_t(tokens.size()));
            contexts.push_back(last);
        }
        MotetBatch batch{};
        batch.num_rows = int64_t(tokens.size()), batch.num_seqs = int64_t(lengths.size()), batch.max_blocks = width;
        batch.token_ids = tokens.data(), batch.positions = positions.data(), batch.slot_mapping = slots.data();
        batch.cu_seqlens = starts.data(), batch.context_lens = contexts.data(), batch.block_tables = tables.data();
        batch.num_outputs = batch.num_rows, batch.output_members = members.data(), batch.output_rows = rows.data();
        const size_t begin = all.size();
        all.resize(begin + tokens.size() * kHidden);
        must(motet_step(model, &batch, all.data() + begin));
    }
    return all;
}

struct Drawn {
    std::vector<int64_t> tokens, top;
    std::vector<double> logprobs;
};

// Tokens of samples of every kind over mixes of random rows, on one thread.
Drawn draws(const char* isa) {
    constexpr int64_t kRows = 6, kSize = 1003, kStride = 1008, kSamples = 60, kTop = 5;
    std::mt19937 rng(3);
    std::vector<float> logits(kRows * kStride);
    for (float& x : logits) x = float(int(rng() % 20000) - 10000) / 1000;
    std::vector<int64_t> terms;
    std::vector<double> coefficients;
    std::vector<MotetSample> samples(kSamples);
    for (int i = 0; i < kSamples; i++) {
        MotetSample& s = samples[size_t(i)];
        s = {};
        s.first_term = int64_t(terms.size()), s.num_terms = 1 + i % 3;
        for (int t = 0; t < s.num_terms; t++) {
            terms.push_back((i + t) % kRows);
            coefficients.push_back(1.0 / double(s.num_terms));
        }
        s.probs = i / 3 % 2, s.logprobs = i % 2 ? int32_t(kTop) : -1, s.top_k = i % 5 ? 0 : 40;
        s.top_p = i % 4 ? 1.0 : 0.8, s.min_p = i % 7 ? 0.0 : 0.01, s.temperature = i % 6 ? 0.7 + 0.1 * (i % 6) : 0.0;
        s.seed = uint64_t(rng()) << 32 | rng(), s.position = uint32_t(i);
    }
    Drawn found{std::vector<int64_t>(kSamples), std::vector<int64_t>(kSamples * kTop),
                std::vector<double>(kSamples * kTop)};
    std::vector<int32_t> codes(kSamples);
    std::vector<double> own(kSamples), members(terms.size());
    MotetSampling all{};
    all.logits = logits.data(), all.num_rows = kRows, all.stride = kStride, all.vocab_size = kSize;
    all.num_terms = int64_t(terms.size()), all.term_rows = terms.data(), all.coefficients = coefficients.data();
    all.num_samples = kSamples, all.samples = samples.data(), all.top_stride = kTop;
    all.token_ids = found.tokens.data(), all.codes = codes.data(), all.logprobs = own.data();
    all.top_ids = found.top.data(), all.top_logprobs = found.logprobs.data(), all.member_logprobs = members.data();
    must(motet_sample(nullptr, isa, &all));
    return found;
}

bool equal(const Drawn& a, const Drawn& b) {
    bool same = a.tokens == b.tokens && a.top == b.top;
    for (size_t i = 0; i < a.logprobs.size(); i++)
        same = same && (b.top[i] < 0 || std::isnan(b.logprobs[i]) || std::fabs(a.logprobs[i] - b.logprobs[i]) < 1e-9);
    return same;
}

double difference(const std::vector<float>& a, const std::vector<float>& b) {
    double errors = 0, squares = 0;
    for (size_t i = 0; i < a.size(); i++) {
        errors += (double(a[i]) - double(b[i])) * (double(a[i]) - double(b[i]));
        squares += double(b[i]) * double(b[i]);
    }
    return std::sqrt(errors / squares);
}

}  // namespace

int main() {
    const std::map<std::string, std::string> stands_on = {{"amx", "avx512bf16"}, {"amx-emulated", "avx512"}};
    int wrong = 0;
    for (int i = 0; i < motet_isa_count(); i++) printf("%s%s", i ? ", " : "paths: ", motet_isa_name(i));
    printf("\n");
    const Drawn expected = draws("portable");
    for (int i = 0; i < motet_isa_count(); i++)
        if (!equal(draws(motet_isa_name(i)), expected)) wrong++, printf("%s draws other tokens\n", motet_isa_name(i));
    for (const int bits : {8, 4})
        for (const int group : {16, 32, 64, 128})
            for (const bool kv_int8 : {true, false}) {
                std::map<std::string, std::vector<float>> found;
                for (int i = 0; i < motet_isa_count(); i++) {
                    MotetModel* model = random_model(motet_isa_name(i), bits, group, kv_int8,
                                                     group == 16 ? 0 : group / 32 - group / 128);
                    found[motet_isa_name(i)] = states(model, {1, 7, 40, 320, 17, 2, 3});
                    motet_destroy(model);
                }
                for (const auto& [name, values] : found) {
                    const double error = difference(values, found["portable"]);
                    const auto base = stands_on.find(name);
                    const bool bits_differ = base != stands_on.end() &&
                                             memcmp(values.data(), found[base->second].data(), values.size() * 4) != 0;
                    const bool off = !(error < 0.05);  // values at a rounding boundary fall to either side
                    wrong += bits_differ + off;
                    if (bits_differ || off)
                        printf("%s, %d bits, groups of %d, %s: %.2g off plain C++%s\n", name.c_str(), bits, group,
                               kv_int8 ? "int8" : "bf16", error, bits_differ ? ", and other bits" : "");
                }
            }
    printf("%s\n", wrong ? "wrong" : "all paths agree");
    return wrong != 0;
}
