// Serves routers' streams without the interpreter for as long as nothing unusual happens: see experts/native_serving.py.
#pragma once
#include <atomic>
#include <cmath>
#include <mutex>
#include <sys/epoll.h>
#include <vector>

#include "job.h"
#include "link.h"

namespace shoal {

// Of experts.proto.
enum TensorDtype : uint64_t { kWireBfloat16 = 1, kWireFloat32 = 2 };

inline int64_t wire_item_bytes(uint64_t dtype) { return dtype == kWireBfloat16 ? 2 : 4; }

// A checked request. Memory is aligned.
struct Frame {
    int32_t layer_id, num_rows, num_pairs, hidden_size, exact, dtype, reply_dtype, reserved;
    const void* hidden;
    const int32_t *pair_rows, *pair_experts;
    const float* pair_weights;
};

// Computes a frame into reply, in its reply_dtype; not 0: leave it to Python.
using ComputeFrame = int32_t (*)(void* context, const Frame* frame, void* reply);

// What one part of the load meter's window sums up (experts/load_meter.py). index: the part's number since time 0.
struct LoadSlot {
    int64_t index;
    double busy_s, queue_s, max_queue_s;
    int64_t num_frames, num_pairs;
};

struct ServeOptions {
    uint64_t incarnation;
    int32_t hidden_size, dtype;  // of rows, of the wire
    int32_t num_layers, num_experts;
    double slot_s;
    ComputeFrame compute;
    void* context;
};

class Server {
  public:
    explicit Server(const ServeOptions& options)
        : options_(options), pairs_(size_t(options.num_layers) * options.num_experts) {}

    std::atomic<bool> enabled{true};

    void use(void* context) { options_.context = context; }

    // Until something is Python's to do. Streams are told apart by fd.
    void serve(int epoll_fd, Link* const* links, int num_links) {
        bool unusual = false;
        while (!unusual) {
            epoll_event events[64];
            const int count = epoll_wait(epoll_fd, events, 64, -1);
            if (count < 0) return;  // a signal
            arrived_.clear();
            for (int i = 0; i < count; ++i) {
                Link* link = nullptr;
                for (int k = 0; k < num_links; ++k)
                    if (links[k]->fd() == events[i].data.fd) link = links[k];
                if (!link || events[i].events != EPOLLIN) {
                    unusual = true;
                    continue;
                }
                link->rewind();
                Message message;
                Found found;
                while ((found = link->next(message)) == Found::kMessage) arrived_.push_back({link, message, now_ns(), {}});
                unusual |= found == Found::kUnusual;
            }
            unusual |= !answer_all();
        }
    }

    // Move the sums out: up to most slots, and the pairs added to pairs[num_layers][num_experts].
    int take_load(LoadSlot* slots, int most, int64_t* pairs) {
        std::lock_guard<std::mutex> lock(load_);
        const size_t count = std::min(slots_.size(), size_t(most));
        std::copy(slots_.end() - long(count), slots_.end(), slots);
        slots_.clear();
        for (size_t i = 0; i < pairs_.size(); ++i) pairs[i] += pairs_[i];
        std::fill(pairs_.begin(), pairs_.end(), 0);
        return int(count);
    }

  private:
    struct Arrived {
        Link* link;
        Message message;
        int64_t received_ns;
        HeaderFields fields;
    };

    // Of several at once: frames that could be joined are left to the batcher.
    bool answer_all() {
        size_t done = 0;
        all_sent_ = true;
        if (arrived_.size() < 2 || are_apart())
            while (done < arrived_.size() && answer(arrived_[done])) ++done;
        // In reverse: a link is put back to its first.
        for (size_t i = arrived_.size(); i > done; --i) arrived_[i - 1].link->put_back(arrived_[i - 1].message);
        return done == arrived_.size() && all_sent_;
    }

    bool are_apart() {
        for (size_t i = 0; i < arrived_.size(); ++i) {
            Arrived& one = arrived_[i];
            const uint8_t* tensors;
            int64_t bytes;
            if (!split_message(one.link->data() + one.message.at, one.message.size, one.fields, tensors, bytes))
                return false;
            for (size_t k = 0; k < i; ++k)
                if (arrived_[k].fields.values[4] == one.fields.values[4]) return false;
        }
        return true;
    }

    bool answer(const Arrived& arrived) {
        HeaderFields fields;
        const uint8_t* tensors;
        int64_t tensor_bytes;
        if (!enabled.load(std::memory_order_relaxed) ||
            !split_message(arrived.link->data() + arrived.message.at, arrived.message.size, fields, tensors,
                           tensor_bytes))
            return false;
        const uint64_t* value = fields.values;
        const uint64_t num_rows = value[5], num_pairs = value[6], dtype = value[8],
                       reply_dtype = value[11] ? value[11] : dtype;
        const bool exact = value[9] == 2;
        if (value[2] != options_.incarnation || value[4] >= uint64_t(options_.num_layers) || !num_rows || !num_pairs ||
            num_rows > uint64_t(kMaxMessageBytes) || num_pairs > uint64_t(kMaxMessageBytes) ||
            value[7] != uint64_t(options_.hidden_size) || dtype != uint64_t(options_.dtype) ||
            (reply_dtype != kWireBfloat16 && reply_dtype != kWireFloat32) || (value[9] != 1 && !exact))
            return false;
        const int64_t row_bytes = options_.hidden_size * wire_item_bytes(dtype);
        const int64_t result_rows = int64_t(exact ? num_pairs : num_rows);
        const int64_t result_bytes = result_rows * options_.hidden_size * wire_item_bytes(reply_dtype);
        if (tensor_bytes != int64_t(num_pairs) * 12 + int64_t(num_rows) * row_bytes ||
            result_bytes > kMaxMessageBytes - 1024 || !arrived.link->can_send(result_bytes + kMostHeaderBytes))
            return false;
        const int64_t pair_items = int64_t(num_pairs) * 3;
        pairs_of_frame_.resize(size_t(pair_items));
        std::memcpy(pairs_of_frame_.data(), tensors, size_t(pair_items) * 4);
        const int32_t *rows = pairs_of_frame_.data(), *experts = rows + num_pairs;
        const float* weights = reinterpret_cast<const float*>(experts + num_pairs);
        if (!is_sound(int(num_rows), int(num_pairs), rows, experts, weights)) return false;
        const void* hidden = tensors + pair_items * 4;
        if (reinterpret_cast<uintptr_t>(hidden) % size_t(wire_item_bytes(dtype)))
            hidden = std::memcpy(rows_.reserve(size_t(num_rows * row_bytes)), hidden, size_t(num_rows * row_bytes));
        const int64_t started_ns = now_ns();
        if (started_ns - arrived.received_ns >= int64_t(value[10]) * 1'000'000) return false;
        const Frame frame{int32_t(value[4]), int32_t(num_rows), int32_t(num_pairs), options_.hidden_size,
                          exact,             int32_t(dtype),    int32_t(reply_dtype), 0,
                          hidden,            rows,              experts,              weights};
        uint8_t* reply = reply_.reserve(size_t(kReplyRoom + result_bytes)) + kReplyRoom;
        if (options_.compute(options_.context, &frame, reply)) return false;
        const int64_t ended_ns = now_ns();
        note(frame, arrived.received_ns * 1e-9, started_ns * 1e-9, ended_ns * 1e-9);

        uint8_t header[kMostHeaderBytes], *end = header;
        end = write_field(end, 1, value[1]);
        end = write_field(end, 2, options_.incarnation);
        end = write_field(end, 3, 1);  // COMPUTE_STATUS_OK
        end = write_field(end, 5, uint64_t(result_rows));
        end = write_field(end, 6, uint64_t(options_.hidden_size));
        end = write_field(end, 7, reply_dtype);
        end = write_field(end, 8, uint64_t(started_ns - arrived.received_ns) / 1000);
        end = write_field(end, 9, uint64_t(ended_ns - started_ns) / 1000);
        uint8_t head[kMostHeaderBytes + 16];
        const int64_t head_bytes = write_head(head, header, end - header, result_bytes) - head;
        uint8_t* start = reply - head_bytes - kStartBytes;
        std::memcpy(reply - head_bytes, head, size_t(head_bytes));
        write_start(start, uint32_t(head_bytes + result_bytes));
        iovec part{start, size_t(kStartBytes + head_bytes + result_bytes)};
        arrived.link->send(&part, 1, head_bytes + result_bytes);
        arrived.link->consume(arrived.message.size);
        all_sent_ &= arrived.link->out().empty();
        return true;
    }

    // As wire.decode_request checks them.
    static bool is_sound(int num_rows, int num_pairs, const int32_t* rows, const int32_t* experts,
                         const float* weights) {
        int last_row = 0, last_expert = -1;
        for (int i = 0; i < num_pairs; ++i) {
            if (rows[i] > last_row) last_expert = -1;
            if (rows[i] < last_row || rows[i] >= num_rows || experts[i] <= last_expert || !std::isfinite(weights[i]))
                return false;
            last_row = rows[i];
            last_expert = experts[i];
        }
        return true;
    }

    // As LoadMeter.note_frame does.
    void note(const Frame& frame, double received_s, double started_s, double ended_s) {
        std::lock_guard<std::mutex> lock(load_);
        const int64_t index = int64_t(ended_s / options_.slot_s);
        if (slots_.empty() || index > slots_.back().index) {
            if (slots_.size() >= 32) slots_.erase(slots_.begin());
            slots_.push_back({index, 0, 0, 0, 0, 0});
        }
        LoadSlot& slot = slots_.back();
        slot.busy_s += ended_s - started_s;
        slot.queue_s += started_s - received_s;
        slot.max_queue_s = std::max(slot.max_queue_s, started_s - received_s);
        slot.num_frames += 1;
        slot.num_pairs += frame.num_pairs;
        int64_t* pairs = &pairs_[size_t(frame.layer_id) * options_.num_experts];
        for (int i = 0; i < frame.num_pairs; ++i)
            if (frame.pair_experts[i] < options_.num_experts) ++pairs[frame.pair_experts[i]];
    }

    static constexpr int64_t kReplyRoom = 256;  // before the tensor, for all headers
    ServeOptions options_;
    std::vector<Arrived> arrived_;
    std::vector<int32_t> pairs_of_frame_;
    Buffer rows_, reply_;
    bool all_sent_ = true;
    std::mutex load_;
    std::vector<LoadSlot> slots_;
    std::vector<int64_t> pairs_;
};

}  // namespace shoal
