// Workers wait for a job by looking at a counter for a few microseconds (a token's layers call within that), then sleep
// in the kernel: they never spin while torch computes or while readers need the processor.

#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>

namespace tk {

namespace {

constexpr int kSpins = 2000; // some 40 us

void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
}

struct Buffer {
    void *data = nullptr;
    size_t nbytes = 0;

    void release() {
        if (data) munmap(data, nbytes);
        data = nullptr;
        nbytes = 0;
    }
};

size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

} // namespace

struct PoolState {
    std::vector<std::thread> threads;
    std::vector<Buffer> buffers;
    std::atomic<int64_t> scratch_nbytes{0};
    pid_t owner = getpid();

    // The job; written before `round` is raised, read after it was seen.
    Job job = nullptr;
    void *argument = nullptr;
    const int32_t *cancel = nullptr;
    int64_t items = 0;

    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<uint32_t> round{0};
    alignas(64) std::atomic<int> working{0};
    std::atomic<bool> stopping{false};
    std::mutex mutex;
    std::condition_variable begun, ended;
    int sleeping = 0; // under mutex

    void work(int worker) {
        for (;;) {
            if (cancel && __atomic_load_n(cancel, __ATOMIC_RELAXED)) return;
            const int64_t item = next.fetch_add(1, std::memory_order_relaxed);
            if (item >= items) return;
            job(argument, worker, item);
        }
    }

    bool wait_for_round(uint32_t seen) {
        for (int i = 0; i < kSpins; i++) {
            if (round.load(std::memory_order_acquire) != seen || stopping.load()) return !stopping.load();
            pause_briefly();
        }
        std::unique_lock<std::mutex> lock(mutex);
        sleeping++;
        begun.wait(lock, [&] { return round.load() != seen || stopping.load(); });
        sleeping--;
        return !stopping.load();
    }

    void serve(int worker) {
        uint32_t seen = 0;
        while (wait_for_round(seen)) {
            seen = round.load(std::memory_order_acquire);
            work(worker);
            if (working.fetch_sub(1, std::memory_order_acq_rel) == 1) {
                std::lock_guard<std::mutex> lock(mutex);
                ended.notify_all();
            }
        }
    }
};

Pool::Pool(int threads) : state_(new PoolState) {
    state_->buffers.resize(static_cast<size_t>(threads) + 1);
    for (int worker = 1; worker < threads; worker++) {
        state_->threads.emplace_back([this, worker] { state_->serve(worker); });
    }
}

Pool::~Pool() {
    if (state_->owner != getpid()) return; // a forked child has no such threads; what they held goes with it
    {
        std::lock_guard<std::mutex> lock(state_->mutex);
        state_->stopping.store(true);
        state_->begun.notify_all();
    }
    for (std::thread &thread : state_->threads) thread.join();
    trim();
    delete state_;
}

int Pool::threads() const { return static_cast<int>(state_->buffers.size()) - 1; }

bool Pool::run(int64_t items, Job job, void *argument, const int32_t *cancel) {
    PoolState &s = *state_;
    s.job = job;
    s.argument = argument;
    s.cancel = cancel;
    s.items = items;
    s.next.store(0, std::memory_order_relaxed);
    // After a fork the threads stayed with the parent.
    const bool shared = items > 1 && !s.threads.empty() && s.owner == getpid();
    if (shared) {
        s.working.store(static_cast<int>(s.threads.size()), std::memory_order_relaxed);
        s.round.fetch_add(1, std::memory_order_release);
        std::lock_guard<std::mutex> lock(s.mutex);
        if (s.sleeping) s.begun.notify_all();
    }
    s.work(0);
    if (shared) {
        for (int i = 0; i < kSpins && s.working.load(std::memory_order_acquire); i++) pause_briefly();
        if (s.working.load(std::memory_order_acquire)) {
            std::unique_lock<std::mutex> lock(s.mutex);
            s.ended.wait(lock, [&] { return s.working.load(std::memory_order_acquire) == 0; });
        }
    }
    return !(cancel && __atomic_load_n(cancel, __ATOMIC_RELAXED));
}

void *Pool::scratch(int slot, size_t nbytes) {
    Buffer &buffer = state_->buffers[static_cast<size_t>(slot)];
    if (buffer.nbytes >= nbytes) return buffer.data;
    state_->scratch_nbytes -= static_cast<int64_t>(buffer.nbytes);
    buffer.release();
    // Huge pages where it is worth it: panels are walked over again and again, and misses of the TLB cost.
    const size_t rounded = round_up(nbytes, nbytes >= (1u << 21) ? (1u << 21) : 4096);
    void *data = mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return nullptr;
#ifdef MADV_HUGEPAGE
    madvise(data, rounded, MADV_HUGEPAGE);
#endif
    buffer.data = data;
    buffer.nbytes = rounded;
    state_->scratch_nbytes += static_cast<int64_t>(rounded);
    return data;
}

int Pool::shared() const { return threads(); }

void Pool::trim() {
    for (Buffer &buffer : state_->buffers) buffer.release();
    state_->scratch_nbytes = 0;
}

int64_t Pool::scratch_nbytes() const { return state_->scratch_nbytes.load(); }

} // namespace tk
