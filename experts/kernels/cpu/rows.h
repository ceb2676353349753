// What a decoder layer does to rows besides products: norms, rotations, softmax over the context. One table of
// functions for each instruction family (rows.inc, attend.inc, attend_avx512_bf16.h).
//
// Attention reads the context in chunks of kContextChunk positions, counted from 0. Each chunk gives a maximum, a sum
// and a weighted sum of its own; they are joined in ascending order. So a row's bits depend on the row and its context
// alone, whether its chunks are read by one thread or many, and whatever rows are read beside it.
#pragma once
#include "engine.h"

namespace shoal {

constexpr int kContextChunk = 512;
constexpr int kCacheBlock = 32;  // positions; router/block_pool.py BLOCK_SIZE
constexpr int kMaxWidth = 2048;  // of a cache row
// Query rows (of tokens and heads) that read a chunk together.
constexpr int kQueryRows = 32;

// Some query rows of one sequence over one chunk of its context. A cache row's values are its first `rank` items, its key
// the key_width from key_at on: they overlap where the cache holds latents. Queries: [row][stride] items, zero beyond
// key_width up to a multiple of 32, in the dtype of the cache. last[row]: the last position that a row sees; at least one
// row sees the chunk's first.
struct Attended {
    const uint8_t* cache;  // [block][kCacheBlock][width]
    const int32_t* blocks;
    int width, rank, key_at, key_width, chunk;
    const uint8_t* queries;
    int stride, rows;
    const int* last;
    float scale;
};

// State of the softmax of up to kQueryRows rows: [row], [row], [row][rank].
struct Mixture {
    float *maximum, *total, *mixed;
};

// Items between the scores of two rows: not a power of two, whose multiples share a few places of the caches.
constexpr int kScoreStride = kContextChunk + 16;

// Working memory of one thread for one chunk; scores are overwritten by their weights.
struct alignas(64) ChunkScratch {
    float scores[kQueryRows * kScoreStride];
    float queries[kQueryRows * kMaxWidth];
    uint16_t weights[kQueryRows * kContextChunk];
    uint8_t zeros[kMaxWidth * 2];  // a cache row beyond the last
    const uint8_t* positions[kContextChunk];
};

struct RowKernels {
    // to[n] = x[n] / rms * weight; to may be float32 or bf16, as x.
    void (*rms_norm)(const void* x, Dtype dtype, const float* weight, int n, float eps, void* to, Dtype to_dtype);
    // hidden[n] = round(hidden + (first + second)); second may be null.
    void (*add)(void* hidden, Dtype dtype, const float* first, const float* second, size_t n);
    // Interleaved pairs times (cos, sin).
    void (*rotate)(const void* x, Dtype dtype, const float* rotation, int n, void* to, Dtype to_dtype);
    // sigmoid, or softmax over the row.
    void (*score_experts)(const float* logits, int n, bool sigmoid, float* scores);
    void (*attend)(const Attended& attended, const Mixture& to, ChunkScratch& scratch);
    // state (+)= next, for rows that see the chunk that next came from.
    void (*join)(const Attended& attended, const Mixture& state, const Mixture& next);
    // to[rank] = mixed / total.
    void (*finish)(const float* mixed, float total, int rank, void* to, Dtype dtype);
};

inline int count_positions(const Attended& attended) {
    int last = attended.last[0];
    for (int row = 1; row < attended.rows; ++row) last = attended.last[row] > last ? attended.last[row] : last;
    const int left = last + 1 - attended.chunk * kContextChunk;
    return left < kContextChunk ? left : kContextChunk;
}

// Where the positions of a chunk lie; those beyond `count` up to a multiple of 4 are zero rows.
inline void find_positions(const Attended& attended, int count, size_t row_bytes, ChunkScratch& scratch) {
    const int32_t* blocks = attended.blocks + attended.chunk * (kContextChunk / kCacheBlock);
    for (int i = 0; i < count; ++i)
        scratch.positions[i] =
            attended.cache + (size_t(blocks[i / kCacheBlock]) * kCacheBlock + i % kCacheBlock) * row_bytes;
    for (int i = count; i % 4; ++i) scratch.positions[i] = scratch.zeros;
}

}  // namespace shoal
