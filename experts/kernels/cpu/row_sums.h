// Adds the answers of the expert groups of a layer, in the order of the groups: see router/row_sums.py.
//
// Each output row is summed while it lies in the first-level cache, so that every answer is read from memory once.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

template <bool is_bfloat16>
#if defined(__x86_64__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
void add_row(const void *source, float *total, int64_t columns) {
  if (is_bfloat16) {
    const char *values = static_cast<const char *>(source);
    for (int64_t column = 0; column < columns; ++column) {
      uint16_t half;
      std::memcpy(&half, values + 2 * column, sizeof half);
      const uint32_t bits = static_cast<uint32_t>(half) << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      total[column] += value;
    }
  } else {
    const char *values = static_cast<const char *>(source);
    for (int64_t column = 0; column < columns; ++column) {
      float value;
      std::memcpy(&value, values + 4 * column, sizeof value);
      total[column] += value;
    }
  }
}

}  // namespace

// answers[i]: num_rows[i] rows of columns values, which belong to the ascending rows row_ids[i] of total, or to its
// first num_rows[i] if that is null. Rows of answers may lie at any address.
extern "C" void shoal_add_rows(int32_t is_bfloat16, int32_t num_answers, const void *const *answers,
                               const int64_t *const *row_ids, const int64_t *num_rows, int64_t total_rows,
                               int64_t columns, float *total) {
  const int64_t row_bytes = columns * (is_bfloat16 ? 2 : 4);
  constexpr int32_t kMostAnswers = 64;
  int64_t positions[kMostAnswers] = {};
  for (int32_t first = 0; first < num_answers || first == 0; first += kMostAnswers) {
    const int32_t last = num_answers - first < kMostAnswers ? num_answers : first + kMostAnswers;
    std::memset(positions, 0, sizeof positions);
    for (int64_t row = 0; row < total_rows; ++row) {
      float *target = total + row * columns;
      if (first == 0) std::memset(target, 0, columns * sizeof(float));
      for (int32_t index = first; index < last; ++index) {
        int64_t &position = positions[index - first];
        if (position == num_rows[index] || (row_ids[index] && row_ids[index][position] != row)) continue;
        const char *source = static_cast<const char *>(answers[index]) + position * row_bytes;
        if (is_bfloat16) add_row<true>(source, target, columns);
        else add_row<false>(source, target, columns);
        ++position;
      }
    }
  }
}
