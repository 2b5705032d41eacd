#include "core/parallel.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <exception>
#include <mutex>
#include <vector>

#if defined(TUTELAGE_THREAD_POOL)
#include <condition_variable>
#include <thread>
#else
#include <omp.h>
#endif

#include <pthread.h>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace tutelage::detail {
namespace {

// Denormals flushed or another rounding mode (both can be set by other libraries in a worker) would change bits.
class DefaultFloatState {
 public:
#if defined(__SSE__)
  DefaultFloatState() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }  // reset value: all masked, nearest, no FTZ/DAZ
  ~DefaultFloatState() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  DefaultFloatState() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatState() { std::fesetenv(&saved_); }

 private:
  std::fenv_t saved_;
#endif
 public:
  DefaultFloatState(const DefaultFloatState&) = delete;
  DefaultFloatState& operator=(const DefaultFloatState&) = delete;
};

// A team's threads do not survive fork: a child that called them would wait for ever. It works alone instead, with the same
// bits.
std::atomic<bool> team_lost_to_fork{false};
void watch_for_forks() {
  static const int once = pthread_atfork(nullptr, nullptr, [] { team_lost_to_fork = true; });
  (void)once;
}

#if defined(TUTELAGE_THREAD_POOL)

class Pool {
 public:
  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  // Runs job(context, worker) for worker in [0, workers); the caller is worker 0. One team at a time.
  void run(int workers, void (*job)(void*, int), void* context) {
    std::lock_guard one_team(team_);
    {
      std::lock_guard lock(mutex_);
      while (static_cast<int>(threads_.size()) < workers - 1) {
        int worker = static_cast<int>(threads_.size()) + 1;
        threads_.emplace_back([this, worker, seen = generation_] { loop(worker, seen); });
      }
      job_ = job;
      context_ = context;
      workers_ = workers;
      pending_ = workers - 1;
      ++generation_;
    }
    wake_.notify_all();
    job(context, 0);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
  }

 private:
  void loop(int worker, std::uint64_t seen) {
    for (;;) {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
      if (stop_) return;
      seen = generation_;
      if (worker >= workers_) continue;
      auto job = job_;
      void* context = context_;
      lock.unlock();
      job(context, worker);
      lock.lock();
      if (--pending_ == 0) done_.notify_one();
    }
  }
  std::mutex team_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  void (*job_)(void*, int) = nullptr;
  void* context_ = nullptr;
  int workers_ = 0, pending_ = 0;
  std::uint64_t generation_ = 0;
  bool stop_ = false;
};

// A nested call runs on the calling worker alone, as OpenMP does by default.
thread_local bool inside_team = false;

void run_team(int workers, void (*job)(void*, int), void* context) {
  if (inside_team || workers == 1 || team_lost_to_fork) {
    for (int w = 0; w < workers; ++w) job(context, w);
    return;
  }
  watch_for_forks();
  static Pool pool;
  struct Wrapped {
    void (*job)(void*, int);
    void* context;
  } wrapped{job, context};
  pool.run(
      workers,
      [](void* c, int w) {
        auto* inner = static_cast<Wrapped*>(c);
        inside_team = true;
        inner->job(inner->context, w);
        inside_team = false;
      },
      &wrapped);
}

#else

void run_team(int workers, void (*job)(void*, int), void* context) {
  if (workers == 1 || team_lost_to_fork) {
    for (int w = 0; w < workers; ++w) job(context, w);
    return;
  }
  watch_for_forks();
#pragma omp parallel num_threads(workers)
  // The runtime may give fewer threads than asked for; every worker's share is still done.
  for (int w = omp_get_thread_num(); w < workers; w += omp_get_num_threads()) job(context, w);
}

#endif

struct Team {
  int workers;
  std::int64_t n;
  RangeFunction function;
  void* context;
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::exception_ptr error;

  void guarded(std::int64_t begin, std::int64_t end) noexcept {
    try {
      DefaultFloatState state;
      function(context, begin, end);
    } catch (...) {
      failed = true;
      std::lock_guard lock(mutex);
      if (!error) error = std::current_exception();
    }
  }
  void rethrow() {
    if (error) std::rethrow_exception(error);
  }
};

}  // namespace

void run_ranges(int threads, std::int64_t n, RangeFunction function, void* context) {
  if (n <= 0) return;
  const int workers = static_cast<int>(std::clamp<std::int64_t>(threads, 1, n));
  Team team{workers, n, function, context, {}, {}, {}, {}};
  run_team(
      workers,
      [](void* c, int w) {
        auto* t = static_cast<Team*>(c);
        t->guarded(t->n * w / t->workers, t->n * (w + 1) / t->workers);
      },
      &team);
  team.rethrow();
}

void run_tasks(int threads, std::int64_t n, RangeFunction function, void* context) {
  if (n <= 0) return;
  const int workers = static_cast<int>(std::clamp<std::int64_t>(threads, 1, n));
  Team team{workers, n, function, context, {}, {}, {}, {}};
  run_team(
      workers,
      [](void* c, int) {
        auto* t = static_cast<Team*>(c);
        for (std::int64_t task; !t->failed && (task = t->next.fetch_add(1)) < t->n;) t->guarded(task, task + 1);
      },
      &team);
  team.rethrow();
}

}  // namespace tutelage::detail
