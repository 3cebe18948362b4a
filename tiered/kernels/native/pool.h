// Threads that share out the items of one job at a time, and memory that lives from job to job.
//
// This header is included by files compiled for different instruction sets: it must hold no inline function that the
// linker could merge across them, or a processor without AVX-512 might be handed the AVX-512 copy.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tk {

// Work on `item` in [0, items); `worker` in [0, threads) says whose scratch may be used.
using Job = void (*)(void *argument, int worker, int64_t item);

struct PoolState;

class Pool {
  public:
    // Starts threads - 1 threads; the caller of `run` is the other one.
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool &) = delete;
    Pool &operator=(const Pool &) = delete;

    int threads() const;

    // Does every item once. A free thread takes the next few in ascending order: fewer, when fewer are left.
    // Returns false, with the rest undone, once *cancel is not zero; it is looked at before every item.
    bool run(int64_t items, Job job, void *argument, const int32_t *cancel);

    // At least `nbytes` at a multiple of 4096, kept until `trim`; null where memory is short. `slot` 0 to threads - 1
    // are the workers' own, `shared` is one more. Contents are undefined; a call may move the slot.
    void *scratch(int slot, size_t nbytes);
    int shared() const;
    void trim();
    int64_t scratch_nbytes() const;

  private:
    PoolState *state_;
};

} // namespace tk
