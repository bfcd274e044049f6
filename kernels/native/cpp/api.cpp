// The C interface: it validates arguments, and no exception leaves it.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>

#include "model.h"
#include "sample.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <cpuid.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

using namespace motet;

struct MotetModel {
    Model model;
    bool ready = false;
};

namespace {

thread_local std::string last_error;

int fail(int code, const std::string& message) {
    last_error = message;
    return code;
}

template <class Body>
int guarded(Body body) {
    try {
        return body();
    } catch (const std::invalid_argument& error) {
        return fail(MOTET_INVALID, error.what());
    } catch (const std::bad_alloc&) {
        return fail(MOTET_FAILED, "there is not enough memory");
    } catch (const std::exception& error) {
        return fail(MOTET_FAILED, error.what());
    }
}

bool runs(const char* isa) {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    if (!strcmp(isa, "avx512")) return avx512;
    if (!strcmp(isa, "amx-emulated")) return avx512;
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (!strcmp(isa, "avx512bf16")) return bf16;
    if (!strcmp(isa, "amx")) return bf16 && may_use_amx();
    unsigned a, b, c, d;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & 1u << 29);  // older compilers do not know its name
    const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!strcmp(isa, "avx2")) return avx2;
    if (!strcmp(isa, "avxvnni")) return avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
#endif
#if defined(__aarch64__) && defined(__linux__)
    if (!strcmp(isa, "neon")) return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__aarch64__) && defined(__APPLE__)
    if (!strcmp(isa, "neon")) return true;
#endif
    return !strcmp(isa, "portable");
}

// Best first; the last one is for tests.
const std::vector<const Isa*>& paths() {
    static const std::vector<const Isa*> all = [] {
        std::vector<const Isa*> result;
        for (const Isa* isa : {isa_amx(), isa_avx512bf16(), isa_avx512(), isa_avxvnni(), isa_avx2(), isa_neon(),
                               isa_portable(), isa_amx_emulated()})
            if (isa && runs(isa->name)) result.push_back(isa);
        return result;
    }();
    return all;
}

const Isa* path(const char* name) {
    if (!name || !*name) return paths().front();
    for (const Isa* isa : paths())
        if (!strcmp(isa->name, name)) return isa;
    return nullptr;
}

std::string check(const MotetConfig& c) {
    auto text = [](int64_t value) { return std::to_string(value); };
    const struct {
        const char* name;
        int32_t value;
    } counts[] = {
        {"vocab_size", c.vocab_size},   {"hidden_size", c.hidden_size}, {"intermediate_size", c.intermediate_size},
        {"num_layers", c.num_layers},   {"num_heads", c.num_heads},     {"num_kv_heads", c.num_kv_heads},
        {"head_size", c.head_size},     {"num_blocks", c.num_blocks},   {"max_positions", c.max_positions},
        {"num_members", c.num_members}, {"threads", c.threads}};
    for (const auto& count : counts)
        if (count.value < 1 || count.value > 1 << 28)
            return std::string(count.name) + " is " + text(count.value) + ", it must be at least 1";
    if (c.hidden_size % kLanes)
        return "hidden_size is " + text(c.hidden_size) + ", these kernels need a multiple of 16";
    if (c.intermediate_size % kLanes)
        return "intermediate_size is " + text(c.intermediate_size) + ", these kernels need a multiple of 16";
    if (c.head_size % kLanes || c.head_size > kMaxHeadSize)
        return "head_size is " + text(c.head_size) + ", these kernels need a multiple of 16 up to " +
               text(kMaxHeadSize);
    if (!c.learned && (c.rotary_size < 2 || c.rotary_size % 2 || c.rotary_size > c.head_size))
        return "rotary_size is " + text(c.rotary_size) + ", it must be even and at most head_size";
    if (c.activation < MOTET_SWIGLU || c.activation > MOTET_GELU_ERF || c.norm_places < MOTET_NORM_BEFORE ||
        c.norm_places > MOTET_NORM_AFTER || c.qk_norm < MOTET_NO_QK_NORM || c.qk_norm > MOTET_QK_NORM_PROJECTION)
        return "the activation, the places of the norms or the norm of q and k is none of those known";
    if (c.parallel_residual && (c.norm_places != MOTET_NORM_BEFORE || c.num_experts))
        return "a parallel residual is for norms before attention and MLP, without experts";
    for (const float scale : {c.embedding_scale, c.residual_scale, c.attention_scale, c.logit_scale})
        if (!(scale > 0) || !std::isfinite(scale)) return "a scale is not a finite number above 0";
    for (const float cap : {c.attention_softcap, c.logit_softcap})
        if (!(cap >= 0) || !std::isfinite(cap)) return "a soft cap is not a finite number from 0 on";
    if (c.num_experts < 0 || c.num_experts > 1 << 16) return "num_experts is " + text(c.num_experts);
    if (c.num_experts && (c.experts_per_token < 1 || c.experts_per_token > c.num_experts))
        return "experts_per_token is " + text(c.experts_per_token) + ", it must be in 1…" + text(c.num_experts);
    if (c.num_experts && (c.expert_size < kLanes || c.expert_size % kLanes || c.expert_size > 1 << 28))
        return "expert_size is " + text(c.expert_size) + ", these kernels need a multiple of 16";
    if (c.num_heads % c.num_kv_heads)
        return "num_heads " + text(c.num_heads) + " is no multiple of num_kv_heads " + text(c.num_kv_heads);
    if (c.split_layer < 0 || c.split_layer > c.num_layers) return "split_layer is not in 0…" + text(c.num_layers);
    if (c.threads > 256) return "threads is " + text(c.threads) + ", the limit is 256";
    if (c.num_tails < 0 || c.num_tails > c.num_members || (!c.num_tails && c.num_members > 1))
        return "num_tails is " + text(c.num_tails) + " with " + text(c.num_members) + " members";
    if (!c.num_tails && c.split_layer < c.num_layers) return "there are layers from split_layer on, and no tails";
    for (int i = 0; c.num_tails && i < c.num_members; i++)
        if (c.tail_of[i] < 0 || c.tail_of[i] >= c.num_tails)
            return "the tail of member " + text(i) + " is " + text(c.tail_of[i]) + ", there are " + text(c.num_tails);
    if (int64_t(c.num_members) * c.num_blocks > 1 << 30) return "there are too many members and blocks of KV cache";
    return "";
}

struct Probe {
    const Isa* isa;
    Pool& pool;
    const uint8_t* data;
    int64_t size, iterations;
};

template <class Body>
double best_seconds(Body body) {
    double best = 1e9;
    for (int i = 0; i < 5; i++) {
        const auto start = std::chrono::steady_clock::now();
        body();
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return best;
}

}  // namespace

const char* motet_error(void) { return last_error.c_str(); }
int motet_isa_count(void) { return int(paths().size()); }
const char* motet_isa_name(int index) {
    return index >= 0 && index < motet_isa_count() ? paths()[size_t(index)]->name : nullptr;
}

int motet_create(const MotetConfig* config, const char* isa, MotetModel** out) {
    return guarded([&] {
        const std::string problem = check(*config);
        if (!problem.empty()) return fail(MOTET_UNSUPPORTED, problem);
        const Isa* chosen = path(isa);
        if (!chosen) return fail(MOTET_UNSUPPORTED, std::string("this CPU does not run the path '") + isa + "'");
        *out = new MotetModel{Model(*config, chosen)};
        return int(MOTET_OK);
    });
}

void motet_destroy(MotetModel* model) { delete model; }

int motet_set_linear(MotetModel* model, int which, int layer, int expert, const MotetTensor* tensor) {
    return guarded([&] {
        model->model.set_linear(MotetLinear(which), layer, expert, *tensor);
        return int(MOTET_OK);
    });
}

int motet_share_linear(MotetModel* model, int which, int layer, int expert, int source) {
    return guarded([&] {
        model->model.share_linear(MotetLinear(which), layer, expert, source);
        return int(MOTET_OK);
    });
}

int motet_set_adapter(MotetModel* model, int which, int layer, int member, int64_t rank, const float* a,
                      int64_t columns, const float* b, int64_t rows) {
    return guarded([&] {
        model->model.set_adapter(MotetLinear(which), layer, member, rank, a, columns, b, rows);
        return int(MOTET_OK);
    });
}

int motet_set_vector(MotetModel* model, int which, int index, const float* values, int64_t count) {
    return guarded([&] {
        model->model.set_vector(MotetVector(which), index, values, count);
        return int(MOTET_OK);
    });
}

int motet_set_window(MotetModel* model, int layer, int window) {
    return guarded([&] {
        model->model.set_window(layer, window);
        return int(MOTET_OK);
    });
}

int motet_set_rotary(MotetModel* model, int layer, int tables) {
    return guarded([&] {
        model->model.set_rotary(layer, MotetRotary(tables));
        return int(MOTET_OK);
    });
}

int motet_ready(MotetModel* model) {
    return guarded([&] {
        const std::string missing = model->model.missing();
        if (!missing.empty()) return fail(MOTET_INVALID, missing + " is missing");
        model->model.measure_head();
        model->ready = true;
        return int(MOTET_OK);
    });
}

int motet_step(MotetModel* model, const MotetBatch* batch, float* hidden) {
    return guarded([&] {
        if (!model->ready) return fail(MOTET_INVALID, "the model is not ready");
        const std::string problem = model->model.check(*batch);
        if (!problem.empty()) return fail(MOTET_INVALID, problem);
        model->model.step(*batch, hidden);
        return int(MOTET_OK);
    });
}

int motet_head(MotetModel* model, const float* hidden, int64_t rows, float* logits) {
    return guarded([&] {
        if (!model->ready || rows < 0)
            return fail(MOTET_INVALID, "the model is not ready, or there is a negative number of rows");
        if (rows) {
            model->model.head(hidden, rows, logits);
            model->model.finish_logits(logits, rows);
        }
        return int(MOTET_OK);
    });
}

int motet_sample(MotetModel* model, const char* isa, const MotetSampling* sampling) {
    return guarded([&] {
        const Isa* chosen = model ? model->model.isa() : path(isa);
        if (!chosen) return fail(MOTET_UNSUPPORTED, std::string("this CPU does not run the path '") + isa + "'");
        const std::string problem = check(*sampling);
        if (!problem.empty()) return fail(MOTET_INVALID, problem);
        sample(chosen->sample, model ? &model->model.pool() : nullptr, *sampling);
        return int(MOTET_OK);
    });
}

int motet_generate(MotetModel* model, const MotetBatch* batch, const MotetMixes* mixes, const MotetSampling* sampling) {
    return guarded([&] {
        if (!model->ready) return fail(MOTET_INVALID, "the model is not ready");
        Model& m = model->model;
        for (const std::string& problem : {m.check(*batch), m.check(*mixes, batch->num_outputs)})
            if (!problem.empty()) return fail(MOTET_INVALID, problem);
        MotetSampling drawn = *sampling;
        drawn.num_rows = mixes->rows;
        drawn.stride = m.logits_stride();
        drawn.vocab_size = m.config().vocab_size;
        const std::string problem = check(drawn);
        if (!problem.empty()) return fail(MOTET_INVALID, problem);
        float* hidden = m.hidden_room(batch->num_outputs);
        m.step(*batch, hidden);
        drawn.logits = m.logits(*mixes, hidden);
        for (int64_t i = 0; i < mixes->num_written; i++)
            std::copy_n(drawn.logits + mixes->written_rows[i] * drawn.stride, drawn.vocab_size,
                        mixes->written + i * drawn.vocab_size);
        sample(m.isa()->sample, &m.pool(), drawn);
        return int(MOTET_OK);
    });
}

int64_t motet_logits_stride(const MotetModel* model) { return model->model.logits_stride(); }

void motet_seconds(MotetModel* model, double* out) {
    std::copy(model->model.seconds(), model->model.seconds() + kParts, out);
    model->model.reset_seconds();
}

double motet_probe_dot(const char* isa, int threads) {
    const Isa* chosen = path(isa);
    if (!chosen || threads < 1) return 0.0;
    Pool pool(threads, chosen->leave);
    Probe probe{chosen, pool, nullptr, 0, 20'000'000};
    if (!strcmp(chosen->name, "portable") || !strcmp(chosen->name, "amx-emulated")) probe.iterations /= 50;
    auto once = [&] {
        pool.reset(1);
        pool.run(
            [](void* context, int thread) {
                Probe& p = *static_cast<Probe*>(context);
                p.pool.distribute(0, thread, p.pool.threads(), [&](int64_t) { p.isa->dot_probe(p.iterations); });
            },
            &probe);
    };
    return double(probe.iterations) * 16 * 64 * threads / best_seconds(once) / 1e9;
}

double motet_probe_read(const char* isa, int threads) {
    const Isa* chosen = path(isa);
    if (!chosen || threads < 1) return 0.0;
    Pool pool(threads, chosen->leave);
    const int64_t size = int64_t(512) << 20;
    Pages pages{size_t(size)};
    memset(pages.data(), 1, size_t(size));
    Probe probe{chosen, pool, pages.data(), size, 0};
    auto once = [&] {
        pool.reset(1);
        pool.run(
            [](void* context, int thread) {
                Probe& p = *static_cast<Probe*>(context);
                const int64_t each = p.size / p.pool.threads();
                p.pool.distribute(0, thread, p.pool.threads(),
                                  [&](int64_t part) { p.isa->read_probe(p.data + part * each, each); });
            },
            &probe);
    };
    return double(size) / best_seconds(once) / 1e9;
}
