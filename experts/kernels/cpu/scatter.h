// A layer's rows to the expert groups and their answers back, for the usual case: see router/native_scatter.py.
//
// The messages are those of router/dispatch_plan.py and experts/wire.py, to the byte. Nothing is sent unless all can be.
#pragma once
#include <algorithm>
#include <array>
#include <poll.h>
#include <utility>

#include "link.h"
#include "row_sums.h"
#include "serve.h"

namespace shoal {

// Mirrored by _Request in router/native_scatter.py. By group: links (null: none is connected), frame_ids,
// incarnations. expert_groups: [num_turns][num_experts], negative where no group serves; num_turns is a power of two.
struct ScatterRequest {
    int32_t num_tokens, top_k, num_experts, num_groups, num_turns;
    int32_t hidden_size, dtype, reply_dtype, layer_id, deadline_ms, flush_ms, reserved;
    uint64_t table_version;
    const int64_t *topk_ids, *expert_groups;
    const float* topk_weights;
    const void* hidden;
    Link* const* links;
    const uint64_t *frame_ids, *incarnations;
};

// Mirrored by router/group_traffic.py. Sums since they were last taken; latency_counts: entry i counts answers that took
// at most 64 << i us.
struct GroupTraffic {
    static constexpr int kBuckets = 19;
    int64_t num_frames, num_rows, num_pairs, sent_bytes, received_bytes, latency_us;
    std::array<int64_t, kBuckets> latency_counts;

    void count_answer(int64_t bytes, int64_t us) {
        received_bytes += bytes;
        latency_us += us;
        const uint64_t above = uint64_t(std::max<int64_t>(0, us - 1)) >> 6;
        ++latency_counts[size_t(above ? std::min(64 - __builtin_clzll(above), kBuckets - 1) : 0)];
    }
};

enum ScatterStatus : int32_t { kDone = 0, kWaiting = 1, kLeftToPython = 2 };

class Scatter {
  public:
    // The number of frames sent, negative if none is.
    int send(const ScatterRequest& request) {
        request_ = request;
        if (!plan()) return -1;
        for (Part& part : parts_)
            if (!part.rows.empty() && !encode(part)) return -1;
        num_missing_ = 0;
        sent_ns_ = now_ns();
        bool all_sent = true;
        for (Part& part : parts_) {
            if (part.rows.empty()) continue;
            part.link->rewind();
            part.link->send(part.pieces.data(), int(part.pieces.size()), part.message_bytes);
            part.is_missing = true;
            ++num_missing_;
            all_sent &= part.link->out().empty();
            ++part.traffic.num_frames;
            part.traffic.num_rows += int64_t(part.rows.size());
            part.traffic.num_pairs += int64_t(part.pair_rows.size());
            part.traffic.sent_bytes += part.message_bytes;
        }
        for (const int64_t end_ns = now_ns() + int64_t(request.flush_ms) * 1'000'000; !all_sent;) {
            const int64_t left_ns = end_ns - now_ns();
            if (left_ns <= 0) break;
            polled_.clear();
            for (Part& part : parts_)
                if (part.is_missing && !part.link->out().empty()) polled_.push_back({part.link->fd(), POLLOUT, 0});
            poll(polled_.data(), polled_.size(), int(left_ns / 1'000'000) + 1);
            all_sent = true;
            for (Part& part : parts_)
                if (part.is_missing) {
                    part.link->flush();
                    all_sent &= part.link->out().empty();
                }
        }
        return num_missing_;
    }

    // kDone: total[num_tokens][hidden_size] is the sum. kWaiting: not within timeout_us.
    ScatterStatus gather(int32_t timeout_us, float* total) {
        const int64_t end_ns = now_ns() + int64_t(timeout_us) * 1000;
        for (;;) {
            for (Part& part : parts_) {
                if (!part.is_missing || (part.polled >= 0 && !(polled_[size_t(part.polled)].revents & ~POLLOUT)))
                    continue;
                if (part.polled >= 0) {
                    Message message;
                    const Found found = part.link->next(message);
                    if (found == Found::kUnusual) return kLeftToPython;
                    if (found == Found::kMessage) {
                        if (!take_answer(part, message)) {
                            part.link->put_back(message);
                            return kLeftToPython;
                        }
                        part.link->consume(message.size);
                        part.is_missing = false;
                        --num_missing_;
                    }
                }
            }
            if (!num_missing_) break;
            polled_.clear();
            for (Part& part : parts_) {
                part.polled = part.is_missing ? int(polled_.size()) : -1;
                if (!part.is_missing) continue;
                part.link->flush();
                const bool is_sent = part.link->out().empty();
                polled_.push_back({part.link->fd(), short(is_sent ? POLLIN : POLLIN | POLLOUT), 0});
            }
            const int64_t left_ns = std::max<int64_t>(0, end_ns - now_ns());
            const timespec timeout{time_t(left_ns / 1'000'000'000), long(left_ns % 1'000'000'000)};
            if (ppoll(polled_.data(), polled_.size(), &timeout, nullptr) <= 0) {
                for (Part& part : parts_) part.polled = -1;
                return kWaiting;
            }
        }
        for (Part& part : parts_) part.polled = -1;
        add(total);
        return is_finite(total, int64_t(request_.num_tokens) * request_.hidden_size) ? kDone : kLeftToPython;
    }

    int num_rows(int group) const { return int(parts_[size_t(group)].rows.size()); }
    bool is_missing(int group) const { return parts_[size_t(group)].is_missing; }
    int num_pairs(int group) const { return int(parts_[size_t(group)].pair_rows.size()); }
    // From sending to the answer.
    int64_t reply_ns(int group) const { return parts_[size_t(group)].reply_ns; }
    // And begin to count anew.
    GroupTraffic take_traffic(int group) {
        if (size_t(group) >= parts_.size()) return {};
        return std::exchange(parts_[size_t(group)].traffic, {});
    }
    // Where the answer of a group lies.
    const uint8_t* answer(int group) const {
        const Part& part = parts_[size_t(group)];
        return part.link->data() + part.answer_at;
    }

  private:
    struct Part {
        Link* link;
        uint64_t frame_id, incarnation;
        std::vector<int64_t> rows;
        std::vector<int32_t> pair_rows, pair_experts;
        std::vector<float> pair_weights;
        uint8_t head[kStartBytes + kMostHeaderBytes + 16];
        std::vector<iovec> pieces;
        int64_t message_bytes, answer_at, reply_ns;
        bool is_missing;
        int polled;
        GroupTraffic traffic{};
    };

    bool plan() {
        const ScatterRequest& r = request_;
        parts_.resize(size_t(r.num_groups));
        for (int group = 0; group < r.num_groups; ++group) {
            Part& part = parts_[size_t(group)];
            part.link = r.links[group];
            part.frame_id = r.frame_ids[group];
            part.incarnation = r.incarnations[group];
            part.rows.clear();
            part.pair_rows.clear();
            part.pair_experts.clear();
            part.pair_weights.clear();
            part.is_missing = false;
            part.polled = -1;
        }
        order_.resize(size_t(r.top_k));
        for (int row = 0; row < r.num_tokens; ++row) {
            const int64_t* ids = r.topk_ids + int64_t(row) * r.top_k;
            for (int i = 0; i < r.top_k; ++i) {  // equal ids stay in their order
                int at = i;
                for (; at > 0 && ids[order_[size_t(at - 1)]] > ids[i]; --at) order_[size_t(at)] = order_[size_t(at - 1)];
                order_[size_t(at)] = i;
            }
            const int64_t* served_by = r.expert_groups + turn(row) * r.num_experts;
            for (const int choice : order_) {
                const int64_t expert = ids[choice];
                if (expert < 0) continue;
                if (expert >= r.num_experts) return false;
                const int64_t group = served_by[expert];
                if (group < 0 || group >= r.num_groups) return false;
                Part& part = parts_[size_t(group)];
                if (part.rows.empty() || part.rows.back() != row) part.rows.push_back(row);
                part.pair_rows.push_back(int32_t(part.rows.size()) - 1);
                part.pair_experts.push_back(int32_t(expert));
                part.pair_weights.push_back(r.topk_weights[int64_t(row) * r.top_k + choice]);
            }
        }
        return true;
    }

    // As router/dispatch_plan.py compute_turns.
    int64_t turn(int row) const {
        const ScatterRequest& r = request_;
        if (r.num_turns == 1) return 0;
        uint32_t sum = 0;
        for (int i = 0; i < r.top_k; ++i) {
            uint32_t bits;
            std::memcpy(&bits, r.topk_weights + int64_t(row) * r.top_k + i, sizeof bits);
            bits = (bits ^ bits >> 16) * 0x85ebca6bu;
            sum += (bits ^ bits >> 13) * 0xc2b2ae35u;
        }
        return int64_t(uint64_t(sum) * uint64_t(r.num_turns) >> 32);
    }

    bool encode(Part& part) {
        const ScatterRequest& r = request_;
        if (!part.link) return false;
        const int64_t row_bytes = r.hidden_size * wire_item_bytes(uint64_t(r.dtype));
        const int64_t num_rows = int64_t(part.rows.size()), num_pairs = int64_t(part.pair_rows.size());
        const int64_t tensor_bytes = num_pairs * 12 + num_rows * row_bytes;
        uint8_t header[kMostHeaderBytes], *end = header;
        end = write_field(end, 1, part.frame_id);
        end = write_field(end, 2, part.incarnation);
        end = write_field(end, 3, r.table_version);
        end = write_field(end, 4, uint64_t(r.layer_id));
        end = write_field(end, 5, uint64_t(num_rows));
        end = write_field(end, 6, uint64_t(num_pairs));
        end = write_field(end, 7, uint64_t(r.hidden_size));
        end = write_field(end, 8, uint64_t(r.dtype));
        end = write_field(end, 9, 1);  // COMBINE_MODE_REDUCED
        end = write_field(end, 10, uint64_t(r.deadline_ms));
        end = write_field(end, 11, uint64_t(r.reply_dtype));
        uint8_t* head_end = write_head(part.head + kStartBytes, header, end - header, tensor_bytes);
        part.message_bytes = head_end - part.head - kStartBytes + tensor_bytes;
        if (!part.link->can_send(part.message_bytes)) return false;
        write_start(part.head, uint32_t(part.message_bytes));
        auto& pieces = part.pieces;
        pieces.clear();
        pieces.push_back({part.head, size_t(head_end - part.head)});
        pieces.push_back({part.pair_rows.data(), size_t(num_pairs) * 4});
        pieces.push_back({part.pair_experts.data(), size_t(num_pairs) * 4});
        pieces.push_back({part.pair_weights.data(), size_t(num_pairs) * 4});
        uint8_t* hidden = static_cast<uint8_t*>(const_cast<void*>(r.hidden));
        for (size_t i = 0; i < part.rows.size(); ++i) {
            uint8_t* row = hidden + part.rows[i] * row_bytes;
            iovec& last = pieces.back();
            if (i && static_cast<uint8_t*>(last.iov_base) + last.iov_len == row) last.iov_len += size_t(row_bytes);
            else pieces.push_back({row, size_t(row_bytes)});
        }
        return pieces.size() <= 512;  // what one call of sendmsg takes is bounded (IOV_MAX)
    }

    bool take_answer(Part& part, const Message& message) {
        const ScatterRequest& r = request_;
        HeaderFields fields;
        const uint8_t *begin = part.link->data() + message.at, *tensors;
        int64_t bytes;
        if (!split_message(begin, message.size, fields, tensors, bytes)) return false;
        const uint64_t* value = fields.values;
        const int64_t num_rows = int64_t(part.rows.size());
        if (value[1] != part.frame_id || value[2] != part.incarnation || value[3] != 1 || value[5] != uint64_t(num_rows) ||
            value[6] != uint64_t(r.hidden_size) || value[7] != uint64_t(r.reply_dtype) ||
            bytes != num_rows * r.hidden_size * wire_item_bytes(value[7]))
            return false;
        part.answer_at = tensors - part.link->data();
        part.reply_ns = now_ns() - sent_ns_;
        part.traffic.count_answer(bytes, part.reply_ns / 1000);
        return true;
    }

    void add(float* total) {
        answers_.clear();
        row_ids_.clear();
        num_rows_.clear();
        for (const Part& part : parts_) {
            if (part.rows.empty()) continue;
            answers_.push_back(part.link->data() + part.answer_at);
            row_ids_.push_back(int64_t(part.rows.size()) == request_.num_tokens ? nullptr : part.rows.data());
            num_rows_.push_back(int64_t(part.rows.size()));
        }
        shoal_add_rows(request_.reply_dtype == int32_t(kWireBfloat16), int32_t(answers_.size()), answers_.data(),
                       row_ids_.data(), num_rows_.data(), request_.num_tokens, request_.hidden_size, total);
    }

    static bool is_finite(const float* values, int64_t count) {
        uint32_t largest = 0;
        for (int64_t i = 0; i < count; ++i) {
            uint32_t bits;
            std::memcpy(&bits, values + i, sizeof bits);
            bits &= 0x7F800000;
            largest = bits > largest ? bits : largest;
        }
        return largest != 0x7F800000;
    }

    ScatterRequest request_{};
    std::vector<Part> parts_;
    std::vector<int> order_;
    std::vector<pollfd> polled_;
    int num_missing_ = 0;
    int64_t sent_ns_ = 0;
    std::vector<const void*> answers_;
    std::vector<const int64_t*> row_ids_;
    std::vector<int64_t> num_rows_;
};

}  // namespace shoal
