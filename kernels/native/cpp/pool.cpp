#include "pool.h"

#include <algorithm>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace motet {
namespace {

constexpr int kSpins = 2000;                             // some tens of microseconds
constexpr Signal::Patience kAtBarrier = {kSpins, 4000};  // the wait is short unless another process has the core
constexpr Signal::Patience kBetweenRuns = {kSpins, 400};
constexpr Signal::Patience kLeftOut = {0, 0};
constexpr uint32_t kActiveBits = 10;                  // low bits of the start signal: number of active threads
constexpr auto kTurn = std::chrono::milliseconds(1);  // a wait this long means that a thread lost its core
constexpr int kSlowRuns = 2;                          // slow runs in a row before a thread is left out
constexpr auto kShortPause = std::chrono::milliseconds(30), kLongPause = std::chrono::milliseconds(250);

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#if defined(__linux__)
void sleep_while(std::atomic<uint32_t>& value, uint32_t seen) {
    syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}
void wake_all(std::atomic<uint32_t>& value) {
    syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
}
#else
void sleep_while(std::atomic<uint32_t>&, uint32_t) { std::this_thread::sleep_for(std::chrono::microseconds(100)); }
void wake_all(std::atomic<uint32_t>&) {}
#endif

}  // namespace

Clock::duration Signal::wait_while(uint32_t seen, Patience patience) {
    for (int i = 0; i < patience.spins; i++) {
        if (value() != seen) return {};
        relax();
    }
    const Clock::time_point begin = Clock::now();
    for (int i = 0; i < patience.yields; i++) {
        if (value() != seen) return Clock::now() - begin;
        std::this_thread::yield();
    }
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    while (value_.load(std::memory_order_seq_cst) == seen) sleep_while(value_, seen);
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
    return Clock::now() - begin;
}

void Signal::set(uint32_t value) {
    value_.store(value, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst)) wake_all(value_);
}

Pool::Pool(int threads, void (*leave)()) : threads_(threads), leave_(leave), active_(threads), pause_(kShortPause) {
    for (int t = 1; t < threads; t++) workers_.emplace_back(&Pool::work, this, t);
}

Pool::~Pool() {
    stop_ = true;
    active_ = threads_;
    start();
    for (std::thread& worker : workers_) worker.join();
}

// The signal includes the number of active threads, so that a thread that wakes late reads run and number together.
void Pool::start() { start_.set(((start_.value() >> kActiveBits) + 1) << kActiveBits | uint32_t(active_)); }

void Pool::work(int thread) {
    uint32_t seen = 0;
    bool takes_part = true;
    for (;;) {
        start_.wait_while(seen, takes_part ? kBetweenRuns : kLeftOut);
        seen = start_.value();
        takes_part = uint32_t(thread) < (seen & ((1u << kActiveBits) - 1));
        if (!takes_part) continue;
        if (stop_) return;
        call(thread);
    }
}

void Pool::call(int thread) {
    struct Leave {  // also when an exception ends the run
        void (*leave)();
        ~Leave() {
            if (leave) leave();
        }
    };
    {
        const Leave guard{leave_};
        function_(context_, thread);
    }
    barrier();
}

void Pool::run(Function function, void* context) {
    const Clock::time_point begin = Clock::now();
    if (active_ < threads_ && begin >= retry_) active_ = threads_;
    lost_.store(0, std::memory_order_relaxed);
    function_ = function;
    context_ = context;
    start();
    call(0);
    if (active_ > 1) judge(begin, Clock::now());
}

// While another process uses a core, the thread on that core makes all others wait at every barrier. A run is faster
// without one thread once waiting costs more than a thread contributes. After a pause all threads are tried again; the
// pause doubles while runs stay slow. Time slices last milliseconds, so a shorter run tells nothing.
void Pool::judge(Clock::time_point begin, Clock::time_point end) {
    if (end - begin < kTurn) return;
    const Clock::duration lost(lost_.load(std::memory_order_relaxed) / (active_ - 1));  // per waiting thread
    if (lost < kTurn || lost * (active_ + 1) < end - begin) {
        slow_runs_ = 0;
        pause_ = kShortPause;
        return;
    }
    if (++slow_runs_ < kSlowRuns && pause_ == kShortPause) return;
    active_--;
    slow_runs_ = 0;
    retry_ = end + pause_;
    pause_ = std::min<Clock::duration>(2 * pause_, kLongPause);
}

void Pool::barrier() {
    const int active = active_;  // when all have arrived, the next run may change it
    if (active == 1) return;
    const uint32_t seen = passed_.value();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == active) {
        arrived_.store(0, std::memory_order_relaxed);
        passed_.set(seen + 1);
    } else {
        const Clock::duration waited = passed_.wait_while(seen, kAtBarrier);
        if (waited > Clock::duration::zero()) lost_.fetch_add(waited.count(), std::memory_order_relaxed);
    }
}

void Pool::reset(int phases) {
    const size_t needed = size_t(phases) * threads_;
    if (cursors_.size() < needed) cursors_ = std::vector<Cursor>(needed);
    for (size_t i = 0; i < needed; i++) cursors_[i].taken.store(0, std::memory_order_relaxed);
}

}  // namespace motet
