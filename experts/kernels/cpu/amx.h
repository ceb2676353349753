// The bf16 engine of CPUs with AMX: tiles for every number of rows.
//
// Rows are spread evenly over tiles of at most 16, so that one tile configuration serves all of an expert's rows.
// Packed rows: [block][tile][4 steps of 32 inputs][part][row of the tile][32] bf16, inner rows in 2 parts; rows that
// fill up the last tile are zero. They come from the second-level cache and are loaded past the first (tileloaddt1),
// which holds converted weights and sums: with 64 rows that is a quarter of the time.
// While the tiles multiply one cell, the vector units convert the next; a prefetch runs kAhead cells further on.
// The tile instructions are written out with a memory clobber: gcc 12's intrinsics do not declare what they read.
#pragma once

namespace shoal::amx {

constexpr int kAhead = 4;
constexpr int kSteps = kBlockColumns / 32;

struct TileRows {
    int tiles, rows, parts;  // rows: of each tile
    TileRows(int count, int parts) : tiles((count + 15) / 16), rows((count + tiles - 1) / tiles), parts(parts) {}
    int total() const { return tiles * rows; }
    size_t step_items() const { return size_t(parts) * rows * 32; }
    size_t tile_items() const { return step_items() * kSteps; }
    size_t block_items() const { return tile_items() * tiles; }
    // Where a row's sums lie in [tile][half][row of the tile][16]; the second half is rows * 16 further on.
    size_t sums_at(int row) const { return (size_t(row / rows) * 2 * rows + row % rows) * 16; }
    // Where an input of a row lies; its second part is rows * 32 further on.
    size_t at(int row, int column) const {
        return column / kBlockColumns * block_items() + row / rows * tile_items() +
               column % kBlockColumns / 32 * step_items() + row % rows * 32 + column % 32;
    }
};

template <int kParts>
static size_t packed_bytes(int rows, int columns) {
    return round_up(columns, kBlockColumns) / kBlockColumns * TileRows(rows, kParts).block_items() * 2;
}

static void pack(const Rows& from, void* packed) {
    uint16_t* to = static_cast<uint16_t*>(packed);
    const TileRows shape(from.count, 1);
    for (int column = 0; column < round_up(from.columns, kBlockColumns); column += 32) {
        const int left = from.columns - column, width = left < 0 ? 0 : left < 32 ? left : 32;
        for (int row = 0; row < shape.total(); ++row) {
            uint16_t* line = to + shape.at(row, column);
            if (row < from.count)
                avx512_bf16::pack_line(from, row, column, width, line, 32);
            else
                std::memset(line, 0, 64);
        }
    }
}

static inline void configure(int rows) {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.rows[i] = uint8_t(i < 6 ? rows : 16);  // 0-3 sums, 4-5 activations, 6-7 weights
    asm volatile("ldtilecfg %0" ::"m"(config));
}

static void release() { asm volatile("tilerelease"); }

#define SHOAL_TILE_LOAD(tile, base, stride) \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"(base), "r"(size_t(stride)) : "memory")
#define SHOAL_TILE_LOAD_ONCE(tile, base, stride) \
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm" #tile::"r"(base), "r"(size_t(stride)) : "memory")
#define SHOAL_TILE_STORE(tile, base) \
    asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(base), "r"(size_t(64)) : "memory")
#define SHOAL_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile::)
#define SHOAL_TILE_MULTIPLY(sum, x, weights) asm volatile("tdpbf16ps %%tmm" #weights ", %%tmm" #x ", %%tmm" #sum::)

// Converted cells: [input pair][half][16 output rows][2] bf16, as cells of bf16 weights; a tile is 16 pairs of a half.
// The two stores of a line go to neighbouring addresses: a kilobyte apart they take twice as long.
template <int kCount>
static inline void convert_lines(const uint8_t* from, uint8_t* to, int begin, const uint8_t* ahead) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
        const int pair = begin + i;
        __builtin_prefetch(ahead + pair * 64, 0, 2);
        e4m3::decode(from + pair * 64).store(to + pair * 128);
    }
}

static inline void convert_uncovered(const uint8_t* from, uint8_t* to, uint64_t left) {
    for (; left; left &= left - 1) {
        const int pair = __builtin_ctzll(left);
        e4m3::decode_any(from + pair * 64).store(to + pair * 128);
    }
}

// Sums of one block, in up to four tiles [half of tile 0, other half, halves of tile 1][row][16], that wait to be
// scaled and added to `sums`, laid out alike.
struct Pending {
    const float* tiles;
    float* sums;
    const float* scales;
    bool first;
};

// sums (+)= scale * tiles for one of the four.
template <int kRows>
static inline void add_tile(const Pending& pending, int tile, int rows) {
    const __m512 scale = _mm512_set1_ps(pending.scales[tile & 1]);
    const float* from = pending.tiles + tile * 256;
    float* to = pending.sums + tile * rows * 16;
    const int count = kRows ? kRows : rows;
    if (pending.first) {
#pragma GCC unroll 16
        for (int row = 0; row < count; ++row)
            _mm512_store_ps(to + row * 16, _mm512_mul_ps(scale, _mm512_load_ps(from + row * 16)));
    } else {
#pragma GCC unroll 16
        for (int row = 0; row < count; ++row)
            _mm512_store_ps(to + row * 16,
                            _mm512_fmadd_ps(scale, _mm512_load_ps(from + row * 16), _mm512_load_ps(to + row * 16)));
    }
}

// Sums of one or two tiles of rows over one cell, into scratch tiles; calls between(step) where the vector units have
// time.
template <int kTiles, class Between>
static inline void multiply_tiles(const uint8_t* weights, const uint16_t* x, const TileRows& shape, float* tiles,
                                  Between&& between) {
    SHOAL_TILE_ZERO(0);
    SHOAL_TILE_ZERO(1);
    if constexpr (kTiles == 2) {
        SHOAL_TILE_ZERO(2);
        SHOAL_TILE_ZERO(3);
    }
    for (int step = 0; step < kSteps; ++step) {
        const uint16_t* lines = x + step * shape.step_items();
        SHOAL_TILE_LOAD(6, weights + step * 2048, 128);
        SHOAL_TILE_LOAD(7, weights + step * 2048 + 64, 128);
        for (int part = 0; part < shape.parts; ++part, lines += shape.rows * 32) {
            SHOAL_TILE_LOAD_ONCE(4, lines, 64);
            SHOAL_TILE_MULTIPLY(0, 4, 6);
            SHOAL_TILE_MULTIPLY(1, 4, 7);
            if constexpr (kTiles == 2) {
                SHOAL_TILE_LOAD_ONCE(5, lines + shape.tile_items(), 64);
                SHOAL_TILE_MULTIPLY(2, 5, 6);
                SHOAL_TILE_MULTIPLY(3, 5, 7);
            }
        }
        between(step);
    }
    SHOAL_TILE_STORE(0, tiles);
    SHOAL_TILE_STORE(1, tiles + 256);
    if constexpr (kTiles == 2) {
        SHOAL_TILE_STORE(2, tiles + 512);
        SHOAL_TILE_STORE(3, tiles + 768);
    }
}

// Called with the sums of each panel when they are complete.
struct Finish {
    void (*call)(const void* context, int panel, const float* sums);
    const void* context;
};

// kRounds: pairs of row tiles. kRows: rows of a tile if known. A round adds the sums of the one before.
template <int kKind, int kRounds, int kRows>
static inline void multiply_rounds(const Panels& panels, const uint16_t* x, const TileRows& shape, Scratch& scratch,
                                   const Finish& finish) {
    constexpr size_t cell_bytes = size_t(kPanelRows) * kBlockColumns << kKind;
    constexpr int kShare = kPairsPerBlock / (kRounds * kSteps);
    static constexpr float kOnes[2] = {1, 1};
    const Matrix& matrix = panels.matrix;
    const int blocks = matrix.blocks(), rows = kRows ? kRows : shape.rows;
    const size_t begin = size_t(panels.begin) * blocks, end = size_t(panels.end) * blocks;
    configure(rows);
    const auto cell = [&](size_t index) { return matrix.cells + index * cell_bytes; };
    const auto ahead = [&](size_t index) {
        return index < end ? cell(index) : panels.after ? panels.after + (index - end) * cell_bytes : cell(end - 1);
    };
    if constexpr (kKind == kFp8) {
        convert_lines<kPairsPerBlock>(cell(begin), scratch.cells[begin & 1], 0, ahead(begin + kAhead));
        convert_uncovered(cell(begin), scratch.cells[begin & 1], matrix.uncovered[begin]);
    }
    int panel = panels.begin, block = 0, waiting = 0, room = 0;
    Pending pending{};
    for (size_t index = begin; index < end; ++index) {
        const uint8_t* next = cell(index + 1 < end ? index + 1 : index);
        uint8_t* to = scratch.cells[(index + 1) & 1];
        const uint8_t* far = ahead(index + 1 + kAhead);
        const uint8_t* weights = kKind == kFp8 ? scratch.cells[index & 1] : cell(index);
        const float* scales = kKind == kFp8 ? matrix.scales + index * 2 : kOnes;
        const uint16_t* activations = x + block * shape.block_items();
        for (int round = 0; round < kRounds; ++round) {
            const auto between = [&](int step) {
                // Tiles of 16 rows are added together at the end, smaller ones with a step each: the other way round
                // both are 4 % slower.
                if constexpr (kRows > 0) {
                    if (step == kSteps - 1)
                        for (int tile = 0; tile < waiting; ++tile) add_tile<kRows>(pending, tile, rows);
                } else {
                    if (step < waiting) add_tile<kRows>(pending, step, rows);
                }
                const int line = (round * kSteps + step) * kShare;
                if constexpr (kKind == kFp8)
                    convert_lines<kShare>(next, to, line, far);
                else
                    for (int i = line * 2; i < (line + kShare) * 2; ++i) __builtin_prefetch(far + i * 64, 0, 2);
            };
            const uint16_t* first_row = activations + round * 2 * shape.tile_items();
            float* tiles = scratch.tiles[room ^= 1];
            const bool pair = shape.tiles >= round * 2 + 2;
            if (pair)
                multiply_tiles<2>(weights, first_row, shape, tiles, between);
            else
                multiply_tiles<1>(weights, first_row, shape, tiles, between);
            pending = Pending{tiles, scratch.sums + round * 4 * rows * 16, scales, !block};
            waiting = pair ? 4 : 2;
        }
        if constexpr (kKind == kFp8)
            if (index + 1 < end) convert_uncovered(next, to, matrix.uncovered[index + 1]);
        if (++block == blocks) {
            for (int tile = 0; tile < waiting; ++tile) add_tile<kRows>(pending, tile, rows);
            waiting = block = 0;
            finish.call(finish.context, panel++, scratch.sums);
        }
    }
}

template <int kKind>
static void multiply_kind(const Panels& panels, const void* x, const TileRows& shape, Scratch& scratch,
                          const Finish& finish) {
    const uint16_t* rows = static_cast<const uint16_t*>(x);
    if (shape.tiles > 2) {
        if (shape.rows == 16)
            multiply_rounds<kKind, 2, 16>(panels, rows, shape, scratch, finish);
        else
            multiply_rounds<kKind, 2, 0>(panels, rows, shape, scratch, finish);
    } else {
        if (shape.rows == 16)
            multiply_rounds<kKind, 1, 16>(panels, rows, shape, scratch, finish);
        else
            multiply_rounds<kKind, 1, 0>(panels, rows, shape, scratch, finish);
    }
}

template <class F>
static inline void multiply(const Panels& panels, const void* x, const TileRows& shape, Scratch& scratch,
                            F&& on_panel) {
    const Finish finish{[](const void* f, int panel, const float* sums) {
                            (*static_cast<const std::remove_reference_t<F>*>(f))(panel, sums);
                        },
                        &on_panel};
    if (panels.matrix.kind == kFp8)
        multiply_kind<kFp8>(panels, x, shape, scratch, finish);
    else
        multiply_kind<kBf16>(panels, x, shape, scratch, finish);
}

static void gate_up(const Panels& panels, const void* packed, int count, void* inner, Scratch& scratch) {
    uint16_t* to = static_cast<uint16_t*>(inner);
    const int columns = panels.matrix.rows, padded = round_up(columns, kBlockColumns);
    const TileRows shape(count, 1), inner_shape(count, 2);
    const int second = shape.rows * 32;
    multiply(panels, packed, shape, scratch, [&](int panel, const float* sums) {
        const int column = panel * kHalfRows;
        const int valid = columns - column < kHalfRows ? columns - column : kHalfRows;
        for (int row = 0; row < shape.total(); ++row) {
            const float* gate = sums + shape.sums_at(row);
            uint16_t* line = to + inner_shape.at(row, column);
            avx512::finish_swiglu(gate, gate + shape.rows * 16, valid, line, line + second);
            if (column + kHalfRows >= columns)
                for (int c = column + kHalfRows; c < padded; ++c) {
                    line = to + inner_shape.at(row, c);
                    line[0] = line[second] = 0;
                }
        }
    });
}

template <int kParts>
static void project(const Panels& panels, const void* packed, int count, const Output& output, Scratch& scratch) {
    const int outputs = panels.matrix.rows;
    const TileRows shape(count, kParts);
    multiply(panels, packed, shape, scratch, [&](int panel, const float* sums) {
        for (int row = 0; row < count; ++row) {
            const float* low = sums + shape.sums_at(row);
            avx512::finish_output(output, row, panel, outputs, low, low + shape.rows * 16);
        }
    });
}

static const Engine kEngine{"bf16", packed_bytes<1>, pack, gate_up, project<1>, packed_bytes<2>, project<2>, release};

}  // namespace shoal::amx
