// Read memory as fast as this machine lets one do it: the limit that the kernels' figures are held against.
// Each thread reads its own part, forward, with 64-byte loads and a few ways of prefetching; the best one counts.
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

typedef uint64_t Line __attribute__((vector_size(64), aligned(64)));

template <int kStreams, int kAheadLines>
static uint64_t read_part(const Line* from, size_t lines) {
    Line sum[kStreams] = {};
    const size_t part = lines / kStreams;
    for (size_t i = 0; i + 4 <= part; i += 4)
        for (int s = 0; s < kStreams; ++s) {
            const Line* at = from + s * part + i;
            for (int j = 0; j < 4; ++j) {
                if (kAheadLines) __builtin_prefetch(at + j + kAheadLines, 0, 3);
                sum[s] ^= at[j];
            }
        }
    uint64_t all = 0;
    for (auto& line : sum)
        for (int i = 0; i < 8; ++i) all ^= line[i];
    return all;
}

using Reader = uint64_t (*)(const Line*, size_t);
static const Reader kReaders[] = {read_part<1, 0>,  read_part<1, 64>, read_part<1, 128>,
                                  read_part<2, 64>, read_part<4, 0>,  read_part<4, 32>};

extern "C" int num_readers() { return sizeof kReaders / sizeof *kReaders; }

// Seconds to read all bytes once with reader number `reader`; memory is aligned to 64.
extern "C" double read_seconds(const void* memory, uint64_t bytes, int threads, int reader) {
    const Line* from = static_cast<const Line*>(memory);
    const size_t part = bytes / 64 / threads;
    static volatile uint64_t sink;
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back([=] { sink = kReaders[reader](from + t * part, part); });
    sink = kReaders[reader](from, part);
    for (auto& other : others) other.join();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
