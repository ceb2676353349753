// e4m3 weights to bf16 with AVX-512: a line of a cell at a time, which is 2 inputs of 32 output rows.
#pragma once

namespace shoal::e4m3 {

// [16 output rows][2 inputs] bf16 each.
struct Line {
    __m512i low, high;
    // Neighbouring addresses: a kilobyte apart the two stores take twice as long.
    void store(uint8_t* to) const {
        _mm512_store_si512(to, low);
        _mm512_store_si512(to + 64, high);
    }
};

static inline Line load(const uint8_t* from) { return {_mm512_load_si512(from), _mm512_load_si512(from + 64)}; }

static inline Line interleave(__m512i lower, __m512i upper) {
    return {_mm512_unpacklo_epi8(lower, upper), _mm512_unpackhi_epi8(lower, upper)};
}

// Two affine maps over bits: with s eeee mmm, the upper byte is s e3 ~e3 ~e3 ~e3 ~e3 e2 e1 (120 added to the exponent),
// the lower one e0 mmm 0000. Exact for all but zero, subnormals and NaN, which decode_any looks up. A matrix row is the
// mask of source bits for one result bit, the highest result bit in the lowest byte.
constexpr uint64_t affine(uint8_t b7, uint8_t b6, uint8_t b5, uint8_t b4, uint8_t b3, uint8_t b2, uint8_t b1,
                          uint8_t b0) {
    return uint64_t(b7) | uint64_t(b6) << 8 | uint64_t(b5) << 16 | uint64_t(b4) << 24 | uint64_t(b3) << 32 |
           uint64_t(b2) << 40 | uint64_t(b1) << 48 | uint64_t(b0) << 56;
}
constexpr uint64_t kUpper = affine(0x80, 0x40, 0x40, 0x40, 0x40, 0x40, 0x20, 0x10);
constexpr uint64_t kLower = affine(0x08, 0x04, 0x02, 0x01, 0, 0, 0, 0);
constexpr int kUpperFlipped = 0x3c;

static inline Line decode(const uint8_t* bytes) {
    const __m512i line = _mm512_load_si512(bytes);
    return interleave(_mm512_gf2p8affine_epi64_epi8(line, _mm512_set1_epi64(int64_t(kLower)), 0),
                      _mm512_gf2p8affine_epi64_epi8(line, _mm512_set1_epi64(int64_t(kUpper)), kUpperFlipped));
}

static inline Line look_up(const uint8_t* bytes, const Bf16Table& table) {
    const __m512i line = _mm512_load_si512(bytes), sign = _mm512_and_si512(line, _mm512_set1_epi8(-128));
    const auto permute = [&](const uint8_t* half) {
        return _mm512_permutex2var_epi8(_mm512_loadu_si512(half), line, _mm512_loadu_si512(half + 64));
    };
    return interleave(permute(table.low), _mm512_or_si512(permute(table.high), sign));
}

static inline Line decode_any(const uint8_t* bytes) { return look_up(bytes, kBf16Table); }

// The same 256 times too small, whose exponent is s 0111 eeee: no instruction of decode_small needs the units that
// multiply, of which a CPU that has no AMX has none to spare (4 rows: 22 GB/s of weights with decode, 27 with this).
constexpr float kSmallTimes = 256;
static const Bf16Table kSmallTable(1 / kSmallTimes);

static inline Line decode_small(const uint8_t* bytes) {
    const __m512i line = _mm512_load_si512(bytes);
    const __m512i kept = _mm512_set1_epi16(int16_t(0x87f0)), exponent = _mm512_set1_epi16(0x3800);
    const auto place = [&](__m512i twice) {  // (twice >> 4 & kept) | exponent
        return _mm512_ternarylogic_epi32(_mm512_srai_epi16(twice, 4), kept, exponent, 0xea);
    };
    return {place(_mm512_unpacklo_epi8(line, line)), place(_mm512_unpackhi_epi8(line, line))};
}

static inline Line decode_any_small(const uint8_t* bytes) { return look_up(bytes, kSmallTable); }

}  // namespace shoal::e4m3
