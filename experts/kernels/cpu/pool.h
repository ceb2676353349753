// The one thread pool of the process. A job is a number of tasks that any thread may take; the caller works too.
//
// Threads that find nothing to do sleep after a few microseconds, because several expert groups may share the host's
// cores. A thread that wakes late finds the job closed and is not waited for.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace shoal {

inline void pause_cpu() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
}

// Hands out the task numbers of one job.
class Tasks {
  public:
    int take() { return next_.fetch_add(1, std::memory_order_relaxed); }
    int count() const { return count_.load(std::memory_order_relaxed); }
    bool exhausted() const { return next_.load(std::memory_order_relaxed) >= count(); }
    void reset(int count) {
        count_.store(count, std::memory_order_relaxed);
        next_.store(0, std::memory_order_relaxed);
    }

  private:
    std::atomic<int> next_{0}, count_{0};
};

class Pool {
  public:
    // Never destroyed: the threads of a process that exits are simply gone.
    static Pool& instance() {
        static Pool* pool = new Pool;
        return *pool;
    }

    // One caller at a time: hold this around run and set_threads.
    std::mutex& turn() { return turn_; }
    int threads() const { return int(workers_.size()) + 1; }

    void set_threads(int count) {
        stop();
        stopping_ = false;
        for (int i = 1; i < count; ++i) workers_.emplace_back([this, i] { work(i); });
    }

    // Run body(tasks, thread) on every thread that comes in time until each task is taken; returns when all are done.
    template <class F>
    void run(int count, bool alone, F&& body) {
        tasks_.reset(count);
        if (alone || count <= 1 || workers_.empty()) {
            body(tasks_, 0);
            return;
        }
        body_ = [](void* context, Tasks& tasks, int thread) {
            (*static_cast<std::remove_reference_t<F>*>(context))(tasks, thread);
        };
        context_ = &body;
        gate_.store(kOpen, std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst)) {
            std::lock_guard<std::mutex> lock(sleep_);
            wake_.notify_all();
        }
        body(tasks_, 0);
        gate_.fetch_and(~kOpen, std::memory_order_acq_rel);
        for (int i = 0; i < kSpins && gate_.load(std::memory_order_acquire); ++i) pause_cpu();
        if (gate_.load(std::memory_order_acquire)) {
            std::unique_lock<std::mutex> lock(sleep_);
            done_.wait(lock, [this] { return gate_.load(std::memory_order_acquire) == 0; });
        }
    }

  private:
    static constexpr uint32_t kOpen = 1u << 31;  // the lower bits count the workers inside
    static constexpr int kSpins = 300;           // some 20 us on x86

    void stop() {
        {
            std::lock_guard<std::mutex> lock(sleep_);
            stopping_ = true;
            wake_.notify_all();
        }
        for (auto& worker : workers_) worker.join();
        workers_.clear();
    }

    bool enter() {
        uint32_t gate = gate_.load(std::memory_order_seq_cst);
        while ((gate & kOpen) && !tasks_.exhausted())
            if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) return true;
        return false;
    }

    void leave() {
        if (gate_.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
        std::lock_guard<std::mutex> lock(sleep_);
        done_.notify_all();
    }

    void work(int thread) {
        for (;;) {
            bool entered = false;
            for (int i = 0; i < kSpins && !(entered = enter()); ++i) pause_cpu();
            if (!entered) {
                std::unique_lock<std::mutex> lock(sleep_);
                sleepers_.fetch_add(1, std::memory_order_seq_cst);
                wake_.wait(lock, [&] { return stopping_ || (entered = enter()); });
                sleepers_.fetch_sub(1, std::memory_order_seq_cst);
                if (!entered) return;
            }
            body_(context_, tasks_, thread);
            leave();
        }
    }

    std::mutex turn_;
    std::vector<std::thread> workers_;
    std::mutex sleep_;
    std::condition_variable wake_, done_;
    std::atomic<int> sleepers_{0};
    bool stopping_ = false;
    alignas(64) std::atomic<uint32_t> gate_{0};
    alignas(64) Tasks tasks_;
    void (*body_)(void*, Tasks&, int) = nullptr;
    void* context_ = nullptr;
};

}  // namespace shoal
