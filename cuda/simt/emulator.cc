// Compiled without ThreadSanitizer's instrumentation: what the emulator does on behalf of lanes is no access of theirs.
#include "cuda/simt/emulator.h"

#include <algorithm>
#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <tuple>
#include <utility>

#include <pthread.h>

#include "cuda/simt/fiber.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(TUTELAGE_SIMT_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* token);
void __tsan_release(void* token);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace simt {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(TUTELAGE_SIMT_TSAN)
constexpr std::size_t kStackBytes = 256 << 10;  // red zones make frames several times larger
#else
constexpr std::size_t kStackBytes = 64 << 10;
#endif
constexpr unsigned kBarriers = 16, kMaxThreads = 1024;
// A barrier's token is another one in the next generations: a thread that has gone on to the next barrier has released its
// later writes there, and a thread that is late to leave this one must not acquire them. No thread is ever a whole
// generation behind another that has left, so two would do for __syncthreads; arrive_block may run further ahead.
constexpr unsigned kTokens = 8;

// SplitMix64 (Steele, Lea & Flood 2014).
std::uint64_t next_random(std::uint64_t& state) {
  std::uint64_t z = state += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

bool same_place(const Place& x, const Place& y) {
  if (std::memcmp(&x, &y, sizeof x) == 0) return true;  // nearly always
  return x.line() == y.line() && x.column() == y.column() &&
         (x.file_name() == y.file_name() || std::strcmp(x.file_name(), y.file_name()) == 0);
}
std::string text(const Place& place) { return std::string(place.file_name()) + ":" + std::to_string(place.line()); }

// While it lives, what the C library's functions (malloc, memcpy) touch is not seen by ThreadSanitizer as the lane's access.
struct Unseen {
  Unseen() { begin(); }
  ~Unseen() { end(); }
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
  static void begin() {
#if defined(TUTELAGE_SIMT_TSAN)
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
  }
  static void end() {
#if defined(TUTELAGE_SIMT_TSAN)
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
  }
};

struct Context {  // of a fiber, or of the thread that launched
  StackPointer pointer = nullptr;
  const void* bottom = nullptr;
  std::size_t size = 0;
  void* tsan = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

struct Lane : Context {
  std::unique_ptr<Stack> stack;
  dim3 thread;
  unsigned index = 0;
  bool done = false;
  WarpOperation operation = nullptr;
  Place place;
  std::vector<PendingCopy> pending, landed;
  std::vector<std::size_t> groups;  // ends of the committed groups in `pending`
};

// The n-th execution of a line by a lane since the warp last met is taken to coincide with the n-th of the other lanes.
struct Site {
  Place place;
  Space space;
  std::size_t bytes;
  unsigned times[kWarp] = {};
  struct Simultaneous {
    std::uint32_t lanes = 0;
    std::uintptr_t address[kWarp];
  };
  std::vector<Simultaneous> accesses;
};

struct Warp {
  unsigned order[kWarp];
  unsigned cursor = 0, arrived = 0, done = 0;
  void* operands[kWarp];              // of the lanes that have arrived
  WarpOperation operation = nullptr;  // of the first of them
  Place place;
  bool diverged = false;    // another came with something else
  unsigned generation = 0;  // of __syncwarp
  int waiting = -1;         // at this barrier
  std::vector<Site> sites;
  char tokens[2] = {};
};

struct Barrier {
  unsigned expected = 0, arrived = 0, generation = 0;
  Place place;
  char tokens[kTokens] = {};
};

struct Excess {
  std::uint64_t conflicts = 0, sectors = 0;
};

struct Machine {
  Context launcher;
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  unsigned current = 0;  // lane
  dim3 grid, block, block_at;
  unsigned threads = 0;
  unsigned char* shared = nullptr;
  std::size_t shared_bytes = 0;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  Settings settings;
  std::uint64_t random = 0;
  Launch launch;
  std::map<std::string, Excess> excess;  // by place
  char start_token = 0, end_token = 0;   // two: a thread that starts late must not be after one that has ended
};

// No launch reaches beyond its thread; a launch within a launch is refused.
thread_local Machine* machine = nullptr;
thread_local Run* innermost = nullptr;

struct Lanes {  // fibers kept for the next launch of this thread
  std::vector<Lane> kept;
  ~Lanes() { forget(); }
  void forget() {
#if defined(TUTELAGE_SIMT_TSAN)
    for (Lane& lane : kept) __tsan_destroy_fiber(lane.tsan);
#endif
    kept.clear();
  }
};
thread_local Lanes lanes_of_thread;

void acquire([[maybe_unused]] char* token) {
#if defined(TUTELAGE_SIMT_TSAN)
  __tsan_acquire(token);
#endif
}
void release([[maybe_unused]] char* token) {
#if defined(TUTELAGE_SIMT_TSAN)
  __tsan_release(token);
#endif
}

void switch_context(Context& from, Context& to, bool for_good) {
  if (&from == &to) return;
  if (for_good) Unseen::end();
#if defined(TUTELAGE_SIMT_TSAN)
  __tsan_switch_to_fiber(to.tsan, 1);  // 1: a switch is no synchronisation
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.bottom, to.size);
#endif
  simt_switch(&from.pointer, to.pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

Lane& self() { return machine->lanes[machine->current]; }
Warp& own_warp() { return machine->warps[machine->current / kWarp]; }

void arrange(Warp& warp) {  // the order in which its lanes run to the next collective
  for (unsigned i = 0; i < kWarp; ++i) warp.order[i] = machine->settings.schedule == Schedule::reversed ? kWarp - 1 - i : i;
  if (machine->settings.schedule == Schedule::random)
    for (unsigned i = kWarp; i > 1; --i) std::swap(warp.order[i - 1], warp.order[next_random(machine->random) % i]);
  warp.cursor = 0;
}

std::uint64_t conflicts(const Site::Simultaneous& a, std::size_t bytes) {
  // Shared memory has 32 banks of 4 bytes. A warp's 8-byte accesses go by halves, its 16-byte ones by quarters; lanes on the
  // same word share it.
  const unsigned together = bytes == 16 ? 8 : bytes == 8 ? 16 : 32;
  std::uint64_t extra = 0;
  for (unsigned first = 0; first < kWarp; first += together) {
    std::vector<std::uintptr_t> words;
    for (unsigned i = first; i < first + together; ++i)
      for (std::size_t word = 0; (a.lanes >> i & 1) && word < std::max<std::size_t>(1, bytes / 4); ++word)
        words.push_back(a.address[i] / 4 + word);
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    std::uint64_t in_bank[32] = {}, most = 0;
    for (std::uintptr_t word : words) most = std::max(most, ++in_bank[word % 32]);
    extra += most > 1 ? most - 1 : 0;
  }
  return extra;
}

std::uint64_t excess_sectors(const Site::Simultaneous& a, std::size_t bytes) {
  std::vector<std::uintptr_t> addresses, sectors;
  for (unsigned i = 0; i < kWarp; ++i)
    if (a.lanes >> i & 1) addresses.push_back(a.address[i]);
  std::sort(addresses.begin(), addresses.end());
  addresses.erase(std::unique(addresses.begin(), addresses.end()), addresses.end());
  for (std::uintptr_t address : addresses) sectors.push_back(address / 32);
  sectors.erase(std::unique(sectors.begin(), sectors.end()), sectors.end());
  const std::size_t least = (addresses.size() * bytes + 31) / 32;
  return sectors.size() > least ? sectors.size() - least : 0;
}

void count_accesses(Warp& warp) {
  for (Site& site : warp.sites) {
    for (const Site::Simultaneous& a : site.accesses) {
      Excess& at = machine->excess[text(site.place)];
      if (site.space == Space::shared) {
        const std::uint64_t extra = conflicts(a, site.bytes);
        ++machine->launch.shared_accesses;
        machine->launch.bank_conflicts += extra, at.conflicts += extra;
      } else {
        const std::uint64_t extra = excess_sectors(a, site.bytes);
        ++machine->launch.global_accesses;
        machine->launch.excess_sectors += extra, at.sectors += extra;
      }
    }
    site.accesses.clear();
    std::fill_n(site.times, kWarp, 0u);
  }
}

std::string where(const Warp& warp) {
  const Lane* lanes = &machine->lanes[static_cast<std::size_t>(&warp - machine->warps.data()) * kWarp];
  for (unsigned i = 0; i < kWarp; ++i)
    if (!lanes[i].done) return text(lanes[i].place);
  return "the end of the kernel";
}

// Some lanes of the warp have come to a collective and the others have not and will not.
[[noreturn]] void fail_diverged(const Warp& warp) {
  const Lane* lanes = &machine->lanes[static_cast<std::size_t>(&warp - machine->warps.data()) * kWarp];
  const Lane *here = nullptr, *there = nullptr;
  for (unsigned i = 0; i < kWarp; ++i) {
    if (lanes[i].done)
      there = &lanes[i];
    else if (!here)
      here = &lanes[i];
    else if (!there && (!same_place(lanes[i].place, here->place) || lanes[i].operation != here->operation))
      there = &lanes[i];
  }
  fail(here->place, "divergent collective: thread %u is here, thread %u of the same warp %s%s", here->index, there->index,
       there->done ? "has left the kernel" : "at ", there->done ? "" : text(there->place).c_str());
}

// The next warp that can run, or none.
Warp* choose_warp() {
  Machine& m = *machine;
  std::vector<unsigned> ready;
  const unsigned count = static_cast<unsigned>(m.warps.size());
  for (unsigned i = 0; i < count; ++i)
    if (m.warps[i].done < kWarp && m.warps[i].waiting < 0) ready.push_back(i);
  if (ready.empty()) return nullptr;
  if (m.settings.schedule == Schedule::forward) return &m.warps[ready.front()];
  if (m.settings.schedule == Schedule::reversed) return &m.warps[ready.back()];
  return &m.warps[ready[next_random(m.random) % ready.size()]];
}

[[noreturn]] void fail_deadlocked(const Warp& waiting) {
  const Machine& m = *machine;
  const Barrier& barrier = m.barriers[waiting.waiting];
  std::string others = "another barrier";
  for (const Warp& warp : m.warps)
    if (warp.waiting != waiting.waiting) others = where(warp);
  fail(barrier.place, "deadlock: barrier %d waits for %u threads, %u have come; a warp that has not is at %s", waiting.waiting,
       barrier.expected, barrier.arrived, others.c_str());
}

// Leaves `lane` for the next one of `warp`; without a warp for the launcher.
void go_on(Machine& m, Lane& lane, Warp* warp) {
  if (warp) {
    m.current = static_cast<unsigned>(warp - m.warps.data()) * kWarp + warp->order[warp->cursor];
    return switch_context(lane, m.lanes[m.current], lane.done);
  }
  for (const Warp& other : m.warps)
    if (other.waiting >= 0) fail_deadlocked(other);
  switch_context(lane, m.launcher, lane.done);  // all lanes are done
}

// The current lane has arrived or is done, and is not the last: its warp's next lane runs.
void next_lane(Machine& m, Lane& lane, Warp& warp) {
  if (++warp.cursor < kWarp) return go_on(m, lane, &warp);
  if (warp.done < kWarp) fail_diverged(warp);
  if (m.settings.count) count_accesses(warp);
  go_on(m, lane, choose_warp());
}

void lane_entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  acquire(&machine->start_token);
  machine->body(machine->arguments);
  release(&machine->end_token);
  Unseen::begin();  // until it leaves for good
  Lane& lane = self();
  if (!lane.pending.empty()) fail(lane.place, "a thread left the kernel with a cp.async that it never waited for");
  lane.done = true;
  ++own_warp().done;
  next_lane(*machine, lane, own_warp());
  std::abort();  // a lane that is done is not switched to
}

struct BarrierRequest {
  unsigned barrier, threads;
  bool wait;
};

void barrier_operation(void* const* operands) {
  Machine& m = *machine;
  const BarrierRequest& request = *static_cast<const BarrierRequest*>(operands[0]);
  for (unsigned i = 1; i < kWarp; ++i) {
    const BarrierRequest& other = *static_cast<const BarrierRequest*>(operands[i]);
    if (other.barrier != request.barrier || other.threads != request.threads)
      fail(self().place, "divergent barrier: lanes of a warp name barriers %u of %u and %u of %u threads", request.barrier,
           request.threads, other.barrier, other.threads);
  }
  Barrier& barrier = m.barriers[request.barrier];
  if (barrier.arrived > 0 && barrier.expected != request.threads)
    fail(self().place, "barrier %u is waited for with %u threads here and %u at %s", request.barrier, request.threads,
         barrier.expected, text(barrier.place).c_str());
  barrier.expected = request.threads, barrier.place = self().place;
  barrier.arrived += kWarp;
  Warp& warp = own_warp();
  if (request.wait) warp.waiting = static_cast<int>(request.barrier);
  if (barrier.arrived < barrier.expected) return;
  barrier.arrived = 0;
  ++barrier.generation;
  for (Warp& other : m.warps)
    if (other.waiting == static_cast<int>(request.barrier)) other.waiting = -1;
}

void meet_at_barrier(unsigned id, unsigned threads, bool wait, Place place) {
  Machine& m = *machine;
  if (id >= kBarriers) fail(place, "barrier %u: there are %u", id, kBarriers);
  if (threads == 0) threads = m.threads;
  if (threads % kWarp != 0 || threads > m.threads)
    fail(place, "barrier %u of %u threads: a multiple of 32 up to the block's %u is expected", id, threads, m.threads);
  BarrierRequest request{id, threads, wait};
  char* token = &m.barriers[id].tokens[m.barriers[id].generation % kTokens];
  release(token);
  collective(barrier_operation, &request, place);
  if (wait) acquire(token);
}

void launcher_stack(Context& context) {
  pthread_attr_t attributes;
  if (pthread_getattr_np(pthread_self(), &attributes) != 0) return;
  void* bottom = nullptr;
  pthread_attr_getstack(&attributes, &bottom, &context.size);
  context.bottom = bottom;
  pthread_attr_destroy(&attributes);
}

void run_block() {
  Machine& m = *machine;
  std::memset(m.shared, 0xFF, m.shared_bytes);  // NaN as float and as bf16
  for (Barrier& barrier : m.barriers) barrier.expected = barrier.arrived = 0;
  for (Warp& warp : m.warps) {
    warp.arrived = warp.done = 0, warp.waiting = -1, warp.diverged = false;
    arrange(warp);
  }
  for (Lane& lane : m.lanes) {
    lane.done = false;
    lane.pending.clear(), lane.groups.clear();
#if defined(__SANITIZE_ADDRESS__)
    // a lane that is done has left its last frames, and their red zones, where they were
    __asan_unpoison_memory_region(static_cast<const char*>(lane.bottom) + lane.size - kStackBytes / 8, kStackBytes / 8);
#endif
    lane.pointer = make_fiber(*lane.stack, lane_entry, lane.index % 16 * 256);
    lane.place = m.launch.place;
  }
  release(&m.start_token);
  Warp* first = choose_warp();
  m.current = static_cast<unsigned>(first - m.warps.data()) * kWarp + first->order[0];
  switch_context(m.launcher, self(), false);
  acquire(&m.end_token);
}

void note_launch(const char* file, unsigned threads, std::size_t shared_bytes, const void* kernel) {
  static thread_local std::set<std::tuple<const void*, unsigned, std::size_t>> noted;
  if (!noted.emplace(kernel, threads, shared_bytes).second) return;
  std::FILE* out = std::fopen(file, "a");
  if (!out) return;
  const auto here = reinterpret_cast<std::intptr_t>(&run_launch);
  std::fprintf(out, "%td %u %zu\n", static_cast<std::ptrdiff_t>(reinterpret_cast<std::intptr_t>(kernel) - here), threads,
               shared_bytes);
  std::fclose(out);
}

}  // namespace

Run::Run(const Settings& settings_) : settings(settings_), outer_(innermost) { innermost = this; }
Run::~Run() { innermost = outer_; }

void forget_fibers() { lanes_of_thread.forget(); }

void fail(Place place, const char* format, ...) {
  std::fflush(stdout);
  std::fprintf(stderr, "simt: ");
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n  at %s:%u\n", place.file_name(), static_cast<unsigned>(place.line()));
  if (machine) {
    const dim3 &b = machine->block_at, &t = self().thread;
    std::fprintf(stderr, "  block (%u, %u, %u), thread (%u, %u, %u)\n", b.x, b.y, b.z, t.x, t.y, t.z);
  }
  std::abort();
}

void collective(WarpOperation operation, void* operand, Place place) {
  const Unseen unseen;
  Machine& m = *machine;
  Lane& lane = m.lanes[m.current];
  Warp& warp = m.warps[m.current / kWarp];
  lane.operation = operation, lane.place = place;
  warp.operands[m.current % kWarp] = operand;
  if (warp.arrived == 0)
    warp.operation = operation, warp.place = place;
  else if (warp.operation != operation || !same_place(warp.place, place))
    warp.diverged = true;
  if (++warp.arrived < kWarp) return next_lane(m, lane, warp);
  if (warp.diverged) fail_diverged(warp);
  warp.arrived = 0;
  if (m.settings.count) count_accesses(warp);
  operation(warp.operands);
  arrange(warp);
  const bool change =
      operation == barrier_operation || (m.settings.schedule == Schedule::random && next_random(m.random) % 4 == 0);
  go_on(m, lane, change ? choose_warp() : &warp);
}

void sync_block(unsigned barrier, unsigned threads, Place place) { meet_at_barrier(barrier, threads, true, place); }
void arrive_block(unsigned barrier, unsigned threads, Place place) { meet_at_barrier(barrier, threads, false, place); }

void sync_warp(Place place) {
  Warp& warp = own_warp();
  char* token = &warp.tokens[warp.generation & 1];
  release(token);
  collective([](void* const*) { ++own_warp().generation; }, nullptr, place);
  acquire(token);
}

void access(Space space, Access kind, const void* address, std::size_t bytes, Place place) {
  if (!machine) return;  // a device function called from a test's host code
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  const char* verb = kind == Access::load ? "load" : "store";
  if (at % bytes != 0) fail(place, "misaligned %s of %zu bytes: the address is %zu beyond a multiple", verb, bytes, at % bytes);
  const auto begin = reinterpret_cast<std::uintptr_t>(machine->shared), end = begin + machine->shared_bytes;
  const bool in_shared = at >= begin && at + bytes <= end;
  if (space == Space::shared && !in_shared)
    fail(place, "%s of %zu bytes out of the bounds of shared memory: at byte %td of %zu", verb, bytes,
         static_cast<std::ptrdiff_t>(at - begin), machine->shared_bytes);
  if (space == Space::global && in_shared) fail(place, "%s of global memory at an address in shared memory", verb);
  if (!machine->settings.count) return;
  const Unseen unseen;
  const unsigned lane = machine->current % kWarp;
  Warp& warp = own_warp();
  auto site = std::find_if(warp.sites.begin(), warp.sites.end(),
                           [&](const Site& s) { return s.space == space && s.bytes == bytes && same_place(s.place, place); });
  if (site == warp.sites.end()) site = warp.sites.insert(site, Site{place, space, bytes, {}, {}});
  const unsigned time = site->times[lane]++;
  if (time >= site->accesses.size()) site->accesses.emplace_back();
  site->accesses[time].lanes |= 1u << lane;
  site->accesses[time].address[lane] = at;
}

void async_copy(const PendingCopy& copy, Place place) {
  const Unseen unseen;
  self().place = place;
  self().pending.push_back(copy);
}
void async_commit() {
  const Unseen unseen;
  self().groups.push_back(self().pending.size());
}
const std::vector<PendingCopy>& async_landed(unsigned groups) {
  const Unseen unseen;
  Lane& lane = self();
  lane.landed.clear();
  if (lane.groups.size() <= groups) return lane.landed;
  const std::size_t done = lane.groups.size() - groups, end = lane.groups[done - 1];
  lane.landed.assign(lane.pending.begin(), lane.pending.begin() + static_cast<std::ptrdiff_t>(end));
  lane.pending.erase(lane.pending.begin(), lane.pending.begin() + static_cast<std::ptrdiff_t>(end));
  lane.groups.erase(lane.groups.begin(), lane.groups.begin() + static_cast<std::ptrdiff_t>(done));
  for (std::size_t& group : lane.groups) group -= end;
  return lane.landed;
}

const dim3& thread_index() { return self().thread; }
const dim3& block_index() { return machine->block_at; }
const dim3& block_size() { return machine->block; }
const dim3& grid_size() { return machine->grid; }
unsigned lane_index() { return machine->current % kWarp; }
unsigned char* shared_memory() { return machine->shared; }

void run_launch(dim3 grid, dim3 block, std::size_t shared_bytes, void (*body)(void*), void* arguments, const void* kernel,
                Place place) {
  const Unseen unseen;
  if (machine) fail(place, "a launch within a kernel");
  const std::uint64_t blocks = std::uint64_t(grid.x) * grid.y * grid.z, threads = std::uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || threads % kWarp != 0)
    fail(place, "a block of %" PRIu64 " threads: 32 to %u in whole warps are expected", threads, kMaxThreads);
  if (grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535)
    fail(place, "a grid of %u x %u x %u blocks: at most 2147483647 x 65535 x 65535", grid.x, grid.y, grid.z);
  if (shared_bytes > kMaxSharedBytes) fail(place, "%zu bytes of shared memory: at most %zu", shared_bytes, kMaxSharedBytes);
  if (blocks == 0) return;
  if (const char* file = std::getenv("TUTELAGE_SIMT_LAUNCHES"))
    note_launch(file, static_cast<unsigned>(threads), shared_bytes, kernel);

  Machine m;
  machine = &m;
  m.settings = innermost ? innermost->settings : Settings{};
  m.random = m.settings.seed;
  m.grid = grid, m.block = block, m.threads = static_cast<unsigned>(threads);
  m.body = body, m.arguments = arguments;
  m.shared_bytes = shared_bytes;
  m.launch.place = place, m.launch.grid = grid, m.launch.block = block, m.launch.shared_bytes = shared_bytes;
  void* shared = nullptr;  // exactly as much as was asked for, so that AddressSanitizer's red zone begins right behind it
  if (posix_memalign(&shared, 128, std::max<std::size_t>(1, shared_bytes)) != 0) throw std::bad_alloc();
  m.shared = static_cast<unsigned char*>(shared);
  launcher_stack(m.launcher);
#if defined(TUTELAGE_SIMT_TSAN)
  m.launcher.tsan = __tsan_get_current_fiber();
#endif
  m.lanes = std::move(lanes_of_thread.kept);
  std::vector<Lane> spare;
  while (m.lanes.size() > threads) {
    spare.push_back(std::move(m.lanes.back()));
    m.lanes.pop_back();
  }
  while (m.lanes.size() < threads) {
    Lane& lane = m.lanes.emplace_back();
    lane.stack = std::make_unique<Stack>(kStackBytes);
    lane.bottom = lane.stack->bottom(), lane.size = lane.stack->size();
#if defined(TUTELAGE_SIMT_TSAN)
    lane.tsan = __tsan_create_fiber(0);
#endif
  }
  for (unsigned i = 0; i < m.threads; ++i) {
    m.lanes[i].index = i;
    m.lanes[i].thread = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
  }
  m.warps.resize(m.threads / kWarp);

  std::vector<std::uint64_t> order(blocks);
  for (std::uint64_t i = 0; i < blocks; ++i) order[i] = m.settings.schedule == Schedule::reversed ? blocks - 1 - i : i;
  if (m.settings.schedule == Schedule::random)
    for (std::uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[next_random(m.random) % i]);
  for (std::uint64_t b : order) {
    m.block_at = dim3(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                      static_cast<unsigned>(b / (std::uint64_t(grid.x) * grid.y)));
    run_block();
  }

  for (Lane& lane : spare) m.lanes.push_back(std::move(lane));
  lanes_of_thread.kept = std::move(m.lanes);
  std::free(shared);
  machine = nullptr;
  if (innermost) {
    Excess worst;
    for (const auto& [at, excess] : m.excess) {
      if (excess.conflicts > worst.conflicts) worst.conflicts = excess.conflicts, m.launch.worst_bank_conflict = at;
      if (excess.sectors > worst.sectors) worst.sectors = excess.sectors, m.launch.worst_excess = at;
    }
    innermost->launches.push_back(std::move(m.launch));
  }
}

}  // namespace simt
