// A decoder layer up to its experts or MLP, in one call: norm, latent attention over the paged cache, residual, norm,
// gate. A row's result depends on that row and its context alone.
//
// Absorbed attention (DeepSeek-V2 report, section 2.1): W_UK moves into the query and W_UV behind the softmax, so keys
// and values are never expanded, and decode reads little. Of a long chunk of a prompt most of the time is products with
// the context, which are 3.4 times as many as those with expanded keys and values (kv_lora_rank 512 and 64 of rotation
// against heads of 192 and 128); so where a row's bits may depend on the chunk, w_k says how to expand.
//
// Phases are jobs of the pool; what passes between them lies in the workspace.
#pragma once
#include <chrono>

#include "job.h"
#include "rows.h"

namespace shoal {

// Mirrored by _Layer in cpu_layer.py. Norms' weights are float32. Null: q_b and q_a_norm without q_lora_rank (q_a then
// gives all heads' queries), gate in a dense layer, gate_bias where the method has none, w_k where attention is always
// absorbed.
struct Layer {
    int32_t family, arithmetic;
    int32_t hidden_size, num_heads, q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim;
    int32_t num_experts, top_k, n_group, topk_group;
    int32_t sigmoid;        // else softmax
    int32_t group_by_two;   // a gate group's score is the sum of its two best, else its best
    int32_t normalize;
    float routed_scaling_factor, eps, softmax_scale;
    const float *input_norm, *q_a_norm, *kv_a_norm, *post_norm, *rotations, *gate_bias;
    // w_uk, w_uv, w_k (w_uk's transpose): [num_heads].
    const Matrix *q_a, *kv_a, *q_b, *w_uk, *w_uv, *w_k, *o_proj, *gate;
    uint8_t* cache;                                                // [block][kCacheBlock][width]
};

// Mirrored by _LayerStep. hidden (updated) and normed (result): [num_tokens][hidden_size] in the arithmetic's dtype.
// segment_starts: [num_segments + 1]. times_ns, results: attention and gate.
struct LayerStep {
    int32_t num_tokens, num_segments, max_blocks;
    int32_t cache_only;  // write the latents, and stop
    const int64_t *positions, *slot_mapping;
    const int32_t *segment_starts, *block_tables;
    uint8_t *hidden, *normed;
    int64_t* topk_ids;
    float* topk_weights;
    mutable int64_t times_ns[2];
};

// Query rows (tokens x heads) that are in the workspace at once: 75 MB at 576 values.
constexpr int kQueriesAtOnce = 65536;

// Keys and values that are in the workspace at once, and the longest context that is expanded: its latents are packed as
// a whole.
constexpr size_t kExpandedBytes = 64u << 20;
constexpr int kExpandUpTo = 32768;

// What a phase over rows does at a time, and from how many rows on other threads are worth waking.
constexpr int kRowsOfTask = 8;
constexpr int kRowsAlone = 16;

// Cut pieces from one buffer, each on a cache line. First call with null to learn the size.
class Cutter {
  public:
    explicit Cutter(uint8_t* base) : base_(base) {}
    uint8_t* cut(size_t bytes) {
        uint8_t* piece = base_ ? base_ + used_ : nullptr;
        used_ += (bytes + 63) / 64 * 64;
        return piece;
    }
    size_t used() const { return used_; }

  private:
    uint8_t* base_;
    size_t used_ = 0;
};

class LayerJob {
  public:
    using Clock = std::chrono::steady_clock;

    LayerJob(const Layer& layer, const LayerStep& step, const Engine& engine, const Engine& gate_engine,
             const RowKernels& kernels)
        : layer_(layer), step_(step), kernels_(kernels), job_(engine), gate_job_(gate_engine),
          dtype_(Dtype(layer.arithmetic)), item_(item_bytes(dtype_)), heads_(layer.num_heads),
          rank_(layer.kv_lora_rank), width_(layer.kv_lora_rank + layer.qk_rope_head_dim),
          stride_(round_up(width_, 32)), head_dim_(layer.qk_nope_head_dim + layer.qk_rope_head_dim) {
        job_.set_awake();
        gate_job_.set_awake();
    }

    void run() {
        step_.times_ns[0] = step_.times_ns[1] = 0;
        const int at_once = std::min(std::max(kQueriesAtOnce / heads_, kChunkRows), kBatchPairs);
        for (int begin = 0; begin < step_.num_tokens; begin += at_once)
            run_tokens(begin, std::min(step_.num_tokens - begin, at_once));
    }

  private:
    struct Tile {
        uint8_t *latent, *q_a, *q, *queries, *latents, *values, *sums;
    };

    void run_tokens(int first, int count) {
        const auto started = Clock::now();
        const size_t hidden_bytes = layer_.hidden_size * item_;
        hidden_ = step_.hidden + first * hidden_bytes;
        normed_ = step_.normed + first * hidden_bytes;
        first_ = first;
        count_ = count;
        Cutter measure(nullptr);
        cut_tile(measure);
        Cutter cutter(job_.workspace().layer.reserve(measure.used()));
        tile_ = cut_tile(cutter);

        for_rows([&](int row) { norm(hidden_ + row * hidden_bytes, dtype_, layer_.input_norm, layer_.hidden_size,
                                     normed_ + row * hidden_bytes); });
        if (step_.cache_only) {
            multiply_rows(job_, {{layer_.kv_a, tile_.latent, kFloat32, size_t(width_)}}, normed_, dtype_,
                          layer_.hidden_size, count_);
            for_rows([&](int row) { write_cache(row); });
            note_time(0, started);
            return;
        }
        project_queries();
        for_rows([&](int row) { write_cache(row); });
        find_spans();
        for (const Span& span : spans_)
            if (span.expand) attend_expanded(span);
        attend_absorbed();
        multiply_rows(job_, {{layer_.o_proj, tile_.sums, kFloat32, size_t(layer_.hidden_size)}}, tile_.values, dtype_,
                      size_t(heads_) * layer_.v_head_dim, count_);
        for_rows([&](int row) {
            uint8_t* hidden = hidden_ + row * hidden_bytes;
            const float* sums = reinterpret_cast<const float*>(tile_.sums) + size_t(row) * layer_.hidden_size;
            kernels_.add(hidden, dtype_, sums, nullptr, layer_.hidden_size);
            norm(hidden, dtype_, layer_.post_norm, layer_.hidden_size, normed_ + row * hidden_bytes);
        });
        const auto attended = note_time(0, started);
        if (layer_.gate) choose_experts();
        note_time(1, attended);
    }

    // Add the time since then to a part's; returns now.
    Clock::time_point note_time(int part, Clock::time_point since) const {
        const Clock::time_point now = Clock::now();
        step_.times_ns[part] += std::chrono::nanoseconds(now - since).count();
        return now;
    }

    Tile cut_tile(Cutter& cutter) const {
        const size_t rows = count_, query_rows = rows * heads_;
        const size_t sums = std::max(layer_.hidden_size, layer_.num_experts * 2);
        return Tile{cutter.cut(rows * width_ * sizeof(float)),
                    cutter.cut(rows * layer_.q_lora_rank * (sizeof(float) + item_)),
                    cutter.cut(query_rows * head_dim_ * item_),
                    cutter.cut(query_rows * stride_ * item_),
                    cutter.cut(query_rows * rank_ * item_),
                    cutter.cut(query_rows * layer_.v_head_dim * item_),
                    cutter.cut(rows * sums * sizeof(float))};
    }

    void norm(const void* x, Dtype dtype, const float* weight, int n, void* to) const {
        kernels_.rms_norm(x, dtype, weight, n, layer_.eps, to, dtype_);
    }

    // Call work(row) for every row of the tile.
    template <class F>
    void for_rows(F&& work) {
        for_rows(0, count_, work);
    }
    // For rows [begin, end).
    template <class F>
    void for_rows(int begin, int end, F&& work) {
        if (end - begin <= kRowsAlone) {
            for (int row = begin; row < end; ++row) work(row);
            return;
        }
        std::vector<int> tasks;
        for (int row = begin; row < end; row += kRowsOfTask) tasks.push_back(row);
        job_.estimate(1e9, 0);
        job_.run(tasks, [&](int first, const int*, int) {
            for (int row = first; row < std::min(first + kRowsOfTask, end); ++row) work(row);
        });
    }

    void project_queries() {
        const size_t hidden = layer_.hidden_size;
        const Product latent{layer_.kv_a, tile_.latent, kFloat32, size_t(width_)};
        const size_t q_width = size_t(heads_) * head_dim_;
        if (!layer_.q_b) {
            multiply_rows(job_, {{layer_.q_a, tile_.q, dtype_, q_width}, latent}, normed_, dtype_, hidden, count_);
            return;
        }
        const size_t q_rank = layer_.q_lora_rank;
        float* q_a = reinterpret_cast<float*>(tile_.q_a);
        uint8_t* q_normed = tile_.q_a + count_ * q_rank * sizeof(float);
        multiply_rows(job_, {{layer_.q_a, q_a, kFloat32, q_rank}, latent}, normed_, dtype_, hidden, count_);
        for_rows([&](int row) {
            norm(q_a + row * q_rank, kFloat32, layer_.q_a_norm, layer_.q_lora_rank, q_normed + row * q_rank * item_);
        });
        multiply_rows(job_, {{layer_.q_b, tile_.q, dtype_, q_width}}, q_normed, dtype_, q_rank, count_);
    }

    const float* rotation(int row) const {
        return layer_.rotations + step_.positions[first_ + row] * layer_.qk_rope_head_dim;
    }

    void write_cache(int row) {
        const float* latent = reinterpret_cast<const float*>(tile_.latent) + size_t(row) * width_;
        uint8_t* to = layer_.cache + step_.slot_mapping[first_ + row] * size_t(width_) * item_;
        norm(latent, kFloat32, layer_.kv_a_norm, rank_, to);
        kernels_.rotate(latent + rank_, kFloat32, rotation(row), layer_.qk_rope_head_dim, to + rank_ * item_, dtype_);
    }

    // Rows [begin, end) of the tile that belong to one segment, and what they see.
    struct Span {
        int segment, begin, end, context;
        bool expand;
    };

    void find_spans() {
        spans_.clear();
        for (int segment = 0; segment < step_.num_segments; ++segment) {
            const int begin = std::max(step_.segment_starts[segment] - first_, 0);
            const int end = std::min(step_.segment_starts[segment + 1] - first_, count_);
            if (begin >= end) continue;
            const int context = int(step_.positions[first_ + end - 1]) + 1;
            spans_.push_back({segment, begin, end, context, expanding_pays(end - begin, context)});
        }
    }

    // Products: absorbed, each row with latents, besides its own through w_uk and w_uv; expanded, each row with keys and
    // values, besides the whole context through both.
    bool expanding_pays(int rows, int context) const {
        const int v = layer_.v_head_dim;
        // Queries have no zeros behind them in tile.q.
        if (!layer_.w_k || rows < kQueryRows || context > kExpandUpTo || head_dim_ % 32 || head_dim_ + v > kMaxWidth)
            return false;
        const double seen = rows * (context - rows / 2.0), through = double(rank_) * (layer_.qk_nope_head_dim + v);
        return seen * (width_ + rank_) + rows * through > seen * (head_dim_ + v) + context * through;
    }

    // The heads' keys and values of the span's context, then attention head by head: tile.q -> tile.values.
    void attend_expanded(const Span& span) {
        struct Task {
            int head, first, rows;
        };
        const int v = layer_.v_head_dim, rope = layer_.qk_rope_head_dim, nope = layer_.qk_nope_head_dim;
        const size_t row_items = size_t(v) + head_dim_, head_bytes = row_items * item_ * span.context;
        const Engine& engine = job_.engine();
        Workspace& workspace = job_.workspace();

        // Where the context lies: in the cache by slot, in the workspace in order.
        const int32_t* table = step_.block_tables + size_t(span.segment) * step_.max_blocks;
        std::vector<int32_t> slots(span.context), in_order(span.context / kCacheBlock + 1);
        for (int i = 0; i < span.context; ++i) slots[i] = table[i / kCacheBlock] * kCacheBlock + i % kCacheBlock;
        for (size_t i = 0; i < in_order.size(); ++i) in_order[i] = int32_t(i);

        std::vector<Chunk> chunks;
        size_t packed_bytes = 0;
        const int chunk = chunk_rows(span.context);
        for (int i = 0; i < span.context; i += chunk) {
            chunks.push_back({i, std::min(chunk, span.context - i), packed_bytes, 0});
            packed_bytes += engine.packed_bytes(chunks.back().rows, rank_);
        }
        job_.estimate(1e9, 0);
        uint8_t* packed = workspace.x.reserve(packed_bytes);
        job_.run(chunks, [&](const Chunk& task, const Chunk*, int) {
            engine.pack(Rows{layer_.cache, dtype_, size_t(width_), &slots[task.first_pair], task.rows, rank_},
                        packed + task.at);
        });
        const int num_rows = span.end - span.begin;
        for_rows(span.begin, span.end, [&](int row) {
            for (int head = 0; head < heads_; ++head) {
                uint8_t* at = tile_.q + ((size_t(row) * heads_ + head) * head_dim_ + nope) * item_;
                kernels_.rotate(at, dtype_, rotation(row), rope, at, dtype_);
            }
        });

        const int at_once = int(std::clamp<size_t>(kExpandedBytes / head_bytes, 1, heads_));
        for (int first_head = 0; first_head < heads_; first_head += at_once) {
            const int heads = std::min(at_once, heads_ - first_head);
            uint8_t* expanded = workspace.expanded.reserve(heads * head_bytes);
            std::vector<Task> tasks;
            for (int head = 0; head < heads; ++head)
                for (size_t i = 0; i < chunks.size(); ++i) tasks.push_back({head, int(i), chunks[i].rows});
            job_.run(tasks, [&](const Task& task, const Task*, int thread) {
                const Chunk& from = chunks[task.first];
                uint8_t* to = expanded + task.head * head_bytes + from.first_pair * row_items * item_;
                const auto project = [&](const Matrix& matrix, size_t at) {
                    const Output output{to + at * item_, dtype_, row_items, kPanelRows, nullptr, nullptr, false};
                    engine.project(Panels{matrix, 0, matrix.panels(), nullptr}, packed + from.at, task.rows, output,
                                   job_.scratch(thread));
                };
                project(layer_.w_uv[first_head + task.head], 0);
                project(layer_.w_k[first_head + task.head], v);
                for (int row = 0; row < task.rows; ++row)
                    std::memcpy(to + (row * row_items + v + nope) * item_,
                                layer_.cache + (size_t(slots[from.first_pair + row]) * width_ + rank_) * item_,
                                rope * item_);
            });

            reserve_scratches(sizeof(ChunkScratch) + 2 * state_bytes(v));
            tasks.clear();
            // Long ones first.
            for (int row = (num_rows - 1) / kQueryRows * kQueryRows; row >= 0; row -= kQueryRows)
                for (int head = 0; head < heads; ++head)
                    tasks.push_back({head, span.begin + row, std::min(kQueryRows, num_rows - row)});
            job_.run(tasks, [&](const Task& task, const Task*, int thread) {
                uint8_t* memory = workspace.sums[thread]->data();
                ChunkScratch& scratch = *reinterpret_cast<ChunkScratch*>(memory);
                const Mixture state = mixture(memory + sizeof(ChunkScratch));
                const Mixture next = mixture(memory + sizeof(ChunkScratch) + state_bytes(v));
                int last[kQueryRows];
                for (int row = 0; row < task.rows; ++row) last[row] = int(step_.positions[first_ + task.first + row]);
                const size_t at = size_t(task.first) * heads_ + first_head + task.head;
                Attended attended{expanded + task.head * head_bytes, in_order.data(), int(row_items), v, v, head_dim_, 0,
                                  tile_.q + at * head_dim_ * item_, heads_ * head_dim_, task.rows, last,
                                  layer_.softmax_scale};
                kernels_.attend(attended, state, scratch);
                for (attended.chunk = 1; attended.chunk <= last[task.rows - 1] / kContextChunk; ++attended.chunk) {
                    kernels_.attend(attended, next, scratch);
                    kernels_.join(attended, state, next);
                }
                for (int row = 0; row < task.rows; ++row)
                    kernels_.finish(state.mixed + size_t(row) * v, state.total[row], v,
                                    tile_.values + (at + size_t(row) * heads_) * v * item_, dtype_);
            });
        }
    }

    // The other spans: tile.q -> tile.values.
    void attend_absorbed() {
        // Neighbours go through the products together.
        for (size_t i = 0, end; i < spans_.size(); i = end) {
            for (end = i + 1; end < spans_.size() && spans_[end].expand == spans_[i].expand;) ++end;
            if (!spans_[i].expand) absorb(spans_[i].begin, spans_[end - 1].end);
        }
        attend();
        for (size_t i = 0, end; i < spans_.size(); i = end) {
            for (end = i + 1; end < spans_.size() && spans_[end].expand == spans_[i].expand;) ++end;
            if (spans_[i].expand) continue;
            per_head(layer_.w_uv, tile_.latents, rank_, tile_.values, layer_.v_head_dim, layer_.v_head_dim,
                     spans_[i].begin, spans_[end - 1].end);
        }
    }

    // tile.q -> tile.queries: [token][head][stride], zero beyond width.
    void absorb(int begin, int end) {
        for_rows(begin, end, [&](int row) {
            for (int head = 0; head < heads_; ++head) {
                const size_t at = size_t(row) * heads_ + head;
                uint8_t* to = tile_.queries + at * stride_ * item_;
                kernels_.rotate(tile_.q + (at * head_dim_ + layer_.qk_nope_head_dim) * item_, dtype_, rotation(row),
                                layer_.qk_rope_head_dim, to + rank_ * item_, dtype_);
                std::memset(to + width_ * item_, 0, (stride_ - width_) * item_);
            }
        });
        per_head(layer_.w_uk, tile_.q, head_dim_, tile_.queries, stride_, rank_, begin, end);
    }

    // to[token][head][outputs] = x[token][head] . matrices[head]^T for tokens [begin, end); strides: items of one head.
    void per_head(const Matrix* matrices, const uint8_t* x, int x_stride, uint8_t* to, int to_stride, int outputs,
                  int begin, int end) {
        struct Task {
            int head, row, rows;
        };
        const Engine& engine = job_.engine();
        const int count = end - begin, rows = chunk_rows(count), columns = matrices[0].columns;
        std::vector<Task> tasks;
        for (int head = 0; head < heads_; ++head)
            for (int row = begin; row < end; row += rows) tasks.push_back({head, row, std::min(rows, end - row)});
        job_.estimate(double(heads_) * matrices[0].panels() * matrices[0].panel_bytes(),
                      double(heads_) * outputs * columns * count);
        for (int thread = 0; thread < job_.threads(); ++thread)
            job_.workspace().sums[thread]->reserve(engine.packed_bytes(rows, columns));
        job_.run(tasks, [&](const Task& task, const Task* next, int thread) {
            const Matrix& matrix = matrices[task.head];
            uint8_t* packed = job_.workspace().sums[thread]->data();
            const size_t at = size_t(task.row) * heads_ + task.head;
            const size_t x_row = size_t(heads_) * x_stride, to_row = size_t(heads_) * to_stride;
            engine.pack(Rows{x + at * x_stride * item_, dtype_, x_row, nullptr, task.rows, columns}, packed);
            const Output output{to + at * to_stride * item_, dtype_, to_row, kPanelRows, nullptr, nullptr, false};
            engine.project(Panels{matrix, 0, matrix.panels(), next ? matrices[next->head].cells : nullptr}, packed,
                           task.rows, output, job_.scratch(thread));
        });
    }

    // Query rows [first, first + rows) of the tile, and the chunks that they see.
    struct Block {
        int segment, first, rows, chunks;
    };
    struct Part {
        const Block* block;
        int chunk;  // -1: all of them
        uint8_t* state;
    };

    // Of a mixture of rows of so many values.
    static size_t state_bytes(int rank) { return size_t(kQueryRows) * (rank + 2) * sizeof(float); }
    static Mixture mixture(uint8_t* state) {
        float* values = reinterpret_cast<float*>(state);
        return {values, values + kQueryRows, values + 2 * kQueryRows};
    }

    void reserve_scratches(size_t bytes) {
        for (int thread = 0; thread < job_.threads(); ++thread) {
            uint8_t* scratch = job_.workspace().sums[thread]->reserve(bytes);
            std::memset(reinterpret_cast<ChunkScratch*>(scratch)->zeros, 0, sizeof(ChunkScratch::zeros));
        }
    }

    void attend() {
        std::vector<Block> blocks;
        double positions = 0;
        int most_chunks = 1;
        for (const Span& span : spans_) {
            if (span.expand) continue;
            const int end = span.end * heads_;
            for (int row = span.begin * heads_; row < end; row += kQueryRows) {
                const int rows = std::min(kQueryRows, end - row), last = last_position(row + rows - 1);
                blocks.push_back({span.segment, row, rows, last / kContextChunk + 1});
                most_chunks = std::max(most_chunks, blocks.back().chunks);
                positions += double(last + 1) * rows;
            }
        }
        if (blocks.empty()) return;
        job_.estimate(0, positions * (width_ + rank_));
        const bool split = most_chunks > 1 && int(blocks.size()) < 2 * job_.threads();
        std::vector<Part> parts;
        Workspace& workspace = job_.workspace();
        if (split) {
            size_t count = 0;
            for (const Block& block : blocks) count += block.chunks;
            uint8_t* state = workspace.mixtures.reserve(count * state_bytes(rank_));
            for (const Block& block : blocks)
                for (int chunk = 0; chunk < block.chunks; ++chunk, state += state_bytes(rank_))
                    parts.push_back({&block, chunk, state});
        } else {
            for (const Block& block : blocks) parts.push_back({&block, -1, nullptr});
        }
        reserve_scratches(sizeof(ChunkScratch) + 2 * state_bytes(rank_));
        job_.run(parts, [&](const Part& part, const Part*, int thread) {
            uint8_t* memory = workspace.sums[thread]->data();
            ChunkScratch& scratch = *reinterpret_cast<ChunkScratch*>(memory);
            const auto at = [&](int i) { return memory + sizeof(ChunkScratch) + i * state_bytes(rank_); };
            if (part.chunk >= 0) {
                attend_chunk(*part.block, part.chunk, part.state, scratch);
                return;
            }
            attend_chunk(*part.block, 0, at(0), scratch);
            for (int chunk = 1; chunk < part.block->chunks; ++chunk) {
                attend_chunk(*part.block, chunk, at(1), scratch);
                join_chunk(*part.block, chunk, at(0), at(1));
            }
            finish(*part.block, at(0));
        });
        if (!split) return;
        for (size_t i = 0; i < parts.size(); ++i) {
            if (parts[i].chunk == 0) continue;
            join_chunk(*parts[i].block, parts[i].chunk, parts[i - parts[i].chunk].state, parts[i].state);
        }
        for (const Part& part : parts)
            if (part.chunk == 0) finish(*part.block, part.state);
    }

    int last_position(int query_row) const { return int(step_.positions[first_ + query_row / heads_]); }

    template <class F>
    void with_chunk(const Block& block, int chunk, F&& work) const {
        int last[kQueryRows];
        for (int row = 0; row < block.rows; ++row) last[row] = last_position(block.first + row);
        work(Attended{layer_.cache, step_.block_tables + size_t(block.segment) * step_.max_blocks, width_, rank_, 0, width_, chunk,
                      tile_.queries + size_t(block.first) * stride_ * item_, stride_, block.rows, last,
                      layer_.softmax_scale});
    }

    void attend_chunk(const Block& block, int chunk, uint8_t* state, ChunkScratch& scratch) const {
        with_chunk(block, chunk,
                   [&](const Attended& attended) { kernels_.attend(attended, mixture(state), scratch); });
    }

    void join_chunk(const Block& block, int chunk, uint8_t* state, uint8_t* next) const {
        with_chunk(block, chunk,
                   [&](const Attended& attended) { kernels_.join(attended, mixture(state), mixture(next)); });
    }

    void finish(const Block& block, uint8_t* state) const {
        const Mixture mixed = mixture(state);
        for (int row = 0; row < block.rows; ++row)
            kernels_.finish(mixed.mixed + size_t(row) * rank_, mixed.total[row], rank_,
                            tile_.latents + size_t(block.first + row) * rank_ * item_, dtype_);
    }

    void choose_experts() {
        float* logits = reinterpret_cast<float*>(tile_.sums);
        const size_t experts = layer_.num_experts;
        multiply_rows(gate_job_, {{layer_.gate, logits, kFloat32, experts}}, normed_, dtype_, layer_.hidden_size,
                      count_);
        float* choices = logits + count_ * experts;
        for_rows([&](int row) {
            choose(logits + row * experts, choices + row * experts,
                   step_.topk_ids + size_t(first_ + row) * layer_.top_k,
                   step_.topk_weights + size_t(first_ + row) * layer_.top_k);
        });
    }

    // Places of the k highest values, best first; of equal ones the lower place. NaN counts as infinite.
    template <class Place>
    static void find_highest(const float* values, int n, int k, Place* places) {
        const auto read = [&](int64_t i) { return values[i] == values[i] ? values[i] : __builtin_inff(); };
        for (int i = 0; i < n; ++i) {
            const float value = read(i);
            if (i >= k && !(value > read(places[k - 1]))) continue;
            int at = i < k ? i : k - 1;
            for (; at > 0 && value > read(places[at - 1]); --at) places[at] = places[at - 1];
            places[at] = i;
        }
    }

    // Scores are left in logits.
    void choose(float* logits, float* choices, int64_t* ids, float* weights) const {
        const int experts = layer_.num_experts, groups = layer_.n_group;
        kernels_.score_experts(logits, experts, layer_.sigmoid != 0, logits);
        for (int i = 0; i < experts; ++i) choices[i] = layer_.gate_bias ? logits[i] + layer_.gate_bias[i] : logits[i];
        if (groups > layer_.topk_group) {
            const int size = experts / groups;
            std::vector<float> scores(groups);
            std::vector<int> kept(layer_.topk_group);
            for (int group = 0; group < groups; ++group) {
                int best[2];
                const int used = layer_.group_by_two && size > 1 ? 2 : 1;
                find_highest(choices + group * size, size, used, best);
                scores[group] = choices[group * size + best[0]];
                if (used == 2) scores[group] += choices[group * size + best[1]];
            }
            find_highest(scores.data(), groups, layer_.topk_group, kept.data());
            for (int group = 0; group < groups; ++group)
                if (std::find(kept.begin(), kept.end(), group) == kept.end())
                    std::fill_n(choices + group * size, size, -__builtin_inff());
        }
        find_highest(choices, experts, layer_.top_k, ids);
        float sum = 0;
        for (int i = 0; i < layer_.top_k; ++i) sum += weights[i] = logits[ids[i]];
        for (int i = 0; i < layer_.top_k; ++i) {
            if (layer_.normalize) weights[i] /= sum + 1e-20f;
            weights[i] *= layer_.routed_scaling_factor;
        }
    }

    const Layer& layer_;
    const LayerStep& step_;
    const RowKernels& kernels_;
    Job job_, gate_job_;
    const Dtype dtype_;
    const size_t item_;
    const int heads_, rank_, width_, stride_, head_dim_;
    std::vector<Span> spans_;
    int first_ = 0, count_ = 0;
    uint8_t *hidden_ = nullptr, *normed_ = nullptr;
    Tile tile_{};
};

}  // namespace shoal
