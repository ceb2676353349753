// The bf16 engine of CPUs with AVX512-BF16: weights become bf16 in registers, then dot products of input pairs.
// Packed rows: [block][row][128] bf16; inner rows: [block][row][2 parts][128].
#pragma once

namespace shoal::avx512_bf16 {

static size_t packed_bytes(int rows, int columns) { return size_t(round_up(columns, kBlockColumns)) * rows * 2; }
static size_t inner_bytes(int rows, int columns) { return 2 * packed_bytes(rows, columns); }

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

// A cell as bf16 [input pair][half][16 output rows][2]; returns the cell itself if it is bf16.
static inline const uint8_t* decode(const Matrix& matrix, size_t index, uint8_t* to) {
    const uint8_t* cell = matrix.cells + index * matrix.cell_bytes();
    if (matrix.kind == kBf16) return cell;
    for (int pair = 0; pair < kPairsPerBlock; ++pair) e4m3::decode(cell + pair * 64).store(to + pair * 128);
    for (uint64_t left = matrix.uncovered[index]; left; left &= left - 1) {
        const int pair = __builtin_ctzll(left);
        e4m3::decode_any(cell + pair * 64).store(to + pair * 128);
    }
    return to;
}

// Lines of a cell that decode() has made or that are stored as bf16.
struct StoredLines {
    const uint8_t* cell;
    e4m3::Line operator()(int pair) const { return e4m3::load(cell + pair * 128); }
};

// Lines of an FP8 cell, decoded on their way: with few rows, each is needed once. What comes next is fetched line by
// line, half a cell ahead: fetched all at once it holds up the products.
struct DecodedLines {
    const uint8_t* cell;
    uint64_t uncovered;
    e4m3::Line operator()(int pair) const {
        __builtin_prefetch(cell + (pair + kPairsPerBlock / 2) * 64, 0, 3);
        return uncovered >> pair & 1 ? e4m3::decode_any(cell + pair * 64) : e4m3::decode(cell + pair * 64);
    }
};

template <int kRows, int kParts, class Lines>
static inline void multiply_rows(const Lines& lines, const uint16_t* x, const float* scales, bool first, float* sums) {
    __m512 sum[kRows][2];
    for (auto& row : sum) row[0] = row[1] = _mm512_setzero_ps();
    for (int pair = 0; pair < kPairsPerBlock; ++pair) {
        const e4m3::Line line = lines(pair);
        const __m512bh low = (__m512bh)line.low, high = (__m512bh)line.high;
        for (int i = 0; i < kRows * kParts; ++i) {
            int32_t both;
            std::memcpy(&both, x + i * kBlockColumns + pair * 2, 4);
            const __m512bh value = (__m512bh)_mm512_set1_epi32(both);
            __m512* to = sum[i / kParts];
            to[0] = _mm512_dpbf16_ps(to[0], low, value);
            to[1] = _mm512_dpbf16_ps(to[1], high, value);
        }
    }
    for (int row = 0; row < kRows; ++row)
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
static inline void multiply_few(int rows, const Lines& lines, const uint16_t* x, const float* scales, bool first,
                                float* sums) {
    switch (rows) {
        case 8: return multiply_rows<8, kParts>(lines, x, scales, first, sums);
        case 7: return multiply_rows<7, kParts>(lines, x, scales, first, sums);
        case 6: return multiply_rows<6, kParts>(lines, x, scales, first, sums);
        case 5: return multiply_rows<5, kParts>(lines, x, scales, first, sums);
        case 4: return multiply_rows<4, kParts>(lines, x, scales, first, sums);
        case 3: return multiply_rows<3, kParts>(lines, x, scales, first, sums);
        case 2: return multiply_rows<2, kParts>(lines, x, scales, first, sums);
        default: return multiply_rows<1, kParts>(lines, x, scales, first, sums);
    }
}

template <int kParts, class Finish>
static inline void multiply(const Panels& panels, const uint16_t* x, int rows, Scratch& scratch, Finish&& finish) {
    const float ones[2] = {1, 1};
    const Matrix& matrix = panels.matrix;
    const int blocks = matrix.blocks();
    for (int panel = panels.begin; panel < panels.end; ++panel) {
        for (int block = 0; block < blocks; ++block) {
            const size_t index = size_t(panel) * blocks + block;
            const float* scales = matrix.kind == kFp8 ? matrix.scales + index * 2 : ones;
            const uint16_t* activations = x + size_t(block) * rows * kParts * kBlockColumns;
            if (matrix.kind == kFp8 && rows <= kRowsAtOnce) {
                const DecodedLines lines{matrix.cells + index * matrix.cell_bytes(), matrix.uncovered[index]};
                multiply_few<kParts>(rows, lines, activations, scales, !block, scratch.sums);
                continue;
            }
            const bool last = panel + 1 == panels.end && block + 1 == blocks;
            const uint8_t* next = last ? panels.after : matrix.cells + (index + 1) * matrix.cell_bytes();
            if (next)
                for (size_t i = 0; i < matrix.cell_bytes(); i += 64) __builtin_prefetch(next + i, 0, 2);
            const StoredLines lines{decode(matrix, index, scratch.cells[0])};
            for (int row = 0; row < rows; row += kRowsAtOnce)
                multiply_few<kParts>(rows - row < kRowsAtOnce ? rows - row : kRowsAtOnce, lines,
                                     activations + row * kParts * kBlockColumns, scales, !block,
                                     scratch.sums + row * kPanelRows);
        }
        for (int row = 0; row < rows; ++row) finish(panel, row, scratch.sums + row * kPanelRows);
    }
}

static void gate_up(const Panels& panels, const void* packed, int rows, void* inner, Scratch& scratch) {
    uint16_t* to = static_cast<uint16_t*>(inner);
    const int columns = panels.matrix.rows, padded = round_up(columns, kBlockColumns);
    multiply<1>(
        panels, static_cast<const uint16_t*>(packed), rows, scratch, [&](int panel, int row, const float* sums) {
            const int column = panel * kHalfRows;
            const auto at = [&](int c) {
                return to + (size_t(c / kBlockColumns) * rows + row) * 2 * kBlockColumns + c % kBlockColumns;
            };
            avx512::finish_swiglu(sums, sums + kHalfRows, columns - column < kHalfRows ? columns - column : kHalfRows,
                                  at(column), at(column) + kBlockColumns);
            if (column + kHalfRows >= columns)
                for (int c = column + kHalfRows; c < padded; ++c) at(c)[0] = at(c)[kBlockColumns] = 0;
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

static const Engine kEngine{"bf16", packed_bytes, pack, gate_up, project<1>, inner_bytes, project<2>, nullptr};

}  // namespace shoal::avx512_bf16
