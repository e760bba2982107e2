// A fiber: a stack of its own, left and entered again. In a few instructions on x86-64, where
// ucontext's way (used elsewhere) asks the kernel for a signal mask each time, ten times as slow.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) && defined(__linux__)
// Push what a callee must keep, note the stack in *left, take up the other stack.
extern "C" void megalite_switch_stack(void** left, void* entered);
asm(R"(
    .text
    .weak megalite_switch_stack
    .hidden megalite_switch_stack
    .type megalite_switch_stack, @function
megalite_switch_stack:
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
    ret
)");
#define MEGALITE_OWN_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace emulator {

constexpr size_t STACK = size_t(256) << 10;

// Whoever starts fibers and is gone back to when they leave: one for all of them.
class Home {
public:
#if MEGALITE_OWN_SWITCH
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
#if defined(__SANITIZE_ADDRESS__)
    const void* stack = nullptr;
    size_t stack_size = 0;
    void* fake = nullptr;
#endif
};
inline Home home;

class Stack {
public:
    // Ready to run `entry`, which never returns.
    void start(void (*entry)()) {
#if MEGALITE_OWN_SWITCH
        uintptr_t top = reinterpret_cast<uintptr_t>(memory_.get() + STACK) & ~uintptr_t(15);
        void** at = reinterpret_cast<void**>(top) - 2;  // as if `entry` had been called
        *at = reinterpret_cast<void*>(entry);
        stack_pointer_ = at - 6;  // registers, of any value
#else
        getcontext(&context_);
        context_.uc_stack.ss_sp = memory_.get();
        context_.uc_stack.ss_size = STACK;
        context_.uc_link = nullptr;
        makecontext(&context_, entry, 0);
#endif
#if defined(__SANITIZE_ADDRESS__)
        fake_ = nullptr;
#endif
    }

    // From home, until the fiber leaves.
    void enter() {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(&home.fake, memory_.get(), STACK);
#endif
#if MEGALITE_OWN_SWITCH
        megalite_switch_stack(&home.stack_pointer, stack_pointer_);
#else
        swapcontext(&home.context, &context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(home.fake, nullptr, nullptr);
#endif
    }

    // What `entry` does first.
    void entered() {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fake_, &home.stack, &home.stack_size);
#endif
    }

    // From the fiber, home; for ever, if it has ended.
    void leave(bool ended) {
        (void)ended;
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(ended ? nullptr : &fake_, home.stack, home.stack_size);
#endif
#if MEGALITE_OWN_SWITCH
        megalite_switch_stack(&stack_pointer_, home.stack_pointer);
#else
        swapcontext(&context_, &home.context);
#endif
        entered();
    }

private:
    std::unique_ptr<char[]> memory_{new char[STACK]};
#if MEGALITE_OWN_SWITCH
    void* stack_pointer_ = nullptr;
#else
    ucontext_t context_;
#endif
#if defined(__SANITIZE_ADDRESS__)
    void* fake_ = nullptr;
#endif
};

}  // namespace emulator
