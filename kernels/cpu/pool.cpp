#include "pool.h"

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

constexpr int kSpins = 2000;          // some tens of microseconds
constexpr int kBarrierYields = 4000;  // a barrier is short unless somebody else has the core
constexpr int kIdleYields = 400;      // between two steps

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

#if defined(__linux__)
void sleep_while(std::atomic<uint32_t>& value, uint32_t seen) {
    syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}
void wake_all(std::atomic<uint32_t>& value) { syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0); }
#else
void sleep_while(std::atomic<uint32_t>&, uint32_t) { std::this_thread::sleep_for(std::chrono::microseconds(100)); }
void wake_all(std::atomic<uint32_t>&) {}
#endif

}  // namespace

void Signal::wait_while(uint32_t seen, int yields) {
    for (int i = 0; i < kSpins; i++) {
        if (value() != seen) return;
        relax();
    }
    for (int i = 0; i < yields; i++) {
        if (value() != seen) return;
        std::this_thread::yield();
    }
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    while (value_.load(std::memory_order_seq_cst) == seen) sleep_while(value_, seen);
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

void Signal::advance() {
    value_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst)) wake_all(value_);
}

Pool::Pool(int threads) : threads_(threads) {
    for (int t = 1; t < threads; t++) workers_.emplace_back(&Pool::work, this, t);
}

Pool::~Pool() {
    stop_ = true;
    start_.advance();
    for (std::thread& worker : workers_) worker.join();
}

void Pool::work(int thread) {
    uint32_t seen = 0;
    for (;;) {
        start_.wait_while(seen, kIdleYields);
        seen++;
        if (stop_) return;
        function_(context_, thread);
        barrier();
    }
}

void Pool::run(Function function, void* context) {
    function_ = function;
    context_ = context;
    start_.advance();
    function(context, 0);
    barrier();
}

void Pool::barrier() {
    if (threads_ == 1) return;
    const uint32_t seen = passed_.value();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
        arrived_.store(0, std::memory_order_relaxed);
        passed_.advance();
    } else {
        passed_.wait_while(seen, kBarrierYields);
    }
}

void Pool::reset(int phases) {
    const size_t needed = size_t(phases) * threads_;
    if (cursors_.size() < needed) cursors_ = std::vector<Cursor>(needed);
    for (size_t i = 0; i < needed; i++) cursors_[i].taken.store(0, std::memory_order_relaxed);
}

}  // namespace motet
