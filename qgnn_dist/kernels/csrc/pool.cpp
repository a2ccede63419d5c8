// SPDX-License-Identifier: Apache-2.0
#include "pool.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace qgnn {
namespace {

class Pool {
 public:
  ~Pool() { resize(1); }

  int size() const { return size_; }

  void resize(int count) {
    std::lock_guard<std::mutex> turn(turn_);
    stop_all();
    size_ = std::max(count, 1);
    stop_ = false;
    owner_ = ::getpid();
    for (int i = 1; i < size_; ++i) helpers_.emplace_back([this] { help(); });
  }

  void run(i64 begin, i64 end, i64 grain, const std::function<void(i64, i64)>& work) {
    if (end <= begin) return;
    // A forked child has the pool's memory but none of its threads.
    if (size_ == 1 || end - begin <= grain || ::getpid() != owner_) return work(begin, end);
    std::lock_guard<std::mutex> turn(turn_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      next_ = begin;
      end_ = end;
      grain_ = grain;
      work_ = &work;
      busy_ = static_cast<int>(helpers_.size());
      ++generation_;
    }
    wake_.notify_all();
    take(work);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    work_ = nullptr;
  }

 private:
  void take(const std::function<void(i64, i64)>& work) {
    for (;;) {
      const i64 from = next_.fetch_add(grain_);
      if (from >= end_) return;
      work(from, std::min(from + grain_, end_));
    }
  }

  void help() {
    long seen = 0;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      seen = generation_at_start_;
    }
    for (;;) {
      const std::function<void(i64, i64)>* work = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
        if (stop_) return;
        seen = generation_;
        work = work_;
      }
      take(*work);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  void stop_all() {
    if (::getpid() == owner_) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
      }
      wake_.notify_all();
      for (auto& helper : helpers_) helper.join();
    } else {
      for (auto& helper : helpers_) helper.detach();
    }
    helpers_.clear();
    generation_at_start_ = generation_;
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> helpers_;
  const std::function<void(i64, i64)>* work_ = nullptr;
  std::atomic<i64> next_{0};
  i64 end_ = 0, grain_ = 1;
  long generation_ = 0, generation_at_start_ = 0;
  int busy_ = 0;
  std::atomic<int> size_{1};
  bool stop_ = false;
  pid_t owner_ = 0;
};

Pool& pool() {
  // Never destroyed: a thread joined while the process unloads its libraries can hang.
  static Pool* instance = new Pool;
  return *instance;
}

}  // namespace

void set_threads(int count) { pool().resize(count); }
int threads() { return pool().size(); }
void parallel(i64 begin, i64 end, i64 grain, const std::function<void(i64, i64)>& work) {
  pool().run(begin, end, grain, work);
}

}  // namespace qgnn
