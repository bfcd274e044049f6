// A thread that is always late is left out and taken in again; every item of every phase is done once, whoever takes
// part.
#include "../../kernels/native/cpp/pool.h"

#include <chrono>
#include <cstdio>
#include <vector>

using namespace std::chrono_literals;

namespace {

constexpr int kThreads = 3, kPhases = 4, kItems = 50;

struct Job {
    motet::Pool& pool;
    bool late = false;
    std::atomic<int> taken[kPhases][kItems] = {};
    int before[kItems] = {};  // by items of a phase, read in the next: what a barrier must make visible

    void run(int thread) {
        for (int phase = 0; phase < kPhases; phase++) {
            pool.distribute(phase, thread, kItems, [&](int64_t item) {
                taken[phase][item]++;
                if (phase && before[(item + 7) % kItems] != phase - 1) wrong++;
                if (phase == 0) before[item] = 0;
            });
            if (late && thread == kThreads - 1) std::this_thread::sleep_for(5ms);
            pool.barrier();
            if (phase) pool.distribute(kPhases + phase, thread, kItems, [&](int64_t item) { before[item] = phase; });
            if (phase) pool.barrier();
        }
    }
    std::atomic<int> wrong{0};
};

bool once(motet::Pool& pool, bool late) {
    Job job{pool, late};
    pool.reset(2 * kPhases);
    pool.run([](void* context, int thread) { static_cast<Job*>(context)->run(thread); }, &job);
    bool right = job.wrong == 0;
    for (auto& phase : job.taken)
        for (auto& count : phase) right = right && count == 1;
    return right;
}

}  // namespace

int main() {
    motet::Pool pool(kThreads);
    int runs = 0;
    for (const bool late : {false, true, false, true, false}) {
        const int wanted = late ? kThreads - 1 : kThreads;
        const auto begin = std::chrono::steady_clock::now();
        do {
            if (!once(pool, late)) return printf("run %d: an item was not done once\n", runs), 1;
            runs++;
            if (std::chrono::steady_clock::now() - begin > 60s)
                return printf("%d threads take part, wanted %d\n", pool.active(), wanted), 1;
        } while (pool.active() != wanted);
        for (int i = 0; i < 200; i++, runs++)
            if (!once(pool, false)) return printf("run %d: an item was not done once\n", runs), 1;
    }
    printf("%d runs\n", runs);
    return 0;
}
