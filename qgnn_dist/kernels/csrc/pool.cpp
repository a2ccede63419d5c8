// SPDX-License-Identifier: Apache-2.0
#include "pool.h"

#include <pthread.h>

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
  int size() const { return size_; }

  void resize(int count) {
    std::lock_guard<std::mutex> turn(turn_);
    stop_all();
    size_ = std::max(count, 1);
    stop_ = false;
    for (int i = 1; i < size_; ++i) helpers_.emplace_back([this] { help(); });
  }

  void run(i64 begin, i64 end, i64 grain, const std::function<void(i64, i64)>& work) {
    if (end <= begin) return;
    if (size_ == 1 || end - begin <= grain) return work(begin, end);
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
  std::atomic<i64> next_{0};
  i64 end_ = 0, grain_ = 1;
  long generation_ = 0, generation_at_start_ = 0;
  int busy_ = 0;
  std::atomic<int> size_{1};
  bool stop_ = false;
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
