// Workers wait for a job by looking at a counter, then sleep in the kernel. To wake a thread takes up to a fifth of
// the time of a product of 5120 x 5120 weights with one token, so they look for as long as a token takes from one
// product to the next, and no longer: torch may be computing. Meanwhile they yield the processor to whoever waits for
// it, readers above all. With more threads than processors they sleep at once, as they would be in each other's way.

#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <sched.h>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>

namespace tk {

namespace {

constexpr std::chrono::microseconds kPatience(200);
constexpr int kPauses = 64; // between two looks at the clock: about a microsecond
constexpr int64_t kShare = 4; // a thread claims 1 / kShare of an equal share of the items left

void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
}

// Whether `done` became true within `patience`.
template <class Done> bool looked_for(Done done, std::chrono::microseconds patience) {
    const auto end = std::chrono::steady_clock::now() + patience;
    do {
        for (int i = 0; i < kPauses; i++) {
            if (done()) return true;
            pause_briefly();
        }
        sched_yield();
    } while (std::chrono::steady_clock::now() < end);
    return done();
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
    std::chrono::microseconds patience = kPatience;
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

    // Claims neighbouring items, so that what an item fetches ahead is what the same thread needs next; fewer and fewer
    // of them, so that all threads end together. Returns how many; `first` is set to the first one.
    int64_t claim(int64_t &first) {
        first = next.load(std::memory_order_relaxed);
        for (;;) {
            if (first >= items) return 0;
            const int64_t share = (items - first) / (kShare * static_cast<int64_t>(threads.size() + 1));
            const int64_t count = share > 1 ? share : 1;
            if (next.compare_exchange_weak(first, first + count, std::memory_order_relaxed)) return count;
        }
    }

    void work(int worker) {
        int64_t first;
        while (const int64_t count = claim(first)) {
            for (int64_t item = first; item < first + count; item++) {
                if (cancel && __atomic_load_n(cancel, __ATOMIC_RELAXED)) return;
                job(argument, worker, item);
            }
        }
    }

    bool wait_for_round(uint32_t seen) {
        const auto told = [&] { return round.load() != seen || stopping.load(); };
        if (looked_for(told, patience)) return !stopping.load();
        std::unique_lock<std::mutex> lock(mutex);
        sleeping++;
        begun.wait(lock, told);
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
    if (static_cast<unsigned>(threads) > std::thread::hardware_concurrency()) state_->patience = {};
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
        const auto idle = [&s] { return s.working.load(std::memory_order_acquire) == 0; };
        if (!looked_for(idle, s.patience)) {
            std::unique_lock<std::mutex> lock(s.mutex);
            s.ended.wait(lock, idle);
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
