// Attention over a bf16 cache with bf16 dot products. Scores: 4 rows by 4 positions in registers, pairs of the width;
// mixing: 8 rows by 32 columns, pairs of positions, whose rows are interleaved on the way.
#pragma once

namespace shoal::avx512_bf16 {

static inline __m512i load_items(const uint8_t* from, __mmask32 mask) { return _mm512_maskz_loadu_epi16(mask, from); }

static inline __mmask32 mask_of(int left) { return left >= 32 ? ~__mmask32(0) : (__mmask32(1) << left) - 1; }

static inline __m512 halve(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// Lane sums of 16 vectors, each in the same order whatever its place.
static inline __m512 sum_each(const __m512 (&sum)[4][4]) {
    __m512 quad[4];
    for (int i = 0; i < 4; ++i) {
        const __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(sum[i][0], sum[i][1]), _mm512_unpackhi_ps(sum[i][0], sum[i][1]));
        const __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(sum[i][2], sum[i][3]), _mm512_unpackhi_ps(sum[i][2], sum[i][3]));
        const __m512d a = _mm512_castps_pd(low), b = _mm512_castps_pd(high);
        quad[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    return halve(halve(quad[0], quad[1]), halve(quad[2], quad[3]));
}

// sum[row][position] += products of 32 values from byte `at` on; mask: which of them exist.
template <bool kWhole>
static inline __attribute__((always_inline)) void score_items(const uint8_t* const* queries, const uint8_t* const* keys,
                                                              size_t at, __mmask32 mask, __m512 (&sum)[4][4]) {
    __m512bh key[4];
    for (int k = 0; k < 4; ++k)
        key[k] = (__m512bh)(kWhole ? _mm512_loadu_si512(keys[k] + at) : load_items(keys[k] + at, mask));
    for (int row = 0; row < 4; ++row) {
        const __m512bh query = (__m512bh)_mm512_loadu_si512(queries[row] + at);
        for (int k = 0; k < 4; ++k) sum[row][k] = _mm512_dpbf16_ps(sum[row][k], query, key[k]);
    }
}

// Scores of 4 rows at 4 positions -> [row][4].
static inline __m512 score_tile(const uint8_t* const* queries, const uint8_t* const* keys, int width) {
    __m512 sum[4][4];
    for (auto& row : sum)
        for (auto& value : row) value = _mm512_setzero_ps();
    int i = 0;
    for (; i + 32 <= width; i += 32) score_items<true>(queries, keys, size_t(i) * 2, 0, sum);
    if (i < width) score_items<false>(queries, keys, size_t(i) * 2, mask_of(width - i), sum);
    return sum_each(sum);
}

// mixed[row][column, column + 32) = sum over pairs of positions; weights [row][kContextChunk] bf16.
template <int kRows, bool kWhole>
static void mix(const uint8_t* const* positions, int pairs, int column, int rank, const uint16_t* weights,
                       int rows, float* mixed) {
    const __mmask32 mask = mask_of(rank - column);
    __m512 sum[kRows][2];
    for (auto& row : sum) row[0] = row[1] = _mm512_setzero_ps();
    for (int pair = 0; pair < pairs; ++pair) {
        const uint8_t *first = positions[pair * 2] + column * 2, *second = positions[pair * 2 + 1] + column * 2;
        const __m512i even = kWhole ? _mm512_loadu_si512(first) : load_items(first, mask);
        const __m512i odd = kWhole ? _mm512_loadu_si512(second) : load_items(second, mask);
        const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(even, odd);
        const __m512bh high = (__m512bh)_mm512_unpackhi_epi16(even, odd);
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
            int32_t both;
            std::memcpy(&both, weights + row * kContextChunk + pair * 2, 4);
            const __m512bh weight = (__m512bh)_mm512_set1_epi32(both);
            sum[row][0] = _mm512_dpbf16_ps(sum[row][0], low, weight);
            sum[row][1] = _mm512_dpbf16_ps(sum[row][1], high, weight);
        }
    }
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int row = 0; row < kRows && row < rows; ++row) {
        float* to = mixed + size_t(row) * rank + column;
        _mm512_mask_storeu_ps(to, __mmask16(mask), _mm512_permutex2var_ps(sum[row][0], first, sum[row][1]));
        _mm512_mask_storeu_ps(to + 16, __mmask16(mask >> 16),
                              _mm512_permutex2var_ps(sum[row][0], second, sum[row][1]));
    }
}

// Query rows that are scored together: with 4 cache rows of 576 values they fill three quarters of a first-level cache.
constexpr int kScoredRows = 16;

static void attend(const Attended& attended, const Mixture& to, ChunkScratch& scratch) {
    const int count = count_positions(attended), padded = round_up(attended.rows, 4);
    find_positions(attended, count, size_t(attended.width) * 2, scratch);
    // Rows beyond the last repeat it; their results are not used.
    const uint8_t* queries[kQueryRows];
    for (int row = 0; row < padded; ++row) {
        const int from = row < attended.rows ? row : attended.rows - 1;
        queries[row] = attended.queries + size_t(from) * attended.stride * 2;
    }
    for (int group = 0; group < padded; group += kScoredRows)
    for (int position = 0; position < count; position += 4) {
        const uint8_t* keys[4];
        for (int k = 0; k < 4; ++k) keys[k] = scratch.positions[position + k] + size_t(attended.key_at) * 2;
        for (int row = group; row < std::min(group + kScoredRows, padded); row += 4) {
            const __m512 scores = score_tile(queries + row, keys, attended.key_width);
            float* at = scratch.scores + row * kContextChunk + position;
            _mm_storeu_ps(at, _mm512_extractf32x4_ps(scores, 0));
            _mm_storeu_ps(at + kContextChunk, _mm512_extractf32x4_ps(scores, 1));
            _mm_storeu_ps(at + 2 * kContextChunk, _mm512_extractf32x4_ps(scores, 2));
            _mm_storeu_ps(at + 3 * kContextChunk, _mm512_extractf32x4_ps(scores, 3));
        }
    }
    const int start = attended.chunk * kContextChunk;
    for (int row = 0; row < padded; ++row) {
        uint16_t* weights = scratch.weights + row * kContextChunk;
        const int seen = row < attended.rows ? attended.last[row] + 1 - start : 0;
        if (seen > 0)
            avx512::weigh(scratch.scores + row * kContextChunk, seen < count ? seen : count, count, attended.scale,
                          to.maximum + row, to.total + row, weights);
        else
            std::memset(weights, 0, round_up(count, 16) * 2);
    }
    const int pairs = (count + 1) / 2;
    // Columns outside: the chunk's share of them stays in the first-level cache for all rows.
    for (int column = 0; column < attended.rank; column += 32)
        for (int row = 0; row < attended.rows; row += 8) {
            const int rows = attended.rows - row;
            const uint16_t* weights = scratch.weights + row * kContextChunk;
            float* mixed = to.mixed + size_t(row) * attended.rank;
            const bool whole = column + 32 <= attended.rank;
            const auto run = !whole ? mix<8, false> : rows > 4 ? mix<8, true> : mix<4, true>;
            run(scratch.positions, pairs, column, attended.rank, weights, rows, mixed);
        }
}

static const RowKernels kRows{avx512::rms_norm, avx512::add,  avx512::rotate, avx512::score_experts,
                              attend,           avx512::join, avx512::finish};

}  // namespace shoal::avx512_bf16
