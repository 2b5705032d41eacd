// Fibers: several stacks, one processor. The switch saves what a called function must keep and nothing else: about 2 ns, where
// swapcontext makes a system call for the signal mask.
//
// Test: tests/simt/test_fiber.cc.
#pragma once

#include <cstddef>

namespace simt {

// A stack with a guard page below it, so that running over its end is a segmentation fault and no silent damage.
class Stack {
 public:
  explicit Stack(std::size_t bytes);
  ~Stack();
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  Stack(Stack&& other) noexcept;
  Stack& operator=(Stack&&) = delete;
  void* bottom() const { return bottom_; }
  std::size_t size() const { return size_; }

 private:
  void* mapping_ = nullptr;
  void* bottom_ = nullptr;
  std::size_t size_ = 0;
};

// The stack pointer of a fiber that is not running; everything else it keeps lies on its stack.
using StackPointer = void*;

// A fiber that starts in `entry` (which never returns) when it is first switched to, `offset` bytes (a multiple of 16) below
// the stack's end: stacks lie whole pages apart, and if all began at the same place of a page they would share a few sets of
// the first-level cache.
StackPointer make_fiber(const Stack& stack, void (*entry)(), std::size_t offset = 0);

// Leaves the running fiber, whose stack pointer goes to *from, and goes on in `to`.
extern "C" void simt_switch(StackPointer* from, StackPointer to);

}  // namespace simt
