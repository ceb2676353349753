// Products of a few rows with large weight matrices that stay FP8 (or bf16, or fp32) in memory: the routed experts'
// feed-forward network, and plain linear layers. This file has the jobs and the C interface that cpu_ffn.py calls;
// cpu/ has the memory order of weights (matrix.h), the arithmetics (amx.h, avx512_bf16.h, product.inc) and the threads.
#include <algorithm>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/cpuid.h"
#include "cpu/engine.h"
#include "cpu/job.h"
#include "cpu/layer.h"
#include "cpu/matrix.h"
#include "cpu/pool.h"
#include "cpu/rows.h"
#include "cpu/row_sums.h"
#include "cpu/sample.h"
#include "cpu/scatter.h"
#include "cpu/serve.h"

// Each family's code is compiled for its own instructions, whatever the rest of the library is compiled for.
#define SHOAL_SPACE portable
#define SHOAL_LANES 4
#define SHOAL_FMA(a, b, c) ((a) * (b) + (c))
#define SHOAL_LOWER_BYTES_TIMES_16(line) ((SignedShorts)(line << 8) >> 4)
#include "cpu/vector.inc"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define SHOAL_SPACE avx2
#define SHOAL_LANES 8
#define SHOAL_FMA(a, b, c) ((Vector)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define SHOAL_LOWER_BYTES_TIMES_16(line) ((SignedShorts)_mm256_maddubs_epi16(_mm256_set1_epi16(16), (__m256i)(line)))
#include "cpu/vector.inc"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,gfni")
#define SHOAL_SPACE avx512
#define SHOAL_LANES 16
#define SHOAL_FMA(a, b, c) ((Vector)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define SHOAL_LOWER_BYTES_TIMES_16(line) ((SignedShorts)_mm512_maddubs_epi16(_mm512_set1_epi16(16), (__m512i)(line)))
#include "cpu/vector.inc"

#include "cpu/e4m3_avx512.h"

#include "cpu/attend_avx512_bf16.h"
#include "cpu/avx512_bf16.h"

#include "cpu/amx.h"
#pragma GCC pop_options
#endif

namespace shoal {
namespace {

enum Status : int32_t { kOk = 0, kNotHosted = 1, kBadPair = 2, kUnsupported = 3, kNoMemory = 4 };

// fp32 weights are multiplied in fp32 whatever was asked.
const Engine* find_engine(int family, int arithmetic, const Matrix& matrix) {
    if (!is_supported(family)) return nullptr;
    const bool bf16 = arithmetic == kBfloat16 && matrix.kind != kFp32;
    switch (family) {
#if defined(__x86_64__)
        case kAmx:
            return bf16 ? &amx::kEngine : &avx512::kFp32Engine;
        case kAvx512Bf16:
            return bf16 ? &avx512_bf16::kEngine : &avx512::kFp32Engine;
        case kAvx2:
            return bf16 ? &avx2::kRoundingEngine : &avx2::kFp32Engine;
#endif
        case kPortable:
            return bf16 ? &portable::kRoundingEngine : &portable::kFp32Engine;
        default:
            return nullptr;
    }
}

// The cache and hidden states are in the arithmetic's dtype.
const RowKernels* find_rows(int family, int dtype) {
    if (!is_supported(family)) return nullptr;
    const bool bf16 = dtype == kBfloat16;
    switch (family) {
#if defined(__x86_64__)
        case kAmx:  // vector dot products: attention is bound by memory long before tiles would pay
        case kAvx512Bf16:
            return bf16 ? &avx512_bf16::kRows : &avx512::kFp32Rows;
        case kAvx2:
            return bf16 ? &avx2::kBf16Rows : &avx2::kFp32Rows;
#endif
        case kPortable:
            return bf16 ? &portable::kBf16Rows : &portable::kFp32Rows;
        default:
            return nullptr;
    }
}

// The packed experts of one layer, as shoal_expert_ffn takes them; num_slots is 0 where none is hosted.
struct HostedLayer {
    const Matrix *gate_up, *down;
    const int32_t* slots;
    int32_t num_experts, num_slots;
};

struct HostedLayers {
    int32_t family, arithmetic, num_layers, reserved;
    const HostedLayer* layers;  // [num_layers]
};

// As torch rounds.
#if defined(__x86_64__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
void round_rows(const float* from, uint16_t* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, from + i, sizeof bits);
        const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
        to[i] = uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
    }
}

struct Ffn {
    const Matrix* gate_up;  // [slot]
    const Matrix* down;     // [slot]
    const void* hidden;
    Dtype dtype;
    bool exact;
    int num_rows;
    float* result;
    // Pairs in ascending expert order, then row: where to read, where to write, and the weight.
    std::vector<int32_t> rows, targets;
    std::vector<float> weights;

    // first: nothing was added to the result yet.
    void compute(Job& job, const std::vector<Segment>& segments, std::vector<Chunk>& chunks, bool first) const {
        const Engine& engine = job.engine();
        const int hidden_size = gate_up[segments[0].slot].columns, inner_size = gate_up[segments[0].slot].rows;
        size_t x_bytes = 0, inner_bytes = 0;
        for (Chunk& chunk : chunks) {
            chunk.at = x_bytes;
            chunk.inner_at = inner_bytes;
            x_bytes += engine.packed_bytes(chunk.rows, hidden_size);
            inner_bytes += engine.inner_bytes(chunk.rows, inner_size);
        }
        uint8_t* x = job.workspace().x.reserve(x_bytes);
        uint8_t* inner = job.workspace().inner.reserve(inner_bytes);
        job.run(chunks, [&](const Chunk& chunk, const Chunk*, int) {
            engine.pack(Rows{hidden, dtype, size_t(hidden_size), &rows[chunk.first_pair], chunk.rows, hidden_size},
                        x + chunk.at);
        });

        struct Task {
            const Segment* segment;
            int begin, end;
        };
        std::vector<Task> tasks;
        const int panels = gate_up[segments[0].slot].panels();
        int left = panels * int(segments.size());
        for (const Segment& segment : segments)
            for (int panel = 0, end; panel < panels; panel = end) {
                end = std::min(panel + round_up(panels_of_task(left, job.threads()), 2), panels);
                tasks.push_back({&segment, panel, end});
                left -= end - panel;
            }
        job.run(tasks, [&](const Task& task, const Task* next, int thread) {
            const Matrix& matrix = gate_up[task.segment->slot];
            const uint8_t* after =
                next ? gate_up[next->segment->slot].cells + next->begin * matrix.panel_bytes() : nullptr;
            for_chunks(matrix, task.begin, task.end, task.segment->end - task.segment->begin, after,
                       [&](const Panels& range, int i) {
                           const Chunk& chunk = chunks[task.segment->begin + i];
                           engine.gate_up(range, x + chunk.at, chunk.rows, inner + chunk.inner_at, job.scratch(thread));
                       });
        });

        // A task owns some panels of the result and adds every expert to them, so that a row's sum has one order. Sums
        // are kept panel by panel while experts are added: the rows of the result lie too far apart.
        tasks.clear();
        const int outputs = down[segments[0].slot].panels();
        for (int panel = 0, end; panel < outputs; panel = end) {
            end = std::min(panel + panels_of_task(outputs - panel, job.threads()), outputs);
            tasks.push_back({nullptr, panel, end});
        }
        const size_t panel_items = size_t(num_rows) * kPanelRows;
        if (!exact)
            for (int thread = 0; thread < job.threads(); ++thread)
                job.workspace().sums[thread]->reserve(tasks[0].end * panel_items * sizeof(float));
        job.run(tasks, [&](const Task& task, const Task* next, int thread) {
            float* sums = exact ? nullptr : reinterpret_cast<float*>(job.workspace().sums[thread]->data());
            if (!exact) std::memset(sums, 0, (task.end - task.begin) * panel_items * sizeof(float));
            if (!exact && !first)
                move_sums(task.begin, task.end, sums, [](float* a, float* b, size_t n) { std::memcpy(a, b, n); });
            for (const Segment& segment : segments) {
                const Matrix& matrix = down[segment.slot];
                const bool last = &segment == &segments.back();
                const uint8_t* after = !last  ? down[(&segment + 1)->slot].cells + task.begin * matrix.panel_bytes()
                                       : next ? down[segments[0].slot].cells + next->begin * matrix.panel_bytes()
                                              : nullptr;
                for_chunks(
                    matrix, task.begin, task.end, segment.end - segment.begin, after, [&](const Panels& range, int i) {
                        const Chunk& chunk = chunks[segment.begin + i];
                        Output output{result,
                                      kFloat32,
                                      size_t(hidden_size),
                                      kPanelRows,
                                      &targets[chunk.first_pair],
                                      &weights[chunk.first_pair],
                                      false};
                        if (!exact) {
                            output.base = sums - task.begin * panel_items;
                            output.row_stride = kPanelRows;
                            output.panel_stride = panel_items;
                            output.add = true;
                        }
                        engine.project_inner(range, inner + chunk.inner_at, chunk.rows, output, job.scratch(thread));
                    });
            }
            if (!exact)
                move_sums(task.begin, task.end, sums, [](float* a, float* b, size_t n) { std::memcpy(b, a, n); });
        });
    }

    // Call move(sums of a row's panel, the same in the result, bytes) for all rows and panels [begin, end).
    template <class F>
    void move_sums(int begin, int end, float* sums, F&& move) const {
        const int hidden_size = gate_up[0].columns;
        for (int panel = begin; panel < end; ++panel)
            for (int row = 0; row < num_rows; ++row, sums += kPanelRows) {
                const int column = panel * kPanelRows;
                move(sums, result + size_t(row) * hidden_size + column,
                     std::min(hidden_size - column, kPanelRows) * sizeof(float));
            }
    }
};

}  // namespace
}  // namespace shoal

using namespace shoal;

extern "C" {

int32_t shoal_is_supported(int32_t family) { return is_supported(family); }

void shoal_set_threads(int32_t count) {
    Pool& pool = Pool::instance();
    std::lock_guard<std::mutex> turn(pool.turn());
    pool.set_threads(std::max(1, count));
}

int32_t shoal_threads() { return Pool::instance().threads(); }

void shoal_pack(const Matrix* matrix, const PackSource* source) {
    Pool& pool = Pool::instance();
    std::lock_guard<std::mutex> turn(pool.turn());
    const int panels = matrix->panels(), step = 8, tasks = (panels + step - 1) / step;
    pool.run(tasks, false, [&](Tasks& numbers, int) {
        for (int task; (task = numbers.take()) < numbers.count();)
            pack_panels(*matrix, *source, task * step, std::min(task * step + step, panels));
    });
}

// result: float32 [num_pairs][hidden] if exact, else [num_rows][hidden]. Pairs are sorted by row. slots: expert id ->
// index of gate_up and down, negative where not hosted.
int32_t shoal_expert_ffn(int32_t family, int32_t arithmetic, const Matrix* gate_up, const Matrix* down,
                         const int32_t* slots, int32_t num_experts, int32_t num_slots, const void* hidden,
                         int32_t dtype, int32_t num_rows, const int32_t* pair_rows, const int32_t* pair_experts,
                         const float* pair_weights, int32_t num_pairs, int32_t exact, float* result) try {
    if (num_slots == 0) return num_pairs ? kNotHosted : kOk;
    const Engine* engine = find_engine(family, arithmetic, gate_up[0]);
    if (!engine) return kUnsupported;
    std::vector<int32_t> starts(num_experts + 1, 0);  // counting sort: ascending expert, rows as they come
    for (int i = 0; i < num_pairs; ++i) {
        const int expert = pair_experts[i];
        if (expert < 0 || expert >= num_experts || slots[expert] < 0) return kNotHosted;
        if (pair_rows[i] < 0 || pair_rows[i] >= num_rows) return kBadPair;
        ++starts[expert + 1];
    }
    for (int expert = 0; expert < num_experts; ++expert) starts[expert + 1] += starts[expert];
    Ffn ffn{gate_up, down, hidden, Dtype(dtype), exact != 0, num_rows, result, {}, {}, {}};
    ffn.rows.resize(num_pairs);
    ffn.targets.resize(num_pairs);
    ffn.weights.resize(num_pairs);
    std::vector<int32_t> place(starts.begin(), starts.end() - 1);
    for (int i = 0; i < num_pairs; ++i) {
        const int at = place[pair_experts[i]]++;
        ffn.rows[at] = pair_rows[i];
        ffn.targets[at] = exact ? i : pair_rows[i];
        ffn.weights[at] = pair_weights[i];
    }

    std::lock_guard<std::mutex> turn(Pool::instance().turn());
    Job job(*engine);
    if (!exact && !num_pairs) std::memset(result, 0, size_t(num_rows) * gate_up[0].columns * sizeof(float));
    bool first = true;
    std::vector<Segment> segments;
    std::vector<Chunk> chunks;
    int pairs_of_batch = 0;
    const auto compute_batch = [&] {
        if (segments.empty()) return;
        const double cells =
            double(gate_up[0].panels()) * gate_up[0].panel_bytes() + double(down[0].panels()) * down[0].panel_bytes();
        job.estimate(cells * segments.size(), 3.0 * gate_up[0].rows * gate_up[0].columns * pairs_of_batch);
        ffn.compute(job, segments, chunks, first);
        first = false;
        segments.clear();
        chunks.clear();
        pairs_of_batch = 0;
    };
    for (int expert = 0; expert < num_experts; ++expert) {
        const int end = starts[expert + 1];
        for (int pair = starts[expert]; pair < end;) {
            const int pairs = std::min(end - pair, kBatchPairs);
            if (pairs_of_batch + pairs > kBatchPairs) compute_batch();
            const int rows = chunk_rows(pairs), first_chunk = int(chunks.size());
            for (int i = 0; i < pairs; i += rows) chunks.push_back({pair + i, std::min(rows, pairs - i), 0, 0});
            segments.push_back({slots[expert], first_chunk, int(chunks.size())});
            pairs_of_batch += pairs;
            pair += pairs;
        }
    }
    compute_batch();
    return kOk;
} catch (const std::bad_alloc&) {
    return kNoMemory;
}

// result[num_rows][matrix.rows] = x[num_rows][matrix.columns] . matrix^T, with leading dimensions in elements.
int32_t shoal_linear(int32_t family, int32_t arithmetic, const Matrix* matrix, const void* x, int32_t dtype,
                     int64_t x_stride, int32_t num_rows, void* result, int32_t result_dtype,
                     int64_t result_stride) try {
    const Engine* engine = find_engine(family, arithmetic, *matrix);
    if (!engine) return kUnsupported;
    std::lock_guard<std::mutex> turn(Pool::instance().turn());
    Job job(*engine);
    multiply_rows(job, {{matrix, result, Dtype(result_dtype), size_t(result_stride)}}, x, Dtype(dtype),
                  size_t(x_stride), num_rows);
    return kOk;
} catch (const std::bad_alloc&) {
    return kNoMemory;
}

// result[num_rows][columns] = x / rms * weight, row by row.
int32_t shoal_rms_norm(int32_t family, const void* x, int32_t dtype, int32_t num_rows, int32_t columns,
                       const float* weight, float eps, void* result) {
    const RowKernels* kernels = find_rows(family, dtype);
    if (!kernels) return kUnsupported;
    const size_t row_bytes = size_t(columns) * item_bytes(Dtype(dtype));
    for (int row = 0; row < num_rows; ++row)
        kernels->rms_norm(static_cast<const uint8_t*>(x) + row * row_bytes, Dtype(dtype), weight, columns, eps,
                          static_cast<uint8_t*>(result) + row * row_bytes, Dtype(dtype));
    return kOk;
}

// result[num_rows][matrix.rows] = [norm(table[ids[row]]), norm(x[row])] . matrix^T, all in the arithmetic's dtype; of the
// norms' widths the matrix has twice.
int32_t shoal_join(int32_t family, int32_t arithmetic, const Matrix* matrix, const void* table, const int64_t* ids,
                   const void* x, int32_t num_rows, const float* first_weight, const float* second_weight, float eps,
                   void* result) try {
    const Engine* engine = find_engine(family, arithmetic, *matrix);
    const RowKernels* kernels = find_rows(family, arithmetic);
    if (!engine || !kernels) return kUnsupported;
    const Dtype dtype = Dtype(arithmetic);
    const int width = matrix->columns / 2;
    const size_t row_bytes = size_t(width) * item_bytes(dtype);
    std::lock_guard<std::mutex> turn(Pool::instance().turn());
    Job job(*engine);
    uint8_t* joined = job.workspace().layer.reserve(num_rows * 2 * row_bytes);
    for (int row = 0; row < num_rows; ++row) {
        uint8_t* to = joined + row * 2 * row_bytes;
        kernels->rms_norm(static_cast<const uint8_t*>(table) + ids[row] * row_bytes, dtype, first_weight, width, eps,
                          to, dtype);
        kernels->rms_norm(static_cast<const uint8_t*>(x) + row * row_bytes, dtype, second_weight, width, eps,
                          to + row_bytes, dtype);
    }
    multiply_rows(job, {{matrix, result, dtype, size_t(matrix->rows)}}, joined, dtype, size_t(matrix->columns),
                  num_rows);
    return kOk;
} catch (const std::bad_alloc&) {
    return kNoMemory;
}

// hidden[count] = round(hidden + (first + second)); second may be null.
int32_t shoal_add(int32_t family, void* hidden, int32_t dtype, const float* first, const float* second,
                  int64_t count) {
    const RowKernels* kernels = find_rows(family, dtype);
    if (!kernels) return kUnsupported;
    kernels->add(hidden, Dtype(dtype), first, second, size_t(count));
    return kOk;
}

// Everything of a decoder layer before its experts or MLP; see cpu/layer.h.
int32_t shoal_attend(const Layer* layer, const LayerStep* step) try {
    const Engine *engine = find_engine(layer->family, layer->arithmetic, *layer->o_proj),
                 *gate_engine = layer->gate ? find_engine(layer->family, layer->arithmetic, *layer->gate) : engine;
    const RowKernels* kernels = find_rows(layer->family, layer->arithmetic);
    if (!engine || !gate_engine || !kernels || layer->kv_lora_rank + layer->qk_rope_head_dim > kMaxWidth)
        return kUnsupported;
    std::lock_guard<std::mutex> turn(Pool::instance().turn());
    LayerJob(*layer, *step, *engine, *gate_engine, *kernels).run();
    return kOk;
} catch (const std::bad_alloc&) {
    return kNoMemory;
}

// A stream lent by http2_stream.py, until it is taken back.
Link* shoal_link_new() { return new (std::nothrow) Link; }

void shoal_link_free(Link* link) { delete link; }

void shoal_link_open(Link* link, int32_t fd, const LinkState* state) { link->open(fd, *state); }

// sizes: bytes read but not used, and bytes to be sent; where they lie.
void shoal_link_close(Link* link, LinkState* state, int64_t* sizes, const void** addresses) {
    *state = link->state;
    sizes[0] = link->unused_bytes();
    addresses[0] = link->unused();
    sizes[1] = int64_t(link->out().size());
    addresses[1] = link->out().data();
}

Server* shoal_server_new(const ServeOptions* options) try { return new Server(*options); } catch (const std::bad_alloc&) {
    return nullptr;
}

void shoal_server_free(Server* server) { delete server; }

void shoal_server_enable(Server* server, int32_t enabled) { server->enabled = enabled != 0; }

// Compute with another context from the next frame on. By the thread that serves, between two calls of shoal_serve.
void shoal_server_use(Server* server, void* context) { server->use(context); }

// Returns when something is to be done that only Python does.
void shoal_serve(Server* server, int32_t epoll_fd, Link* const* links, int32_t num_links) try {
    server->serve(epoll_fd, links, num_links);
} catch (const std::bad_alloc&) {
}

int32_t shoal_take_load(Server* server, LoadSlot* slots, int32_t most, int64_t* pairs) {
    return server->take_load(slots, most, pairs);
}

// A ComputeFrame with the packed experts of the layers.
int32_t shoal_compute_frame(const HostedLayers* hosted, const Frame* frame, void* reply) try {
    if (frame->layer_id >= hosted->num_layers) return kNotHosted;
    const HostedLayer& layer = hosted->layers[frame->layer_id];
    const int64_t items = int64_t(frame->exact ? frame->num_pairs : frame->num_rows) * frame->hidden_size;
    const bool is_fp32 = frame->reply_dtype == int32_t(kWireFloat32);
    static thread_local Buffer sums;
    float* result = is_fp32 && reinterpret_cast<uintptr_t>(reply) % 64 == 0
                        ? static_cast<float*>(reply)
                        : reinterpret_cast<float*>(sums.reserve(size_t(items) * sizeof(float)));
    const int32_t status = shoal_expert_ffn(
        hosted->family, hosted->arithmetic, layer.gate_up, layer.down, layer.slots, layer.num_experts, layer.num_slots,
        frame->hidden, frame->dtype == int32_t(kWireBfloat16) ? kBfloat16 : kFloat32, frame->num_rows,
        frame->pair_rows, frame->pair_experts, frame->pair_weights, frame->num_pairs, frame->exact, result);
    if (status != kOk) return status;
    if (!is_fp32) round_rows(result, static_cast<uint16_t*>(reply), items);
    else if (result != reply) std::memcpy(reply, result, size_t(items) * sizeof(float));
    return kOk;
} catch (const std::bad_alloc&) {
    return kNoMemory;
}

Scatter* shoal_scatter_new() { return new (std::nothrow) Scatter; }

void shoal_scatter_free(Scatter* scatter) { delete scatter; }

// The number of frames sent, negative if none is and Python is to send them.
int32_t shoal_scatter(Scatter* scatter, const ScatterRequest* request) try {
    return scatter->send(*request);
} catch (const std::bad_alloc&) {
    return -1;
}

int32_t shoal_gather(Scatter* scatter, int32_t timeout_us, float* total) try {
    return scatter->gather(timeout_us, total);
} catch (const std::bad_alloc&) {
    return kLeftToPython;
}

// Of a round that is done. pairs[group]: in its frame; reply_ns[group]: from sending to its answer.
void shoal_scatter_times(const Scatter* scatter, int32_t num_groups, int32_t* pairs, int64_t* reply_ns) {
    for (int group = 0; group < num_groups; ++group) {
        pairs[group] = scatter->num_pairs(group);
        reply_ns[group] = scatter->reply_ns(group);
    }
}

// By group; see GroupTraffic.
void shoal_scatter_take_traffic(Scatter* scatter, int32_t num_groups, GroupTraffic* traffic) {
    for (int group = 0; group < num_groups; ++group) traffic[group] = scatter->take_traffic(group);
}

// rows[group]: rows in its frame. answers[group]: where its answer lies, null if it is missing.
void shoal_scatter_look(const Scatter* scatter, int32_t num_groups, int32_t* rows, const void** answers) {
    for (int group = 0; group < num_groups; ++group) {
        rows[group] = scatter->num_rows(group);
        answers[group] = rows[group] && !scatter->is_missing(group) ? scatter->answer(group) : nullptr;
    }
}

}  // extern "C"
