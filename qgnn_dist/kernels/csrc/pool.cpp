// SPDX-License-Identifier: Apache-2.0
#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace qgnn {
namespace {

// A thread that waits looks again for so long before it sleeps. Waking one takes 50 to 100 microseconds, as long as a
// kernel over one block of rows may, and in training the next block comes sooner than that.
constexpr std::chrono::microseconds kLooking{100};

template <typename Condition>
void look_for(const Condition& holds) {
  const auto until = std::chrono::steady_clock::now() + kLooking;
  while (std::chrono::steady_clock::now() < until) {
    for (int i = 0; i < 64; ++i) {
      if (holds()) return;
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#endif
    }
    std::this_thread::yield();  // to whoever needs this core more
  }
}

// Rows that one thread begins with: calls in a row give it the same ones, which are then in its own memory.
struct alignas(64) Share {
  std::atomic<i64> next{0};
  i64 end = 0;
};

class Pool {
 public:
  int size() const { return size_; }

  void resize(int count) {
    std::lock_guard<std::mutex> turn(turn_);
    stop_all();
    size_ = std::max(count, 1);
    stop_ = false;
    shares_ = std::vector<Share>(size_);
    for (int i = 1; i < size_; ++i) helpers_.emplace_back([this, i] { help(i); });
  }

  void run(i64 begin, i64 end, i64 grain, const std::function<void(i64, i64)>& work) {
    if (end <= begin) return;
    if (size_ == 1 || end - begin <= grain) return work(begin, end);
    std::lock_guard<std::mutex> turn(turn_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const i64 chunks = (end - begin + grain - 1) / grain;
      for (i64 i = 0; i < size_; ++i) {
        shares_[i].next = begin + chunks * i / size_ * grain;
        shares_[i].end = std::min(begin + chunks * (i + 1) / size_ * grain, end);
      }
      grain_ = grain;
      work_ = &work;
      ++generation_;
    }
    wake_.notify_all();
    const Finish finish{*this};  // also where this thread's work throws: helpers are still at theirs
    take(0, work);
  }

 private:
  struct Finish {
    Pool& pool;
    ~Finish() {
      look_for([this] { return pool.busy_ == 0; });
      std::unique_lock<std::mutex> lock(pool.mutex_);
      pool.work_ = nullptr;  // a helper that wakes only now finds nothing to do, and is not waited for
      pool.done_.wait(lock, [this] { return pool.busy_ == 0; });
    }
  };

  // The own share first, then what is left of the others'.
  void take(int own, const std::function<void(i64, i64)>& work) {
    for (int i = 0; i < size_; ++i) {
      Share& share = shares_[(own + i) % size_];
      for (;;) {
        const i64 from = share.next.fetch_add(grain_);
        if (from >= share.end) break;
        work(from, std::min(from + grain_, share.end));
      }
    }
  }

  void help(int own) {
    long seen = 0;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      seen = generation_at_start_;
    }
    for (;;) {
      const std::function<void(i64, i64)>* work = nullptr;
      look_for([&] { return stop_ || generation_ != seen; });
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
        if (stop_) return;
        seen = generation_;
        if (work_ == nullptr) continue;  // too late, and soon enough for the next one
        work = work_;
        ++busy_;
      }
      take(own, *work);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  void stop_all() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& helper : helpers_) helper.join();
    helpers_.clear();
    generation_at_start_ = generation_;
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> helpers_;
  const std::function<void(i64, i64)>* work_ = nullptr;
  std::vector<Share> shares_;
  i64 grain_ = 1;
  std::atomic<long> generation_{0};
  long generation_at_start_ = 0;
  std::atomic<int> busy_{0};
  std::atomic<int> size_{1};
  std::atomic<bool> stop_{false};
};

Pool* instance = nullptr;
std::once_flag made;

// Never destroyed: a thread joined while the process unloads its libraries can hang. A forked child has the memory of
// the pool but none of its threads, and maybe a lock that nobody will open: it gets a pool of its own, of one thread.
Pool& pool() {
  std::call_once(made, [] {
    instance = new Pool;
    ::pthread_atfork(nullptr, nullptr, [] { instance = new Pool; });
  });
  return *instance;
}

}  // namespace

void set_threads(int count) { pool().resize(count); }
int threads() { return pool().size(); }
void parallel(i64 begin, i64 end, i64 grain, const std::function<void(i64, i64)>& work) {
  pool().run(begin, end, grain, work);
}

}  // namespace qgnn
