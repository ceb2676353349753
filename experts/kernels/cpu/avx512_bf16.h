// The bf16 engine of CPUs with AVX512-BF16: weights become bf16 in registers, then dot products of input pairs.
// Packed rows: [block][row][128] bf16; inner rows: [block][row][parts][128]. Weights are 256 times too small until their
// scale is applied.
#pragma once

namespace shoal::avx512_bf16 {

// Of an inner row. A second part doubles the products of `down`, a third of a call's time from a few rows on, and brings
// an error of 1.6e-3 to nothing. Short rows, of small models, afford it, and need it: with few values the largest error
// may be more of the largest result than it is on average.
static inline int inner_parts(int columns) { return columns < 512 ? 2 : 1; }

static size_t packed_bytes(int rows, int columns) { return size_t(round_up(columns, kBlockColumns)) * rows * 2; }
static size_t inner_bytes(int rows, int columns) { return inner_parts(columns) * packed_bytes(rows, columns); }

static inline void pack_line(const Rows& from, int row, int start, int width, uint16_t* to, int padded) {
    const size_t at = size_t(from.rows ? from.rows[row] : row) * from.stride + start;
    if (from.dtype == kBfloat16) {
        std::memcpy(to, static_cast<const uint16_t*>(from.base) + at, width * 2);
    } else {
        const float* source = static_cast<const float*>(from.base) + at;
        int k = 0;
        for (; k + 16 <= width; k += 16)
            avx512::store(to + k, avx512::round_bf16(avx512::load<avx512::Vector>(source + k)));
        for (; k < width; ++k) to[k] = to_bf16(source[k]);
    }
    std::memset(to + width, 0, (padded - width) * 2);
}

static void pack(const Rows& from, void* packed) {
    uint16_t* to = static_cast<uint16_t*>(packed);
    for (int start = 0; start < from.columns; start += kBlockColumns)
        for (int row = 0; row < from.count; ++row, to += kBlockColumns) {
            const int left = from.columns - start;
            pack_line(from, row, start, left < kBlockColumns ? left : kBlockColumns, to, kBlockColumns);
        }
}

// Lines of a bf16 cell: [half][16 output rows][2] of an input pair. How far ahead of its use a line is fetched from
// memory is in lines, 0 for one that has been read before.
struct StoredLines {
    const uint8_t* cell;
    int ahead;
    e4m3::Line operator()(int pair) const {
        __builtin_prefetch(cell + (pair + ahead) * 128, 0, 3);
        __builtin_prefetch(cell + (pair + ahead) * 128 + 64, 0, 3);
        return e4m3::load(cell + pair * 128);
    }
};

// Lines of an FP8 cell, decoded on their way, again for every few rows: that costs nothing while the units that multiply
// are what all waits for, and a decoded copy would fill the first-level cache.
struct DecodedLines {
    const uint8_t* cell;
    int ahead;
    uint64_t uncovered;
    e4m3::Line operator()(int pair) const {
        __builtin_prefetch(cell + (pair + ahead) * 64, 0, 3);
        return uncovered >> pair & 1 ? e4m3::decode_any_small(cell + pair * 64) : e4m3::decode_small(cell + pair * 64);
    }
};

// Found by trying: one or two rows wait for the memory alone, and read at its rate from two cells on; more rows are
// fastest at half a cell.
static inline int lines_ahead(int rows) { return rows <= 2 ? 2 * kPairsPerBlock : kPairsPerBlock / 2; }

// pairs: of inputs, in this block.
template <int kRows, int kParts, class Lines>
static inline void multiply_rows(const Lines& lines, int pairs, const uint16_t* x, const float* scales, bool first,
                                 float* sums) {
    __m512 sum[kRows][2];
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) sum[row][0] = sum[row][1] = _mm512_setzero_ps();
    for (int pair = 0; pair < pairs; ++pair) {
        const e4m3::Line line = lines(pair);
        const __m512bh low = (__m512bh)line.low, high = (__m512bh)line.high;
#pragma GCC unroll 16
        for (int i = 0; i < kRows * kParts; ++i) {
            int32_t both;
            std::memcpy(&both, x + i * kBlockColumns + pair * 2, 4);
            const __m512bh value = (__m512bh)_mm512_set1_epi32(both);
            __m512* to = sum[i / kParts];
            to[0] = _mm512_dpbf16_ps(to[0], low, value);
            to[1] = _mm512_dpbf16_ps(to[1], high, value);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            float* to = sums + row * kPanelRows + half * kHalfRows;
            const __m512 scale = _mm512_set1_ps(scales[half]);
            _mm512_store_ps(to, first ? _mm512_mul_ps(scale, sum[row][half])
                                      : _mm512_fmadd_ps(scale, sum[row][half], _mm512_load_ps(to)));
        }
}

// As many rows at once as registers hold: rows that share a pass share its loads, and their sums do not wait for each
// other.
constexpr int kRowsAtOnce = 8;

template <int kParts, class Lines>
static inline void multiply_few(int rows, const Lines& lines, int pairs, const uint16_t* x, const float* scales,
                                bool first, float* sums) {
    switch (rows) {
        case 8: return multiply_rows<8, kParts>(lines, pairs, x, scales, first, sums);
        case 7: return multiply_rows<7, kParts>(lines, pairs, x, scales, first, sums);
        case 6: return multiply_rows<6, kParts>(lines, pairs, x, scales, first, sums);
        case 5: return multiply_rows<5, kParts>(lines, pairs, x, scales, first, sums);
        case 4: return multiply_rows<4, kParts>(lines, pairs, x, scales, first, sums);
        case 3: return multiply_rows<3, kParts>(lines, pairs, x, scales, first, sums);
        case 2: return multiply_rows<2, kParts>(lines, pairs, x, scales, first, sums);
        default: return multiply_rows<1, kParts>(lines, pairs, x, scales, first, sums);
    }
}

template <int kParts, class Finish>
static inline void multiply(const Panels& panels, const uint16_t* x, int rows, Scratch& scratch, Finish&& finish) {
    const Matrix& matrix = panels.matrix;
    const int blocks = matrix.blocks();
    const int passes = (rows + kRowsAtOnce - 1) / kRowsAtOnce, rows_of_pass = (rows + passes - 1) / passes;
    for (int panel = panels.begin; panel < panels.end; ++panel) {
        for (int block = 0; block < blocks; ++block) {
            const size_t index = size_t(panel) * blocks + block;
            const uint8_t* cell = matrix.cells + index * matrix.cell_bytes();
            // Small heads fill a quarter of a block.
            const int left = matrix.columns - block * kBlockColumns;
            const int pairs = left < kBlockColumns ? (left + 1) / 2 : kPairsPerBlock;
            float scales[2] = {1, 1};
            if (matrix.kind == kFp8)
                for (int half = 0; half < 2; ++half) scales[half] = matrix.scales[index * 2 + half] * e4m3::kSmallTimes;
            for (int row = 0; row < rows; row += rows_of_pass) {
                const int count = rows - row < rows_of_pass ? rows - row : rows_of_pass;
                const int ahead = row ? 0 : lines_ahead(rows);
                const uint16_t* activations = x + (size_t(block) * rows + row) * kParts * kBlockColumns;
                float* sums = scratch.sums + row * kPanelRows;
                if (matrix.kind == kFp8)
                    multiply_few<kParts>(count, DecodedLines{cell, ahead, matrix.uncovered[index]}, pairs, activations,
                                         scales, !block, sums);
                else
                    multiply_few<kParts>(count, StoredLines{cell, ahead}, pairs, activations, scales, !block, sums);
            }
        }
        for (int row = 0; row < rows; ++row) finish(panel, row, scratch.sums + row * kPanelRows);
    }
}

static void gate_up(const Panels& panels, const void* packed, int rows, void* inner, Scratch& scratch) {
    uint16_t* to = static_cast<uint16_t*>(inner);
    const int columns = panels.matrix.rows, padded = round_up(columns, kBlockColumns), parts = inner_parts(columns);
    multiply<1>(
        panels, static_cast<const uint16_t*>(packed), rows, scratch, [&](int panel, int row, const float* sums) {
            const int column = panel * kHalfRows, left = columns - column;
            const auto at = [&](int c, int part) {
                return to + ((size_t(c / kBlockColumns) * rows + row) * parts + part) * kBlockColumns +
                       c % kBlockColumns;
            };
            avx512::finish_swiglu(sums, sums + kHalfRows, left < kHalfRows ? left : kHalfRows, at(column, 0),
                                  parts == 2 ? at(column, 1) : nullptr);
            if (left <= kHalfRows)
                for (int c = column + kHalfRows; c < padded; ++c)
                    for (int part = 0; part < parts; ++part) *at(c, part) = 0;
        });
}

template <int kParts>
static void project(const Panels& panels, const void* packed, int rows, const Output& output, Scratch& scratch) {
    const int outputs = panels.matrix.rows;
    multiply<kParts>(panels, static_cast<const uint16_t*>(packed), rows, scratch,
                     [&](int panel, int row, const float* sums) {
                         avx512::finish_output(output, row, panel, outputs, sums, sums + kHalfRows);
                     });
}

static void project_inner(const Panels& panels, const void* inner, int rows, const Output& output, Scratch& scratch) {
    (inner_parts(panels.matrix.columns) == 2 ? project<2> : project<1>)(panels, inner, rows, output, scratch);
}

static const Engine kEngine{"bf16", packed_bytes, pack, gate_up, project<1>, inner_bytes, project_inner, nullptr};

}  // namespace shoal::avx512_bf16
