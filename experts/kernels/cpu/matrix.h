// A weight matrix as the kernels read it: one memory order for every instruction family.
//
// Output rows are cut into panels of 32 (two halves of 16), inputs into blocks of 128. One (panel, block) cell is
// contiguous, cells follow each other along the inputs, then along the panels: a product reads one forward stream.
// Inside a cell, entry (input pair, half, output row, input of the pair) is what a tile of AMX and a lane of
// AVX512-BF16 want; FP8 swaps 8-byte groups so that one unpack instruction yields the two halves.
// A "paired" matrix is gate and up in one: half 0 of a panel holds 16 rows of gate, half 1 the same rows of up, so
// SwiGLU needs nothing from another panel.
//
// FP8 costs 16 bytes per 4096 more: a scale for each half, and one bit for each 64 bytes that hold a byte which the
// fast conversion does not cover (zero, a subnormal or NaN).
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace shoal {

constexpr int kPanelRows = 32;
constexpr int kHalfRows = 16;
constexpr int kBlockColumns = 128;
constexpr int kPairsPerBlock = kBlockColumns / 2;

enum Kind : int32_t { kFp8 = 0, kBf16 = 1, kFp32 = 2 };

// Mirrored by _Matrix in cpu_ffn.py. rows: outputs; of gate alone if paired. scales: float[panels][blocks][2] and
// uncovered: uint64[panels][blocks], FP8 only.
struct Matrix {
    int32_t kind;
    int32_t paired;
    int32_t rows;
    int32_t columns;
    uint8_t* cells;
    float* scales;
    uint64_t* uncovered;

    int rows_per_panel() const { return paired ? kHalfRows : kPanelRows; }
    int panels() const { return (rows + rows_per_panel() - 1) / rows_per_panel(); }
    int blocks() const { return (columns + kBlockColumns - 1) / kBlockColumns; }
    size_t cell_bytes() const { return size_t(kPanelRows) * kBlockColumns << kind; }
    size_t panel_bytes() const { return cell_bytes() * blocks(); }
};

inline uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float bits_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Round to nearest even; NaN stays NaN.
inline uint16_t to_bf16(float value) {
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// e4m3 byte, times a power of two -> bf16, exact for every byte.
struct Bf16Table {
    uint16_t of[256];
    uint8_t high[128], low[128];  // of magnitudes
    explicit Bf16Table(float times = 1) {
        for (int code = 0; code < 256; ++code) {
            const int exponent = code >> 3 & 15, mantissa = code & 7;
            float magnitude = times * float(exponent ? mantissa + 8 : mantissa) / 512;  // of exponent 1 or 0
            for (int i = 1; i < exponent; ++i) magnitude *= 2;
            uint16_t bits = uint16_t(float_bits(magnitude) >> 16);
            if ((code & 127) == 127) bits = 0x7fc0;
            of[code] = uint16_t(bits | (code & 128) << 8);
            high[code & 127] = uint8_t(bits >> 8);
            low[code & 127] = uint8_t(bits & 255);
        }
    }
};
inline const Bf16Table kBf16Table;

// Where pack reads from. source[1]: up of a paired matrix, else null. scales: float32 [ceil(rows / block_rows)]
// [ceil(columns / block_columns)], null if not FP8.
struct PackSource {
    const uint8_t* source[2];
    const float* scales[2];
    int32_t block_rows, block_columns;
};

// Pack panels [begin, end). What lies outside the matrix becomes finite weights that meet zero activations or
// outputs that nobody reads.
inline void pack_panels(const Matrix& matrix, const PackSource& from, int begin, int end) {
    constexpr uint8_t kOne = 0x38;  // e4m3 1.0: a byte the fast conversion covers
    const size_t item = size_t(1) << matrix.kind, row_bytes = item * matrix.columns;
    const int blocks = matrix.blocks();
    alignas(64) uint8_t edge[kPanelRows * kBlockColumns * 4];
    for (int panel = begin; panel < end; ++panel) {
        for (int block = 0; block < blocks; ++block) {
            const int column = block * kBlockColumns;
            const int width = matrix.columns - column < kBlockColumns ? matrix.columns - column : kBlockColumns;
            const uint8_t* rows[kPanelRows];
            for (int i = 0; i < kPanelRows; ++i) {
                const int half = i / kHalfRows;
                const int row = matrix.paired ? panel * kHalfRows + i % kHalfRows : panel * kPanelRows + i;
                const uint8_t* source = from.source[matrix.paired ? half : 0] + row * row_bytes + column * item;
                uint8_t* copy = edge + i * kBlockColumns * item;
                rows[i] = source;
                if (row >= matrix.rows || width < kBlockColumns) {
                    std::memset(copy, matrix.kind == kFp8 ? kOne : 0, kBlockColumns * item);
                    if (row < matrix.rows) std::memcpy(copy, source, width * item);
                    rows[i] = copy;
                }
            }
            const size_t cell_index = size_t(panel) * blocks + block;
            uint8_t* cell = matrix.cells + cell_index * matrix.cell_bytes();
            if (matrix.kind == kFp32) {
                for (int k = 0; k < kBlockColumns; ++k)
                    for (int i = 0; i < kPanelRows; ++i)
                        std::memcpy(cell + (k * kPanelRows + i) * 4, rows[i] + k * 4, 4);
            } else if (matrix.kind == kBf16) {
                for (int pair = 0; pair < kPairsPerBlock; ++pair)
                    for (int i = 0; i < kPanelRows; ++i)
                        std::memcpy(cell + (pair * kPanelRows + i) * 4, rows[i] + pair * 4, 4);
            } else {
                uint64_t uncovered = 0;
                for (int pair = 0; pair < kPairsPerBlock; ++pair) {
                    uint8_t* line = cell + pair * 64;
                    for (int group = 0; group < 8; ++group)  // four output rows each
                        for (int i = 0; i < 4; ++i)
                            std::memcpy(line + group * 8 + i * 2,
                                        rows[group % 2 * kHalfRows + group / 2 * 4 + i] + pair * 2, 2);
                    unsigned found = 0;
                    for (int i = 0; i < 64; ++i)
                        found |= unsigned((line[i] & 0x78) == 0) | unsigned((line[i] & 0x7f) == 0x7f);
                    uncovered |= uint64_t(found) << pair;
                }
                matrix.uncovered[cell_index] = uncovered;
                const int scale_columns = (matrix.columns + from.block_columns - 1) / from.block_columns;
                for (int half = 0; half < 2; ++half) {
                    const int row = matrix.paired ? panel * kHalfRows : panel * kPanelRows + half * kHalfRows;
                    const float* scales = from.scales[matrix.paired ? half : 0];
                    matrix.scales[cell_index * 2 + half] =
                        row < matrix.rows
                            ? scales[size_t(row / from.block_rows) * scale_columns + column / from.block_columns]
                            : 1.f;
                }
            }
        }
    }
}

}  // namespace shoal
