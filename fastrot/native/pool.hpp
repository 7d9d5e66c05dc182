// Threads that work batch by batch, picture by picture: a batch that waits is begun while the one before ends.

#pragma once

#include <stdint.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace fastrot {

// A batch. `Worker` is what a thread keeps from picture to picture.
template <typename Worker>
struct Batch {
  explicit Batch(int64_t pictures) : pictures(pictures) {}
  virtual ~Batch() = default;
  virtual void one(Worker& worker, int64_t picture) = 0;

  const int64_t pictures;
  int64_t begun = 0, done = 0;  // under the pool's lock
};

template <typename Worker>
class Pool {
 public:
  // As many threads as the system gives, up to `threads`; with none, whoever waits does the work.
  explicit Pool(int threads) {
    try {
      threads_.reserve(size_t(std::max(threads, 0)));
      for (int i = 0; i < threads; ++i) threads_.emplace_back(&Pool::work, this);
    } catch (const std::exception&) {
    }
  }

  // Pictures under way are finished, the others left.
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ended_ = true;
    }
    more_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  // The pool owns the batch; the pointer is good until `wait` returns.
  Batch<Worker>* submit(std::unique_ptr<Batch<Worker>> batch) {
    Batch<Worker>* mine = batch.get();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      batches_.push_back(std::move(batch));
    }
    more_.notify_all();
    return mine;
  }

  void wait(Batch<Worker>* batch) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (threads_.empty() && batch->done < batch->pictures) work_on(unfinished(), own_, lock);
    finished_.wait(lock, [&] { return batch->done == batch->pictures; });
    for (auto each = batches_.begin(); each != batches_.end(); ++each)
      if (each->get() == batch) {
        batches_.erase(each);
        break;
      }
  }

 private:
  void work() {
    Worker worker;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      Batch<Worker>* batch = nullptr;
      more_.wait(lock, [&] { return ended_ || (batch = unfinished()); });
      if (ended_) return;
      work_on(batch, worker, lock);
    }
  }

  void work_on(Batch<Worker>* batch, Worker& worker, std::unique_lock<std::mutex>& lock) {
    const int64_t picture = batch->begun++;
    lock.unlock();
    batch->one(worker, picture);
    lock.lock();
    if (++batch->done == batch->pictures) finished_.notify_all();
  }

  // The oldest batch with a picture that nobody has begun.
  Batch<Worker>* unfinished() {
    for (auto& batch : batches_)
      if (batch->begun < batch->pictures) return batch.get();
    return nullptr;
  }

  std::mutex mutex_;
  std::condition_variable more_, finished_;
  std::deque<std::unique_ptr<Batch<Worker>>> batches_;  // oldest first
  bool ended_ = false;
  Worker own_;  // of whoever waits, where there are no threads
  std::vector<std::thread> threads_;  // last: they end before what they use does
};

}  // namespace fastrot
