// One gRPC stream over HTTP/2 on a non-blocking socket, for the usual case: whole messages in one DATA frame, and credit.
//
// Everything else is left to experts/http2_stream.py, which lends its stream between two messages and takes it back
// together with the bytes that were not used; the rules are explained there.
#pragma once
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <new>
#include <sys/socket.h>
#include <sys/uio.h>
#include <vector>

namespace shoal {

constexpr int64_t kHeaderBytes = 9, kPrefixBytes = 5, kStartBytes = kHeaderBytes + kPrefixBytes;
constexpr int64_t kWindowBytes = 16 << 20, kLargestWindow = (int64_t(1) << 31) - 1;
constexpr int64_t kMaxMessageBytes = 64 << 20;
constexpr uint32_t kDataFrame = 0, kWindowUpdate = 8, kStreamId = 1;

inline uint32_t read_u32(const uint8_t* from) {
    return uint32_t(from[0]) << 24 | uint32_t(from[1]) << 16 | uint32_t(from[2]) << 8 | from[3];
}

inline void write_u32(uint8_t* to, uint32_t value) {
    for (int i = 0; i < 4; ++i) to[i] = uint8_t(value >> (24 - 8 * i));
}

inline int64_t now_ns() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return int64_t(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
}

// Frame header and message prefix of a message that is one DATA frame.
inline void write_start(uint8_t* to, uint32_t message_bytes) {
    write_u32(to, (message_bytes + uint32_t(kPrefixBytes)) << 8 | kDataFrame);
    to[4] = 0;
    write_u32(to + 5, kStreamId);
    to[9] = 0;
    write_u32(to + 10, message_bytes);
}

// A whole message in the link's memory, until the next rewind(): bytes [at, at + size).
struct Message {
    int64_t at, size;
};

struct LinkState {
    int64_t send_window, send_connection_window, frame_size, receive_window, credit;
};

enum class Found { kMessage, kNothing, kUnusual };

class Link {
  public:
    ~Link() { std::free(in_); }

    void open(int fd, const LinkState& state) {
        fd_ = fd;
        this->state = state;
        start_ = end_ = 0;
        out_.clear();
    }

    int fd() const { return fd_; }
    const uint8_t* data() const { return in_; }
    const std::vector<uint8_t>& out() const { return out_; }
    const uint8_t* unused() const { return in_ + start_; }
    int64_t unused_bytes() const { return end_ - start_; }

    // No message found so far is needed any more.
    void rewind() {
        if (!start_) return;
        std::memmove(in_, in_ + start_, size_t(end_ - start_));
        end_ -= start_;
        start_ = 0;
    }

    // The next message, reading the socket only as far as it takes.
    Found next(Message& message) {
        for (;;) {
            const int64_t available = end_ - start_;
            int64_t wanted = kStartBytes;
            if (available >= kHeaderBytes) {
                const uint8_t* head = in_ + start_;
                const uint32_t length = read_u32(head) >> 8, kind = head[3], stream = read_u32(head + 5);
                if (kind == kWindowUpdate && length == 4) {
                    wanted = kHeaderBytes + 4;
                    if (available >= wanted) {
                        if (!raise_window(stream & 0x7FFF'FFFF, read_u32(head + 9) & 0x7FFF'FFFF))
                            return Found::kUnusual;
                        start_ += wanted;
                        continue;
                    }
                } else {
                    if (kind != kDataFrame || head[4] || stream != kStreamId || length < kPrefixBytes ||
                        length > state.receive_window)
                        return Found::kUnusual;
                    if (available >= kStartBytes) {
                        if (head[9] || read_u32(head + 10) != length - kPrefixBytes ||
                            length - kPrefixBytes > kMaxMessageBytes)
                            return Found::kUnusual;
                        wanted = kHeaderBytes + length;
                        if (available >= wanted) {
                            message = {start_ + kStartBytes, length - kPrefixBytes};
                            state.receive_window -= length;
                            start_ += wanted;
                            return Found::kMessage;
                        }
                    }
                }
            }
            reserve(start_ + wanted > kLeastRoom ? start_ + wanted : kLeastRoom);
            const ssize_t count = recv(fd_, in_ + end_, size_t(capacity_ - end_), MSG_DONTWAIT);
            if (count > 0) end_ += count;
            else if (count < 0 && errno == EINTR) continue;
            else return count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK) ? Found::kNothing : Found::kUnusual;
        }
    }

    // Leave a message, and what came behind it, to the one who takes the stream back.
    void put_back(const Message& message) {
        const int64_t begin = message.at - kStartBytes;
        for (int64_t at = begin; at < start_;) {  // all whole frames: DATA, or credit, which stays given
            const uint32_t length = read_u32(in_ + at) >> 8;
            if (in_[at + 3] == kDataFrame) state.receive_window += length;
            else {
                write_u32(in_ + at + 5, 0xFF);  // of a stream that does not exist: ignored when it is read again
            }
            at += kHeaderBytes + length;
        }
        start_ = begin;
    }

    bool can_send(int64_t message_bytes) const {
        const int64_t total = message_bytes + kPrefixBytes;
        return out_.empty() && total <= state.send_window && total <= state.send_connection_window &&
               total <= state.frame_size && message_bytes <= kMaxMessageBytes;
    }

    // Send a message that can_send; parts begin with a start (write_start). What the socket does not take is kept. A
    // broken connection shows when it is read.
    void send(iovec* parts, int count, int64_t message_bytes) {
        state.send_window -= message_bytes + kPrefixBytes;
        state.send_connection_window -= message_bytes + kPrefixBytes;
        write(parts, count);
    }

    // A message of so many bytes is done with: the peer may send as much again.
    void consume(int64_t size) {
        state.credit += size + kPrefixBytes < kWindowBytes ? size + kPrefixBytes : kWindowBytes;
        if (state.credit < kWindowBytes / 4) return;
        uint8_t updates[26];
        for (uint32_t stream = 0; stream < 2; ++stream) {
            uint8_t* to = updates + 13 * stream;
            write_u32(to, 4 << 8 | kWindowUpdate);
            to[4] = 0;
            write_u32(to + 5, stream);
            write_u32(to + 9, uint32_t(state.credit));
        }
        state.receive_window += state.credit;
        state.credit = 0;
        iovec part{updates, sizeof updates};
        write(&part, 1);
    }

    // Send what the socket did not take.
    void flush() {
        if (out_.empty()) return;
        std::vector<uint8_t> rest;
        rest.swap(out_);
        iovec part{rest.data(), rest.size()};
        write(&part, 1);
    }

    LinkState state{};

  private:
    static constexpr int64_t kLeastRoom = 64 << 10;

    bool raise_window(uint32_t stream, int64_t credit) {
        if (stream > 1) return true;
        int64_t& window = stream ? state.send_window : state.send_connection_window;
        if (window + credit > kLargestWindow) return false;
        window += credit;
        return true;
    }

    void reserve(int64_t bytes) {
        if (bytes <= capacity_) return;
        bytes += bytes / 2;
        void* grown = std::realloc(in_, size_t(bytes));
        if (!grown) throw std::bad_alloc();
        in_ = static_cast<uint8_t*>(grown);
        capacity_ = bytes;
    }

    void write(iovec* parts, int count) {
        size_t sent = 0;
        if (out_.empty()) {
            msghdr message{};
            message.msg_iov = parts;
            message.msg_iovlen = size_t(count);
            ssize_t result;
            do result = sendmsg(fd_, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
            while (result < 0 && errno == EINTR);
            if (result < 0 && errno != EAGAIN && errno != EWOULDBLOCK) return;
            sent = result < 0 ? 0 : size_t(result);
        }
        for (int i = 0; i < count; ++i) {
            const size_t skipped = sent < parts[i].iov_len ? sent : parts[i].iov_len;
            sent -= skipped;
            const uint8_t* from = static_cast<const uint8_t*>(parts[i].iov_base);
            out_.insert(out_.end(), from + skipped, from + parts[i].iov_len);
        }
    }

    int fd_ = -1;
    uint8_t* in_ = nullptr;
    int64_t capacity_ = 0, start_ = 0, end_ = 0;
    std::vector<uint8_t> out_;
};

// The fields of a header of experts.proto that are numbers, by field number.
struct HeaderFields {
    static constexpr int kMost = 12;
    uint64_t values[kMost] = {};

    // False for anything but varint fields below kMost.
    bool read(const uint8_t* at, const uint8_t* end) {
        while (at < end) {
            const uint8_t tag = *at++;
            if ((tag & 0x87) != 0 || (tag >> 3) == 0 || (tag >> 3) >= kMost) return false;
            uint64_t value = 0;
            int shift = 0;
            for (;; shift += 7) {
                if (at == end || shift > 63) return false;
                const uint8_t byte = *at++;
                value |= uint64_t(byte & 0x7F) << shift;
                if (byte < 0x80) break;
            }
            values[tag >> 3] = value;
        }
        return true;
    }
};

inline uint8_t* write_varint(uint8_t* to, uint64_t value) {
    for (; value >= 0x80; value >>= 7) *to++ = uint8_t(value) | 0x80;
    *to++ = uint8_t(value);
    return to;
}

// As proto3 does: zero is left out.
inline uint8_t* write_field(uint8_t* to, int number, uint64_t value) {
    if (!value) return to;
    *to++ = uint8_t(number << 3);
    return write_varint(to, value);
}

// Field 1 with the header and the start of field 2, which has tensor_bytes.
constexpr int64_t kMostHeaderBytes = 160;
inline uint8_t* write_head(uint8_t* to, const uint8_t* header, int64_t header_bytes, int64_t tensor_bytes) {
    *to++ = 0x0A;
    to = write_varint(to, uint64_t(header_bytes));
    std::memcpy(to, header, size_t(header_bytes));
    to += header_bytes;
    *to++ = 0x12;
    return write_varint(to, uint64_t(tensor_bytes));
}

inline bool read_length(const uint8_t*& at, const uint8_t* end, uint64_t& value) {
    value = 0;
    for (int shift = 0; shift < 35; shift += 7) {
        if (at == end) return false;
        const uint8_t byte = *at++;
        value |= uint64_t(byte & 0x7F) << shift;
        if (byte < 0x80) return true;
    }
    return false;
}

// Find header fields and tensor bytes of a message that is laid out as experts/wire.py writes it.
inline bool split_message(const uint8_t* at, int64_t size, HeaderFields& fields, const uint8_t*& tensors,
                          int64_t& tensor_bytes) {
    const uint8_t* end = at + size;
    uint64_t length;
    if (at == end || *at++ != 0x0A || !read_length(at, end, length) || length > uint64_t(end - at)) return false;
    if (!fields.read(at, at + length)) return false;
    at += length;
    if (at == end || *at++ != 0x12 || !read_length(at, end, length) || length != uint64_t(end - at)) return false;
    tensors = at;
    tensor_bytes = int64_t(length);
    return true;
}

}  // namespace shoal
