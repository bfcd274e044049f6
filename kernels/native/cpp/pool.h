// A small thread pool: all threads run one function, meet at barriers and share the items of a phase.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace motet {

using Clock = std::chrono::steady_clock;

// Waiting spins for a moment, then gives the core away between looks, then sleeps in the kernel: so a quiet machine has
// short barriers, a busy one loses little, and an idle one burns nothing.
class Signal {
public:
    struct Patience {
        int spins, yields;
    };
    uint32_t value() const { return value_.load(std::memory_order_acquire); }
    // Returns how long it took after the spins: 0 where others are on time.
    Clock::duration wait_while(uint32_t seen, Patience patience);
    void set(uint32_t value);  // by one thread at a time

private:
    std::atomic<uint32_t> value_{0};
    std::atomic<uint32_t> sleepers_{0};
};

class Pool {
public:
    using Function = void (*)(void* context, int thread);

    explicit Pool(int threads);
    ~Pool();
    int threads() const { return threads_; }  // at most: thread numbers are below
    int active() const { return active_; }    // that take part in this run

    // Run `function` on every active thread, the caller being thread 0; returns when all have.
    void run(Function function, void* context);
    void barrier();

    // Items 0…count-1 of a phase: each thread takes those of its own share one by one, then helps the others. Phases
    // are numbered by the caller, alike on all threads; `reset` makes the numbers free again.
    void reset(int phases);
    template <class Body>
    void distribute(int phase, int thread, int64_t count, Body body) {
        for (int i = 0; i < active_; i++) {
            const int owner = (thread + i) % active_;
            const int64_t first = count * owner / active_, size = count * (owner + 1) / active_ - first;
            std::atomic<int64_t>& taken = cursors_[size_t(phase) * threads_ + owner].taken;
            if (i && taken.load(std::memory_order_relaxed) >= size) continue;
            for (int64_t at = taken.fetch_add(1, std::memory_order_relaxed); at < size;
                 at = taken.fetch_add(1, std::memory_order_relaxed))
                body(first + at);
        }
    }

private:
    struct alignas(64) Cursor {
        std::atomic<int64_t> taken{0};
    };
    void work(int thread);
    void start();
    void judge(Clock::time_point begin, Clock::time_point end);

    const int threads_;
    int active_;
    std::vector<std::thread> workers_;
    std::vector<Cursor> cursors_;
    Function function_ = nullptr;
    void* context_ = nullptr;
    bool stop_ = false;
    Signal start_, passed_;
    std::atomic<int> arrived_{0};
    std::atomic<Clock::rep> lost_{0};  // waited for late threads in this run
    int slow_runs_ = 0;                // in a row
    Clock::duration pause_;            // with a thread fewer
    Clock::time_point retry_;          // when all threads are tried again
};

}  // namespace motet
