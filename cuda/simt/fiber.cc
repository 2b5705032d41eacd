#include "cuda/simt/fiber.h"

#include <cstdint>
#include <new>
#include <utility>

#include <sys/mman.h>
#include <unistd.h>

namespace simt {

Stack::Stack(std::size_t bytes) {
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  size_ = (bytes + page - 1) / page * page;
  mapping_ = mmap(nullptr, size_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping_ == MAP_FAILED || mprotect(mapping_, page, PROT_NONE) != 0) throw std::bad_alloc();
  bottom_ = static_cast<char*>(mapping_) + page;
}

Stack::~Stack() {
  if (mapping_) munmap(mapping_, size_ + static_cast<std::size_t>(static_cast<char*>(bottom_) - static_cast<char*>(mapping_)));
}

Stack::Stack(Stack&& other) noexcept
    : mapping_(std::exchange(other.mapping_, nullptr)), bottom_(other.bottom_), size_(other.size_) {}

// What simt_switch takes off a stack: the callee-saved registers of the platform's calling convention, then where to go on.
// The floating-point control words are the same in every fiber and stay. It leaves by a jump: a return would be predicted to go
// where this stack's caller is, and never does.
#if defined(__x86_64__)
constexpr std::size_t kSaved = 6;  // rbp rbx r12 r13 r14 r15
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
.align 16
simt_switch:
  .cfi_startproc

  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
  .cfi_endproc
.size simt_switch, .-simt_switch
)");

StackPointer make_fiber(const Stack& stack, void (*entry)(), std::size_t offset) {
  // On entry to a function rsp + 8 is a multiple of 16; above it a return address of 0 ends every backtrace.
  void** top = reinterpret_cast<void**>(static_cast<char*>(stack.bottom()) + stack.size() - offset) - 1;
  *top = nullptr;
  void** saved = top - 1 - kSaved;
  for (std::size_t i = 0; i < kSaved; ++i) saved[i] = nullptr;
  saved[kSaved] = reinterpret_cast<void*>(entry);
  return saved;
}
#elif defined(__aarch64__)
constexpr std::size_t kSaved = 20;  // x19 … x30, d8 … d15
asm(R"(
.text
.globl simt_switch
.type simt_switch, %function
.align 4
simt_switch:
  .cfi_startproc
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  br x30
  .cfi_endproc
.size simt_switch, .-simt_switch
)");

StackPointer make_fiber(const Stack& stack, void (*entry)(), std::size_t offset) {
  void** saved = reinterpret_cast<void**>(static_cast<char*>(stack.bottom()) + stack.size() - offset) - kSaved;
  for (std::size_t i = 0; i < kSaved; ++i) saved[i] = nullptr;
  saved[11] = reinterpret_cast<void*>(entry);  // x30, the link register
  return saved;
}
#else
#error "simt: no context switch for this processor (x86-64 and aarch64 are written)"
#endif

}  // namespace simt
