// Decoding frames in plain C++, and encoding them; see planes.h.

#include "planes.h"

#include <algorithm>

namespace tk {

namespace {

struct PlanesScalar {
    struct Table {
        const uint8_t *highs;
        explicit Table(const uint8_t *table) : highs(table) {}
    };

    static uint64_t spread(uint64_t bits, uint64_t mask) {
        uint64_t found = 0;
        for (; mask; mask &= mask - 1, bits >>= 1) found |= (bits & 1) ? mask & -mask : 0;
        return found;
    }

    static unsigned bit(uint64_t bits, int i) { return static_cast<unsigned>(bits >> i & 1); }

    static void group(const Table &table, const uint8_t *low, const uint64_t *bits, int extra, uint16_t *out) {
        for (int i = 0; i < 64; ++i) {
            const unsigned code = bit(bits[0], i) + 2 * bit(bits[1], i) + bit(bits[2], i) + 2 * bit(bits[3], i) +
                                  4 * bit(bits[4], i);
            unsigned high = table.highs[code];
            for (int j = 0; j < extra; ++j) high |= bit(bits[5 + j], i) << j;
            out[i] = value_of(high, low[i]);
        }
    }
};

// Bit `bit` of each of 64 bytes, stored as a word.
void pack(const uint8_t *bytes, int bit, uint8_t *to) {
    for (int i = 0; i < 8; ++i) {
        // Each product moves bit 0 of byte k to bit 56 + k.
        to[i] = static_cast<uint8_t>((load_word(bytes + 8 * i) >> bit & 0x0101010101010101u) * 0x0102040810204080u >> 56);
    }
}

} // namespace

bool decode_planes_scalar(const Planes &planes, uint16_t *out) { return decode_planes_with<PlanesScalar>(planes, out); }

int64_t encode_planes(const uint16_t *values, int64_t count, int extra, uint8_t *frame, int64_t room) {
    const auto rotated = [&](int64_t i) { return static_cast<unsigned>(values[i] << 1 | values[i] >> 15) & 0xffff; };
    int64_t counts[256] = {}, odd[256] = {}; // in turns: neighbours are often equal, and one count has to wait
    for (int64_t i = 0; i < count; ++i) ++(i & 1 ? odd : counts)[rotated(i) >> (8 + extra)];
    for (int i = 0; i < 256; ++i) counts[i] += odd[i];
    int order[256];
    for (int i = 0; i < 256; ++i) order[i] = i;
    std::stable_sort(order, order + 256, [&](int a, int b) { return counts[a] > counts[b]; });
    uint8_t code[256];
    std::fill(code, code + 256, uint8_t(kSymbols));
    int64_t longer = count, escapes = count;
    for (int i = 0; i < kSymbols; ++i) {
        code[order[i]] = static_cast<uint8_t>(i);
        if (i < 3) longer -= counts[order[i]];
        escapes -= counts[order[i]];
    }
    const int64_t groups = (count + 63) / 64, words = 2 + extra, stream = 8 * (longer / 64 + 2);
    const int64_t nbytes = kHeaderNbytes + groups * (64 + 8 * words) + 3 * stream + escapes;
    if (nbytes > room) return 0;
    std::memset(frame, 0, static_cast<size_t>(nbytes));
    for (int i = 0; i < kSymbols; ++i) frame[i] = static_cast<uint8_t>(order[i] << extra);
    const uint32_t numbers[] = {1, static_cast<uint32_t>(longer), static_cast<uint32_t>(escapes)};
    std::memcpy(frame + 16, numbers, sizeof numbers);
    uint8_t *low = frame + kHeaderNbytes, *bits = low + 64 * groups, *more = bits + 8 * words * groups;
    uint8_t *escaped = more + 3 * stream;
    uint8_t waiting[128] = {}; // longer codes that do not fill a word yet
    int found = 0;
    // Without branches, which would be mispredicted for every fourth value: what is no longer code, or no escape, is
    // stored all the same, and then overwritten. The last one may go one byte beyond `nbytes`, below `room` + 1.
    for (int64_t first = 0; first < groups * 64; first += 64, bits += 8 * words) {
        uint8_t two[64] = {}, high[64] = {};
        const int here = static_cast<int>(std::min<int64_t>(64, count - first));
        for (int i = 0; i < here; ++i) {
            const unsigned value = rotated(first + i);
            low[first + i] = static_cast<uint8_t>(value);
            high[i] = static_cast<uint8_t>(value >> 8);
        }
        for (int i = 0; i < here; ++i) {
            const unsigned c = code[high[i] >> extra];
            two[i] = static_cast<uint8_t>(c < 3 ? c : 3);
            waiting[found] = static_cast<uint8_t>(c - 3);
            found += c > 2;
            *escaped = high[i];
            escaped += c == kSymbols;
        }
        for (int j = 0; j < 2; ++j) pack(two, j, bits + 8 * j);
        for (int j = 0; j < extra; ++j) pack(high, j, bits + 8 * (2 + j));
        if (found >= 64) {
            for (int j = 0; j < 3; ++j) pack(waiting, j, more + j * stream);
            more += 8;
            found -= 64;
            std::memmove(waiting, waiting + 64, 64);
        }
    }
    std::fill(waiting + found, waiting + 64, uint8_t(0));
    for (int j = 0; j < 3; ++j) pack(waiting, j, more + j * stream);
    return nbytes;
}

} // namespace tk
