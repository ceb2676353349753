// What an arithmetic must provide: pack rows of activations, and multiply them with panels of a matrix.
//
// A row's result is the sum, in ascending order, over blocks of 128 inputs, of (products added in fp32) * scale. No
// engine lets that order depend on the other rows, on the panels of the call or on the thread.
//
// Inner activations (what SwiGLU makes) are kept in two bf16 parts, the rounded value and what rounding left, by
// engines that multiply bf16 and can afford it. Rounded to one part, as models in bf16 do it, they alone make a result
// 1.6e-3 off (root mean square), whatever the sizes. With AMX the second part costs 2 % of the time at one row of each
// expert, 7 % at 16 and 16 % at 64, and is always kept; see inner_parts in avx512_bf16.h for what has no tiles.
#pragma once
#include "matrix.h"

namespace shoal {

// More rows of one expert are computed in several chunks of at most this many: what stays in the second-level cache.
constexpr int kChunkRows = 64;

enum Dtype : int32_t { kBfloat16 = 0, kFloat32 = 1 };

inline size_t item_bytes(Dtype dtype) { return dtype == kBfloat16 ? 2 : 4; }

// Rows to read: row i is rows[i] of base (i itself if rows is null); stride in elements.
struct Rows {
    const void* base;
    Dtype dtype;
    size_t stride;
    const int32_t* rows;
    int count;
    int columns;
};

// Where results go: row i to rows[i] (i if null), times weights[i] (1 if null), added to what is there or not. Strides
// in elements: a panel's 32 columns are contiguous, panels need not be.
struct Output {
    void* base;
    Dtype dtype;
    size_t row_stride, panel_stride;
    const int32_t* rows;
    const float* weights;
    bool add;
};

// Working memory of one thread.
struct alignas(64) Scratch {
    uint8_t cells[2][kPanelRows * kBlockColumns * 4];  // converted weights: this cell's and the next one's, or patches
    float tiles[2][4 * 16 * 16];                       // sums of one block, fresh and being added
    float sums[kChunkRows * kPanelRows];
};

// Panels [begin, end) of matrix. after: what this thread reads next, to be prefetched at the end; or null.
struct Panels {
    const Matrix& matrix;
    int begin, end;
    const uint8_t* after;
};

struct Engine {
    const char* name;
    // Bytes of `rows` packed rows; a multiple of 64.
    size_t (*packed_bytes)(int rows, int columns);
    void (*pack)(const Rows& from, void* packed);
    // SwiGLU of a paired matrix, into inner rows of matrix.rows columns, what lies beyond them zeroed.
    void (*gate_up)(const Panels& panels, const void* packed, int rows, void* inner, Scratch& scratch);
    // Packed rows, or inner rows, times a matrix.
    void (*project)(const Panels& panels, const void* packed, int rows, const Output& output, Scratch& scratch);
    size_t (*inner_bytes)(int rows, int columns);
    void (*project_inner)(const Panels& panels, const void* inner, int rows, const Output& output, Scratch& scratch);
    // What a thread does when it leaves the engine, or null.
    void (*leave)();
};

inline int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace shoal
