#include <algorithm>
#include <atomic>
#include <cfenv>
#include <stdexcept>
#include <thread>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

#include "core/parallel.h"
#include "test.h"

using namespace tutelage;
using std::int64_t;

TEST(every_index_is_visited_once_in_contiguous_ranges) {
  for (int threads : {-1, 0, 1, 2, 3, 4, 9})
    for (int64_t n : {0, 1, 2, 3, 7, 100}) {
      std::vector<std::atomic<int>> visits(static_cast<std::size_t>(n));
      std::atomic<int> ranges{0};
      parallel_for(threads, n, [&](int64_t begin, int64_t end) {
        ++ranges;
        for (int64_t i = begin; i < end; ++i) ++visits[static_cast<std::size_t>(i)];
      });
      for (auto& v : visits) CHECK(v == 1, threads, n, v.load());
      CHECK(ranges == std::min<int64_t>(std::max(threads, 1), n), threads, n, ranges.load());
    }
}

TEST(every_task_runs_once) {
  for (int threads : {0, 1, 2, 4, 9})
    for (int64_t n : {0, 1, 3, 50}) {
      std::vector<std::atomic<int>> visits(static_cast<std::size_t>(n));
      parallel_tasks(threads, n, [&](int64_t task) { ++visits[static_cast<std::size_t>(task)]; });
      for (auto& v : visits) CHECK(v == 1, threads, n, v.load());
    }
}

TEST(a_nested_call_does_all_of_its_work) {
  std::vector<std::atomic<int>> visits(12);
  parallel_for(3, 3, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      parallel_tasks(4, 4, [&](int64_t task) { ++visits[static_cast<std::size_t>(i * 4 + task)]; });
  });
  for (auto& v : visits) CHECK(v == 1, v.load());
}

TEST(a_child_forked_after_shared_work_does_its_own) {
  auto sum_with = [](int threads) {
    std::atomic<int64_t> sum{0};
    parallel_for(threads, 100, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) sum += i;
    });
    parallel_tasks(threads, 100, [&](int64_t task) { sum += task; });
    return sum.load();
  };
  CHECK(sum_with(2) == 9900);  // now there is a team to lose
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // waiting for threads that are not there ends here
    _exit(sum_with(2) == 9900 ? 0 : 1);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, status);
  CHECK(sum_with(2) == 9900);  // the parent keeps its team
}

TEST(an_exception_reaches_the_caller_and_the_team_works_on) {
  for (int threads : {1, 2, 4}) {
    std::atomic<int> others{0};
    CHECK_THROWS(std::runtime_error, "task 3", parallel_tasks(threads, 8, [&](int64_t task) {
                   if (task == 3) throw std::runtime_error("task 3");
                   ++others;
                 }));
    CHECK(others <= 7, others.load());
    CHECK_THROWS(std::runtime_error, "range", parallel_for(threads, 8, [](int64_t, int64_t end) {
                   if (end == 8) throw std::runtime_error("range");
                 }));
    std::atomic<int64_t> sum{0};
    parallel_for(threads, 8, [&](int64_t begin, int64_t end) { sum += end - begin; });
    CHECK(sum == 8, sum.load());
  }
}

TEST(workers_see_the_default_floating_point_state_and_the_caller_keeps_its_own) {
  // volatile: the compiler must divide at run time
  volatile double one = 1, three = 3;
  const double nearest = one / three;
  std::fesetround(FE_UPWARD);
  const double upward = one / three;
  std::vector<double> seen(8);
  parallel_for(4, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) seen[static_cast<std::size_t>(i)] = one / three;
  });
  const double after = one / three;
  std::fesetround(FE_TONEAREST);
  CHECK(upward != nearest, "the control: this rounding mode shows");
  CHECK(after == upward, after);
  for (double v : seen) CHECK(v == nearest, v);
}

TEST(several_callers_at_once_each_get_their_own_work_done) {
  std::vector<int64_t> sums(3, 0);
  std::vector<std::thread> callers;
  for (std::size_t c = 0; c < sums.size(); ++c)
    callers.emplace_back([&, c] {
      for (int round = 0; round < 50; ++round) {
        std::atomic<int64_t> sum{0};
        parallel_tasks(2, 10, [&](int64_t task) { sum += task; });
        sums[c] += sum;
      }
    });
  for (std::thread& caller : callers) caller.join();
  for (int64_t sum : sums) CHECK(sum == 50 * 45, sum);
}
