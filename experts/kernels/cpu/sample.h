// Draws one token per row of logits: the best of tempered logit + Gumbel noise among the tokens that the filters keep.
// router/sampler.py says what it means and does the same with torch where this library is not to be had.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace shoal {

struct SampleRow {
    float temperature, top_p, min_p;
    int32_t top_k;
    uint64_t seed, position;
};

// splitmix64, as in router/sampler.py.
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;

inline uint64_t mix(uint64_t value) {
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB;
    return value ^ (value >> 31);
}

// What the noise of a row is drawn with.
inline uint64_t make_key(uint64_t seed, uint64_t position) { return mix((seed ^ mix(position + kGolden)) + kGolden); }

inline uint64_t draw_bits(uint64_t key, int32_t token_id) { return mix(key + (uint64_t(token_id) + 1) * kGolden); }

inline float gumbel_noise(uint64_t key, int32_t token_id) {
    const double uniform = (double(draw_bits(key, token_id) >> 11) + 0.5) * 0x1p-53;
    return float(-std::log(-std::log(uniform)));
}

// Sixteen values side by side, whatever the instruction set makes of them: so its order of adding up is always the same.
// Vectors by hand: comparisons and sums of floats are none that a compiler may rearrange.
constexpr int32_t kLanes = 16;
typedef float Lanes __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntLanes __attribute__((vector_size(kLanes * 4)));

#define SHOAL_INLINE __attribute__((always_inline)) inline

SHOAL_INLINE void load_lanes(const float* from, Lanes& lanes) { std::memcpy(&lanes, from, sizeof lanes); }

// values = e^values for values <= 0, to about 2 units in the last place.
SHOAL_INLINE void exp_below_one(Lanes& values) {
    const Lanes x = values < -87.0f ? Lanes{} - 87.0f : values;
    const Lanes to_round = x * 1.44269504f + 0.5f;
    Lanes n = __builtin_convertvector(__builtin_convertvector(to_round, IntLanes), Lanes);
    n = n > to_round ? n - 1.0f : n;
    const Lanes r = x - n * 0.693359375f - n * -2.12194440e-4f;
    Lanes p = 1.9875691500e-4f + Lanes{};
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    values = p * (Lanes)((__builtin_convertvector(n, IntLanes) + 127) << 23);
}

SHOAL_INLINE float exp_below_one(float value) {
    Lanes lanes = value + Lanes{};
    exp_below_one(lanes);
    return lanes[0];
}

#if defined(__x86_64__)
#define SHOAL_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SHOAL_CLONES
#endif

SHOAL_CLONES inline float find_best(const float* logits, int32_t size) {
    float best = logits[0];
    int32_t i = 0;
    if (size >= kLanes) {
        Lanes most, values;
        load_lanes(logits, most);
        for (; i + kLanes <= size; i += kLanes) {
            load_lanes(logits + i, values);
            most = values > most ? values : most;
        }
        for (int32_t lane = 0; lane < kLanes; ++lane) best = most[lane] > best ? most[lane] : best;
    }
    for (; i < size; ++i) best = logits[i] > best ? logits[i] : best;
    return best;
}

// And the largest of every kBlock of them, so that who looks for large ones may pass over the others.
constexpr int32_t kBlock = 64;

SHOAL_CLONES inline void temper(const float* logits, float best, float temperature, int32_t size, float* tempered,
                                float* largest) {
    for (int32_t begin = 0; begin < size; begin += kBlock) {
        const int32_t end = begin + kBlock < size ? begin + kBlock : size;
        int32_t i = begin;
        Lanes most = Lanes{} - INFINITY, values;
        for (; i + kLanes <= end; i += kLanes) {
            load_lanes(logits + i, values);
            values = (values - best) / temperature;
            std::memcpy(tempered + i, &values, sizeof values);
            most = values > most ? values : most;
        }
        float highest = -INFINITY;
        for (int32_t lane = 0; lane < kLanes; ++lane) highest = most[lane] > highest ? most[lane] : highest;
        for (; i < end; ++i) {
            tempered[i] = (logits[i] - best) / temperature;
            highest = tempered[i] > highest ? tempered[i] : highest;
        }
        largest[begin / kBlock] = highest;
    }
}

// Of those at or above the floor.
SHOAL_CLONES inline double sum_of_exp(const float* tempered, int32_t size, float floor) {
    Lanes sums{}, values;
    int32_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        load_lanes(tempered + i, values);
        Lanes powers = values;
        exp_below_one(powers);
        sums += values >= floor ? powers : Lanes{};
    }
    double total = 0;
    for (; i < size; ++i) total += tempered[i] >= floor ? exp_below_one(tempered[i]) : 0.0f;
    for (int32_t lane = 0; lane < kLanes; ++lane) total += sums[lane];
    return total;
}

SHOAL_CLONES inline void raise_all(const float* tempered, int32_t size, float* powers) {
    Lanes values;
    int32_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        load_lanes(tempered + i, values);
        exp_below_one(values);
        std::memcpy(powers + i, &values, sizeof values);
    }
    for (; i < size; ++i) powers[i] = exp_below_one(tempered[i]);
}

class Sampler {
  public:
    int32_t draw(const float* logits, int32_t vocab_size, const SampleRow& row) {
        // Distances from the best token, which stays at 0: a temperature near 0 would make several logits infinite.
        tempered_.resize(vocab_size);
        float* tempered = tempered_.data();
        largest_.resize((vocab_size + kBlock - 1) / kBlock);
        temper(logits, find_best(logits, vocab_size), row.temperature, vocab_size, tempered, largest_.data());
        const uint64_t key = make_key(row.seed, row.position);
        const float floor = row.min_p > 0 ? std::log(row.min_p) : -INFINITY;
        if (row.top_k <= 0 && row.top_p >= 1) return draw_from_all(vocab_size, floor, key);
        const int32_t num_kept = keep_top(vocab_size, floor, row);
        Choice choice;
        for (int32_t i = 0; i < num_kept; ++i) choice.offer(kept_[i].logit, kept_[i].token_id, key);
        return choice.token_id;
    }

  private:
    struct Candidate {
        float logit;
        int32_t token_id;
        // Best first, of equals the lower id.
        bool operator<(const Candidate& other) const {
            return logit > other.logit || (logit == other.logit && token_id < other.token_id);
        }
    };

    struct Choice {
        float score = -INFINITY;
        int32_t token_id = 0;
        void offer(float logit, int32_t id, uint64_t key) {
            if (logit == -INFINITY) return;
            const float with_noise = logit + gumbel_noise(key, id);
            if (with_noise > score || (with_noise == score && id < token_id)) score = with_noise, token_id = id;
        }
    };

    // Two logarithms for each of 129,280 tokens take 2 ms. A token can only win if its noise -log(-log(u)) exceeds
    // score - logit, so if -log(u) < e^logit / e^score; and -log(u) is never below 1 - u, which costs a few
    // multiplications. That lets few tokens through, from the best one on, and those are offered as they are.
    int32_t draw_from_all(int32_t vocab_size, float floor, uint64_t key) {
        const float* tempered = tempered_.data();
        powers_.resize(vocab_size);
        raise_all(tempered, vocab_size, powers_.data());
        Choice choice;
        for (int32_t block = 0; block * kBlock < vocab_size; ++block) {
            if (largest_[block] != 0) continue;
            const int32_t best = int32_t(std::find(tempered + block * kBlock, tempered + vocab_size, 0.0f) - tempered);
            if (best < vocab_size) choice.offer(0, best, key);
            break;
        }
        // Rounding, of powers and of scores, is far below this.
        constexpr double kSlack = 1.001;
        double least = kSlack * std::exp(-double(choice.score));
        for (int32_t i = 0; i < vocab_size; ++i) {
            const double above = (double(~draw_bits(key, i) >> 11) + 0.5) * 0x1p-53;  // 1 - u
            if (above > powers_[i] * least || !(tempered[i] >= floor)) continue;
            choice.offer(tempered[i], i, key);
            least = kSlack * std::exp(-double(choice.score));
        }
        return choice.token_id;
    }

    // Leaves what top-k and top-p keep, best first, at the front of kept_; returns how many these are. Only the best few
    // are put in order: those down to a depth that grows until it reaches far enough.
    int32_t keep_top(int32_t vocab_size, float floor, const SampleRow& row) {
        const float* tempered = tempered_.data();
        double mass = 0;
        if (row.top_k <= 0) mass = sum_of_exp(tempered, vocab_size, floor);
        for (float depth = 4;; depth *= 2) {
            const float least = std::max(floor, -depth);
            kept_.clear();
            for (int32_t begin = 0; begin < vocab_size; begin += kBlock) {
                if (!(largest_[begin / kBlock] >= least)) continue;
                for (int32_t i = begin; i < std::min(begin + kBlock, vocab_size); ++i)
                    if (tempered[i] >= least) kept_.push_back({tempered[i], i});
            }
            const bool is_all = least == floor || depth > 1e6f || int32_t(kept_.size()) == vocab_size;
            if (row.top_k > 0 && int32_t(kept_.size()) < row.top_k && !is_all) continue;
            std::sort(kept_.begin(), kept_.end());
            int32_t count = int32_t(kept_.size());
            if (row.top_k > 0) {
                count = std::min(count, row.top_k);
                mass = 0;
                for (int32_t i = 0; i < count; ++i) mass += exp_below_one(kept_[i].logit);
            }
            if (row.top_p >= 1) return count;
            double before = 0;  // mass of the better tokens
            for (int32_t i = 0; i < count; ++i) {
                if (i && before >= double(row.top_p) * mass) return i;
                before += exp_below_one(kept_[i].logit);
            }
            if (row.top_k > 0 || is_all || before >= double(row.top_p) * mass) return count;
        }
    }

    std::vector<float> tempered_, largest_, powers_;
    std::vector<Candidate> kept_;
};

}  // namespace shoal

// logits: [num_rows, vocab_size] fp32, rows `stride` elements apart. token_ids: [num_rows]. Each row by itself.
extern "C" int32_t shoal_sample(const float* logits, int64_t stride, int32_t num_rows, int32_t vocab_size,
                                const shoal::SampleRow* rows, int64_t* token_ids) try {
    static thread_local shoal::Sampler sampler;
    for (int32_t row = 0; row < num_rows; ++row)
        token_ids[row] = sampler.draw(logits + row * stride, vocab_size, rows[row]);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
