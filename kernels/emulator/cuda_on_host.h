// CUDA's words for g++: a kernel runs on the CPU, one fiber for each of its threads.
//
// Fibers switch only where they wait for each other: at a block's barrier or a row's, and at a
// shuffle, which waits for its warp. Between those a fiber runs alone, so who runs first is ours to choose, and we
// choose as badly as CUDA allows: one warp, or row, runs as far ahead as its barriers let it while
// others have not moved (EMULATOR_ORDER: forward, the lowest warp ahead; backward, the highest; a
// number, a random one at each barrier). A missing barrier then shows as a wrong result. A copy into
// shared memory comes as late as the thread's waiting allows; backward, at once.
//
// Also found: threads that wait at different barriers, a barrier or a shuffle that some thread of
// the block or the warp never reaches, a mask that leaves out lanes. Shared memory starts as NaN
// and has poisoned borders, which AddressSanitizer reports; misaligned accesses are
// UndefinedBehaviorSanitizer's.
//
// Not emulated: clusters, copies by the bulk engine, atomics between blocks that run at the same time
// (blocks run one after the other, in a chosen order too), and the memory model's weak ordering.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "fiber.h"

// -- CUDA's types ------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 { unsigned x, y, z; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };

struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };

inline float __uint_as_float(uint32_t word) {
    float out;
    std::memcpy(&out, &word, 4);
    return out;
}
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {  // to nearest, ties to even
    uint32_t word;
    std::memcpy(&word, &x, 4);
    if (x != x) return {0x7fff};
    return {uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16)};
}
inline float __half2float(__half x) {
    _Float16 narrow;
    std::memcpy(&narrow, &x.bits, 2);
    return float(narrow);
}
inline __half __float2half_rn(float x) {
    _Float16 narrow = _Float16(x);
    __half out;
    std::memcpy(&out.bits, &narrow, 2);
    return out;
}

template <class T> T __ldcs(const T* at) { return *at; }
template <class T> T __ldg(const T* at) { return *at; }
template <class T> void __stcs(T* at, T x) { *at = x; }
inline float __fadd_rn(float a, float b) { return a + b; }  // never part of an fma
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::max;
using std::min;

// -- fibers ------------------------------------------------------------------------------------

namespace emulator {

inline float without_subnormal(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? 0.0f : x; }

constexpr int WARP = 32;
constexpr size_t SHARED_BYTES = size_t(227) << 10;
constexpr size_t BORDER = 64;  // bytes of poison after each shared array

enum class State { ready, at_shuffle, at_row_barrier, at_barrier, done };

struct Copy { void* to; const void* from; };
using Copies = std::vector<Copy>;

struct Fiber {
    Stack stack;
    uint3 thread{};
    State state = State::done;
    int place = 0;        // the line at which it waits
    size_t shared = 0;    // bytes of shared memory declared so far
    unsigned char slot[2][16];  // what it gives to a shuffle, two in turn
    int turn = 0;
    Copies asked;             // not yet of a group
    std::deque<Copies> sent;  // groups that have not been waited for
};

struct Block {
    std::vector<Fiber> fibers;
    int count = 0, current = -1;
    dim3 grid, size;
    int launched_shared = 0;
    bool copies_come_early = false;
    uint3 index{};
    std::function<void()> body;
    std::unique_ptr<char[]> shared{new char[SHARED_BYTES]};
    std::string error;
};
inline Block block;
inline Fiber& me() { return block.fibers[block.current]; }

// To the scheduler; comes back when this fiber is chosen again.
inline void leave(State state, int place) {
    me().state = state;
    me().place = place;
    me().stack.leave(state == State::done);
}

inline void run_body() {
    block.body();
    const auto none = [](const Copies& group) { return group.empty(); };
    if (!me().asked.empty() || !std::all_of(me().sent.begin(), me().sent.end(), none))
        block.error = "a thread has ended before copies that it asked for have come";
}

inline void entry() {
    me().stack.entered();
    run_body();
    leave(State::done, 0);
}

inline void resume(int number) {
    block.current = number;
    block.fibers[number].stack.enter();
}

// Fibers from..to wait in `state`, all of them at one place: let them go on. False with an error
// if some of them cannot come there any more.
inline bool release(int from, int to, State state, const char* what) {
    int place = 0;
    bool ended = false;
    if (state == State::at_shuffle && to - from < WARP)
        block.error = "a shuffle in a warp of less than 32 threads";
    if (!block.error.empty()) return false;
    for (int i = from; i < to; i++) {
        const Fiber& fiber = block.fibers[i];
        if (fiber.state == State::done) {
            ended = true;
            continue;
        }
        if (fiber.state != state || (place != 0 && fiber.place != place)) {
            block.error = std::string("threads wait at different lines, one at the ") + what +
                          " of line " + std::to_string(place ? place : fiber.place) +
                          ", one at line " + std::to_string(fiber.place);
            return false;
        }
        place = fiber.place;
    }
    if (ended && place != 0) {
        block.error = std::string("a thread has ended while others wait at the ") + what +
                      " of line " + std::to_string(place);
        return false;
    }
    for (int i = from; i < to; i++)
        if (block.fibers[i].state == state) block.fibers[i].state = State::ready;
    return true;
}

class Order {
public:
    Order() {
        const char* asked = std::getenv("EMULATOR_ORDER");
        const std::string name = asked ? asked : "forward";
        backward_ = name == "backward";
        random_ = name != "forward" && !backward_;
        if (random_) engine_.seed(unsigned(std::strtoul(name.c_str(), nullptr, 10)));
    }
    bool backward() const { return backward_; }
    std::vector<int> of(int count) {
        std::vector<int> order(count);
        std::iota(order.begin(), order.end(), 0);
        if (backward_) std::reverse(order.begin(), order.end());
        if (random_) std::shuffle(order.begin(), order.end(), engine_);
        return order;
    }

private:
    bool backward_, random_;
    std::mt19937 engine_;
};

// Run one warp until all of its threads wait at the block's barrier or have ended.
inline bool run_warp(int from, int to, const std::vector<int>& lanes) {
    for (;;) {
        for (int lane : lanes)
            if (from + lane < to && block.fibers[from + lane].state == State::ready)
                resume(from + lane);
        const auto state_of = [&](State state) {
            return std::any_of(block.fibers.begin() + from, block.fibers.begin() + to,
                               [&](const Fiber& f) { return f.state == state; });
        };
        if (!state_of(State::at_shuffle)) return true;
        if (!release(from, to, State::at_shuffle, "shuffle")) return false;
    }
}

// Let one row, of those that wait at a barrier of their own, go on: before any other does. Whether
// there was one.
inline bool release_a_row(Order& order) {
    const int wide = int(block.size.x);
    for (int row : order.of(block.count / wide)) {
        const auto begin = block.fibers.begin() + row * wide;
        const auto waits = [](const Fiber& f) { return f.state == State::at_row_barrier; };
        if (std::any_of(begin, begin + wide, waits)) {
            release(row * wide, (row + 1) * wide, State::at_row_barrier, "row's barrier");
            return true;
        }
    }
    return false;
}

inline bool run_block(Order& order) {
    const int n = block.count, warps = (n + WARP - 1) / WARP;
    std::memset(block.shared.get(), 0xff, SHARED_BYTES);  // NaN, as float32, bf16 and fp16
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(block.shared.get(), SHARED_BYTES);
#endif
    for (int i = 0; i < n; i++) {
        Fiber& fiber = block.fibers[i];
        const unsigned x = block.size.x, y = block.size.y;
        fiber.thread = {i % x, i / x % y, i / (x * y)};
        fiber.state = State::ready;
        fiber.shared = 0;
        fiber.turn = 0;
        fiber.asked.clear();
        fiber.sent.clear();
        fiber.stack.start(entry);
    }
    for (;;) {
        const std::vector<int> lanes = order.of(WARP);
        for (int warp : order.of(warps))
            if (!run_warp(warp * WARP, std::min(n, (warp + 1) * WARP), lanes)) return false;
        const auto done = [](const Fiber& f) { return f.state == State::done; };
        if (std::all_of(block.fibers.begin(), block.fibers.begin() + n, done)) break;
        if (release_a_row(order) && block.error.empty()) continue;
        if (!release(0, n, State::at_barrier, "barrier")) return false;
    }
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(block.shared.get(), SHARED_BYTES);
#endif
    return block.error.empty();
}

// Of a GPU's block: EMULATOR_SHARED KiB, or as many as there are.
inline int shared_bytes() {
    const char* asked = std::getenv("EMULATOR_SHARED");
    return asked ? std::atoi(asked) << 10 : int(SHARED_BYTES);
}

// All blocks of a grid, one after the other. 0, or 1 with block.error set.
inline int run(dim3 grid, dim3 size, int launched_shared, std::function<void()> body) {
    block.count = int(size.x * size.y * size.z);
    block.grid = grid;
    block.size = size;
    block.launched_shared = launched_shared;
    block.body = std::move(body);
    block.error.clear();
    if (block.count < 1 || block.count > 1024 || grid.y > 65535 || grid.z > 65535 ||
        launched_shared > shared_bytes()) {
        block.error = "CUDA would refuse a launch of this size";
        return 1;
    }
    if (int(block.fibers.size()) < block.count) block.fibers.resize(block.count);
    Order order;
    block.copies_come_early = order.backward();
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (int x : order.of(int(grid.x))) {
                block.index = {unsigned(x), y, z};
                if (!run_block(order)) return 1;
            }
    return 0;
}

// Each thread of a block comes here in the same order, and gets the same array.
template <class T> T* shared_array(size_t count) {
    const size_t at = (me().shared + 15) / 16 * 16, bytes = count * sizeof(T);
    me().shared = at + bytes + BORDER;
    if (me().shared > SHARED_BYTES) std::abort();
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(block.shared.get() + at, bytes);
#endif
    return reinterpret_cast<T*>(block.shared.get() + at);
}

inline void land(const Copy& copy) { std::memcpy(copy.to, copy.from, 16); }

inline void ask_copy(void* to, const void* from) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
        block.error = "a copy of 16 bytes that are not aligned";
    if (block.copies_come_early)
        land({to, from});
    else
        me().asked.push_back({to, from});
}
inline void copies_asked() {
    me().sent.push_back(std::move(me().asked));
    me().asked.clear();
}
inline void wait_for_copies(int but) {
    for (auto& sent = me().sent; int(sent.size()) > but; sent.pop_front())
        std::for_each(sent.front().begin(), sent.front().end(), land);
}

template <class T> T shuffle(T x, int from, unsigned mask, int place) {
    static_assert(sizeof(T) <= 16);
    Fiber& fiber = me();
    const int turn = fiber.turn;
    fiber.turn ^= 1;
    std::memcpy(fiber.slot[turn], &x, sizeof(T));
    if (mask != ~0u) block.error = "a shuffle's mask leaves out lanes";
    leave(State::at_shuffle, place);
    const int warp = block.current / WARP * WARP;
    T out;
    std::memcpy(&out, block.fibers[warp + (from & (WARP - 1))].slot[turn], sizeof(T));
    return out;
}
inline int lane() { return block.current % WARP; }

}  // namespace emulator

#define threadIdx (emulator::me().thread)
#define blockIdx (emulator::block.index)
#define blockDim (emulator::block.size)
#define gridDim (emulator::block.grid)
#define SHARED(type, name, count) type* name = emulator::shared_array<type>(count)
#define LAUNCHED_SHARED(type, name) \
    type* name = emulator::shared_array<type>(emulator::block.launched_shared / sizeof(type))
#define row_barrier() emulator::leave(emulator::State::at_row_barrier, __LINE__)
#define __syncthreads() emulator::leave(emulator::State::at_barrier, __LINE__)
#define __syncwarp() emulator::leave(emulator::State::at_shuffle, __LINE__)
#define __shfl_xor_sync(mask, x, far) \
    emulator::shuffle(x, emulator::lane() ^ (far), mask, __LINE__)
#define __shfl_sync(mask, x, from) emulator::shuffle(x, from, mask, __LINE__)
