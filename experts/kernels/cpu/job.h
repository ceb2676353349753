// A job of the pool: its working memory, its tasks, and whether other threads are worth waking.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "engine.h"
#include "pool.h"

namespace shoal {

// Rows of experts that are computed together; bounds the working memory (about 75 MB at 7168 x 2048).
constexpr int kBatchPairs = 4096;
// Below this estimate a call stays on the caller's thread: waking another costs about as much.
constexpr double kAloneUs = 80;
// The same while the others are still awake.
constexpr double kAwakeUs = 20;

// Memory that grows and stays; its content does not survive growing.
class Buffer {
  public:
    ~Buffer() { std::free(data_); }
    uint8_t* reserve(size_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = 0;
            const size_t page = bytes >= (4u << 20) ? 2u << 20 : 64;
            const size_t rounded = (bytes + page - 1) / page * page;
            data_ = static_cast<uint8_t*>(std::aligned_alloc(page, rounded));
            if (!data_) throw std::bad_alloc();
#if defined(__linux__)
            if (page > 64) madvise(data_, rounded, MADV_HUGEPAGE);
#endif
            size_ = rounded;
        }
        return data_;
    }
    uint8_t* data() const { return data_; }

  private:
    uint8_t* data_ = nullptr;
    size_t size_ = 0;
};

// Owned by whoever holds the pool's turn.
struct Workspace {
    Buffer x, inner, layer, mixtures, expanded;
    std::vector<std::unique_ptr<Scratch>> scratches;  // of each thread
    std::vector<std::unique_ptr<Buffer>> sums;        // of each thread
    static Workspace& instance() {
        static Workspace* workspace = new Workspace;
        return *workspace;
    }
};

// Some rows of one expert. at, inner_at: offsets of its packed rows in the workspace.
struct Chunk {
    int first_pair, rows;
    size_t at, inner_at;
};

// An expert with its chunks [begin, end).
struct Segment {
    int slot, begin, end;
};

inline int chunk_rows(int rows) {
    const int chunks = (rows + kChunkRows - 1) / kChunkRows;
    return (rows + chunks - 1) / chunks;
}

// Panels of the next task when `left` are: large first, because each task reads its activations again, then ever
// smaller, so that threads of unequal speed finish together.
inline int panels_of_task(int left, int threads) { return std::max(left / (threads * 2), 4); }

// Call multiply(panels, chunk) for panels [begin, end) and every chunk; several chunks take turns on a few panels,
// which then are in the cache. next: see Panels::after.
template <class F>
void for_chunks(const Matrix& matrix, int begin, int end, int num_chunks, const uint8_t* next, F&& multiply) {
    const int step = num_chunks == 1 ? end - begin : 4;
    for (int panel = begin; panel < end; panel += step) {
        const int stop = std::min(panel + step, end);
        const uint8_t* after = stop < end ? matrix.cells + stop * matrix.panel_bytes() : next;
        for (int chunk = 0; chunk < num_chunks; ++chunk)
            multiply(Panels{matrix, panel, stop,
                            chunk + 1 < num_chunks ? matrix.cells + panel * matrix.panel_bytes() : after},
                     chunk);
    }
}

class Job {
  public:
    explicit Job(const Engine& engine) : engine_(engine) {
        while (int(workspace_.scratches.size()) < pool_.threads()) {
            workspace_.scratches.emplace_back(new Scratch);
            workspace_.sums.emplace_back(new Buffer);
        }
    }

    // weight_bytes read and multiply-adds done decide whether other threads are worth waking.
    void estimate(double weight_bytes, double products) { alone_ = weight_bytes / 12e3 + products / 3e5 < alone_us_; }
    // For jobs in quick succession, between which threads do not fall asleep.
    void set_awake() { alone_us_ = kAwakeUs; }
    int threads() const { return alone_ ? 1 : pool_.threads(); }
    Workspace& workspace() { return workspace_; }
    Scratch& scratch(int thread) { return *workspace_.scratches[thread]; }
    const Engine& engine() const { return engine_; }

    // body(task, next task or null, thread) for all tasks; a thread takes its next task before it starts one.
    template <class Task, class F>
    void run(const std::vector<Task>& tasks, F&& body) {
        pool_.run(int(tasks.size()), alone_, [&](Tasks& numbers, int thread) {
            int current = numbers.take();
            while (current < numbers.count()) {
                const int next = numbers.take();
                body(tasks[current], next < numbers.count() ? &tasks[next] : nullptr, thread);
                current = next;
            }
            if (engine_.leave) engine_.leave();
        });
    }

  private:
    const Engine& engine_;
    Pool& pool_ = Pool::instance();
    Workspace& workspace_ = Workspace::instance();
    bool alone_ = true;
    double alone_us_ = kAloneUs;
};

// A matrix of a product and where its result goes, in elements.
struct Product {
    const Matrix* matrix;
    void* result;
    Dtype dtype;
    size_t stride;
};

// result = x[num_rows][columns] . matrix^T for matrices with the same input. x_stride in elements.
inline void multiply_rows(Job& job, std::initializer_list<Product> products, const void* x, Dtype dtype,
                          size_t x_stride, int num_rows) {
    struct Range {
        const Product* product;
        int begin, end;
    };
    const Engine& engine = job.engine();
    const int columns = products.begin()->matrix->columns;
    int all_panels = 0;
    double weight_bytes = 0, outputs = 0;
    for (const Product& product : products) {
        all_panels += product.matrix->panels();
        weight_bytes += double(product.matrix->panels()) * product.matrix->panel_bytes();
        outputs += product.matrix->rows;
    }
    std::vector<Range> tasks;
    std::vector<Chunk> chunks;
    for (int first = 0; first < num_rows; first += kBatchPairs) {
        const int batch = std::min(num_rows - first, kBatchPairs), rows = chunk_rows(batch);
        job.estimate(weight_bytes, outputs * columns * batch);
        chunks.clear();
        tasks.clear();
        size_t bytes = 0;
        for (int i = 0; i < batch; i += rows) {
            chunks.push_back({first + i, std::min(rows, batch - i), bytes, 0});
            bytes += engine.packed_bytes(chunks.back().rows, columns);
        }
        uint8_t* packed = job.workspace().x.reserve(bytes);
        job.run(chunks, [&](const Chunk& chunk, const Chunk*, int) {
            const uint8_t* from = static_cast<const uint8_t*>(x) + chunk.first_pair * x_stride * item_bytes(dtype);
            engine.pack(Rows{from, dtype, x_stride, nullptr, chunk.rows, columns}, packed + chunk.at);
        });
        int left = all_panels;
        for (const Product& product : products)
            for (int panel = 0, end; panel < product.matrix->panels(); panel = end) {
                end = std::min(panel + panels_of_task(left, job.threads()), product.matrix->panels());
                tasks.push_back({&product, panel, end});
                left -= end - panel;
            }
        job.run(tasks, [&](const Range& task, const Range* next, int thread) {
            const Product& product = *task.product;
            const Matrix& matrix = *product.matrix;
            const uint8_t* after = next ? next->product->matrix->cells +
                                              next->begin * next->product->matrix->panel_bytes()
                                        : nullptr;
            for_chunks(matrix, task.begin, task.end, int(chunks.size()), after, [&](const Panels& range, int i) {
                const Chunk& chunk = chunks[i];
                uint8_t* to = static_cast<uint8_t*>(product.result) +
                              chunk.first_pair * product.stride * item_bytes(product.dtype);
                const Output output{to, product.dtype, product.stride, kPanelRows, nullptr, nullptr, false};
                engine.project(range, packed + chunk.at, chunk.rows, output, job.scratch(thread));
            });
        });
    }
}

}  // namespace shoal
