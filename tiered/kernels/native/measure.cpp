// What kernels are compared with: memory read as fast as this machine can, and arithmetic that waits for no memory.

#include "measure.h"

#include "pool.h"

namespace tk {

namespace {

constexpr int64_t kReadNbytes = 1 << 20; // per item: long enough for the prefetchers, short enough to share out evenly

struct Read {
    ReadFunction function;
    const uint8_t *data;
    int64_t nbytes;
    uint64_t sum;
};

void read_item(void *argument, int, int64_t item) {
    Read &read = *static_cast<Read *>(argument);
    const int64_t start = item * kReadNbytes, left = read.nbytes - start;
    const uint64_t sum = read.function(read.data + start, left < kReadNbytes ? left : kReadNbytes);
    __atomic_fetch_add(&read.sum, sum, __ATOMIC_RELAXED);
}

struct Multiply {
    MultiplyFunction function;
    int64_t operations;
};

void multiply_item(void *argument, int, int64_t) {
    Multiply &multiply = *static_cast<Multiply *>(argument);
    __atomic_fetch_add(&multiply.operations, multiply.function(), __ATOMIC_RELAXED);
}

} // namespace

uint64_t read_scalar(const uint8_t *data, int64_t nbytes) {
    uint64_t sums[8] = {};
    for (int64_t start = 0; start < nbytes; start += sizeof sums) {
        for (int i = 0; i < 8; i++) {
            uint64_t word;
            __builtin_memcpy(&word, data + start + i * 8, sizeof word);
            sums[i] += word;
        }
    }
    uint64_t sum = 0;
    for (int i = 0; i < 8; i++) sum += sums[i];
    return sum;
}

uint64_t read_all(Pool &pool, ReadFunction function, const uint8_t *data, int64_t nbytes) {
    Read read = {function, data, nbytes, 0};
    pool.run((nbytes + kReadNbytes - 1) / kReadNbytes, read_item, &read, nullptr);
    return read.sum;
}

int64_t multiply_all(Pool &pool, MultiplyFunction function, int64_t items) {
    Multiply multiply = {function, 0};
    pool.run(items, multiply_item, &multiply, nullptr);
    return multiply.operations;
}

} // namespace tk
