// A small thread pool: all threads run one function, wait at barriers, and take the items of a phase.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace motet {

using Clock = std::chrono::steady_clock;

// A value that threads wait on. A wait spins for a moment, then yields the core between checks, then sleeps in the
// operating system. So barriers are short on a quiet machine, cost little on a busy one, and an idle one uses no CPU.
class Signal {
public:
    struct Patience {
        int spins, yields;
    };
    uint32_t value() const { return value_.load(std::memory_order_acquire); }
    // Returns the time that it waited after the spins; 0 if the value changed while it spun.
    Clock::duration wait_while(uint32_t seen, Patience patience);
    void set(uint32_t value);  // not from two threads at once

private:
    std::atomic<uint32_t> value_{0};
    std::atomic<uint32_t> sleepers_{0};
};

class Pool {
public:
    using Function = void (*)(void* context, int thread);

    // `leave` is called by each thread after each run; null: nothing is.
    explicit Pool(int threads, void (*leave)() = nullptr);
    ~Pool();
    int threads() const { return threads_; }  // most threads; thread numbers are below this
    int active() const { return active_; }    // threads that take part in this run

    // Run `function` on every active thread, with the caller as thread 0. Returns when all have finished.
    void run(Function function, void* context);
    void barrier();

    // Call `body` once for each of the items 0…count-1 of a phase. Each thread takes the items of its own part one by
    // one, then items of the others' parts. All threads must number the phases alike; `reset` frees the numbers.
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

    void call(int thread);

    const int threads_;
    void (*const leave_)();
    int active_;
    std::vector<std::thread> workers_;
    std::vector<Cursor> cursors_;
    Function function_ = nullptr;
    void* context_ = nullptr;
    bool stop_ = false;
    Signal start_, passed_;
    std::atomic<int> arrived_{0};
    std::atomic<Clock::rep> lost_{0};  // time waited for late threads in this run, of all threads
    int slow_runs_ = 0;                // slow runs in a row
    Clock::duration pause_;            // how long a thread is left out
    Clock::time_point retry_;          // when all threads are tried again
};

}  // namespace motet
