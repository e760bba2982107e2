// What all kernels share: element types, 16-byte accesses, sums over rows and columns, launches.
//
// A file of bodies names nothing of torch. nvcc compiles it for GPUs; g++ compiles the same file
// with ../emulator/cuda_on_host.h, where one fiber stands for each CUDA thread.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SHARED(type, name, count) __shared__ alignas(16) type name[count]
// All that the launch gave besides; one in a kernel.
#define LAUNCHED_SHARED(type, name) extern __shared__ type name[]
#else
#include "../emulator/cuda_on_host.h"
#endif

namespace megalite {

constexpr int WARP = 32;
constexpr int MAX_WARPS = 32;  // of a block

// -- elements ----------------------------------------------------------------------------------

using bf16 = __nv_bfloat16;
using fp16 = __half;

// As megalite/ops/library.py numbers them.
enum Dtype : int { FP32 = 0, BF16 = 1, FP16 = 2 };

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float wide(fp16 x) { return __half2float(x); }

template <class T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ fp16 narrow<fp16>(float x) { return __float2half_rn(x); }

// -- N elements that are moved at once ---------------------------------------------------------

template <int BYTES> struct Word;
template <> struct Word<16> { using type = uint4; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<4> { using type = uint32_t; };
template <> struct Word<2> { using type = uint16_t; };
template <> struct Word<1> { using type = uint8_t; };

// Aligned to its size in memory; unpacked to float32 where numbers are needed.
template <class T, int N> struct Pack {
    using Raw = typename Word<N * sizeof(T)>::type;
    Raw raw;

    __device__ __forceinline__ void unpack(float (&out)[N]) const {
        if constexpr (std::is_same_v<T, bf16> && N > 1) {  // the upper half of a float32
            union { Raw word; uint32_t pair[N / 2]; } both = {raw};
#pragma unroll
            for (int i = 0; i < N / 2; i++) {
                out[2 * i] = __uint_as_float(both.pair[i] << 16);
                out[2 * i + 1] = __uint_as_float(both.pair[i] & 0xffff0000u);
            }
        } else {
            union { Raw word; T element[N]; } both = {raw};
#pragma unroll
            for (int i = 0; i < N; i++) out[i] = wide(both.element[i]);
        }
    }

    __device__ __forceinline__ static Pack of(const float (&in)[N]) {
        union { Raw word; T element[N]; } both;
#pragma unroll
        for (int i = 0; i < N; i++) both.element[i] = narrow<T>(in[i]);
        return {both.word};
    }
};

// What is read or written once: past L1, and the first to leave L2.
template <class T, int N> __device__ __forceinline__ Pack<T, N> load_once(const T* at) {
    return {__ldcs(reinterpret_cast<const typename Pack<T, N>::Raw*>(at))};
}
template <class T, int N> __device__ __forceinline__ void store_once(T* at, Pack<T, N> pack) {
    __stcs(reinterpret_cast<typename Pack<T, N>::Raw*>(at), pack.raw);
}
// What other blocks, or this one, will read again.
template <class T, int N> __device__ __forceinline__ Pack<T, N> load(const T* at) {
    return {*reinterpret_cast<const typename Pack<T, N>::Raw*>(at)};
}
template <class T, int N> __device__ __forceinline__ void store(T* at, Pack<T, N> pack) {
    *reinterpret_cast<typename Pack<T, N>::Raw*>(at) = pack.raw;
}

// N numbers from `at` as float32, in accesses of at most 16 bytes.
template <int N, class T> __device__ __forceinline__ void load_wide(const T* at, float (&out)[N]) {
    constexpr int EACH = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;
#pragma unroll
    for (int i = 0; i < N; i += EACH) {
        float some[EACH];
        load<T, EACH>(at + i).unpack(some);
#pragma unroll
        for (int j = 0; j < EACH; j++) out[i + j] = some[j];
    }
}
template <int N, class T> __device__ __forceinline__ void store_narrow(T* at, const float (&in)[N]) {
    constexpr int EACH = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;
#pragma unroll
    for (int i = 0; i < N; i += EACH) {
        float some[EACH];
#pragma unroll
        for (int j = 0; j < EACH; j++) some[j] = in[i + j];
        store<T, EACH>(at + i, Pack<T, EACH>::of(some));
    }
}

// -- copies that come while something else is done ---------------------------------------------

// 16 bytes into shared memory, past registers and L1. The thread that asked may read them, without a
// barrier, once it has waited for the group that `copies_asked` ended.
#ifdef __CUDACC__
__device__ __forceinline__ void ask_copy(void* shared, const void* from) {
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copies_asked() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// For all groups but the last `but`.
template <int but> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(but) : "memory");
}
#else
inline void ask_copy(void* shared, const void* from) { emulator::ask_copy(shared, from); }
inline void copies_asked() { emulator::copies_asked(); }
template <int but> void wait_for_copies() { emulator::wait_for_copies(but); }
#endif

// -- functions of one number -------------------------------------------------------------------

// 2^x and 1 / x, each by one instruction, to some 2^-22 of the result; subnormal ones are 0. Those of
// CUDA's library take nine and more, which a kernel that should keep up with memory does not have:
// at an H200's 4.3 TB/s there are eight instructions for each byte.
#ifdef __CUDACC__
__device__ __forceinline__ float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float inverse(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#else
inline float power_of_2(float x) { return emulator::without_subnormal(exp2f(x)); }
inline float inverse(float x) {
    return emulator::without_subnormal(1.0f / emulator::without_subnormal(x));
}
#endif
__device__ __forceinline__ float exponential(float x) { return power_of_2(1.44269504f * x); }

struct Divided {
    int64_t whole;
    int rest;
};
// A division of 64 bits takes some 80 instructions, one of 32 bits a quarter of that.
__device__ __forceinline__ Divided divided(int64_t a, int b) {
    if (a <= INT32_MAX) return {int(a) / b, int(a) % b};
    return {a / b, int(a % b)};
}

// A maximum so far, and the sum of exp(x - maximum): numbers are added in any order.
struct Exponentials {
    float top = -INFINITY, total = 0.0f;

    template <int V> __device__ __forceinline__ void add(const float (&x)[V]) {
        float higher = top;
#pragma unroll
        for (int i = 0; i < V; i++) higher = fmaxf(higher, x[i]);
        const float base = higher == -INFINITY ? 0.0f : higher;
        total *= exponential(top - base);
#pragma unroll
        for (int i = 0; i < V; i++) total += exponential(x[i] - base);
        top = higher;
    }
};

// -- one number from all threads of a row ------------------------------------------------------

struct Add {
    static constexpr float nothing = 0.0f;
    __device__ __forceinline__ static float of(float a, float b) { return a + b; }
};
struct Max {
    static constexpr float nothing = -INFINITY;
    __device__ __forceinline__ static float of(float a, float b) { return fmaxf(a, b); }
};

template <int N> struct Values { float v[N]; };

template <class Op, int N> __device__ __forceinline__ Values<N> over_warp(Values<N> x) {
#pragma unroll
    for (int far = WARP / 2; far > 0; far /= 2)
#pragma unroll
        for (int i = 0; i < N; i++) x.v[i] = Op::of(x.v[i], __shfl_xor_sync(~0u, x.v[i], far));
    return x;
}

// Of the threads with one threadIdx.y, whole warps. Barrier 0 is __syncthreads', of 16.
#ifdef __CUDACC__
__device__ __forceinline__ void row_barrier() {
    asm volatile("bar.sync %0, %1;" ::"r"(threadIdx.y + 1), "r"(blockDim.x) : "memory");
}
#endif

// Up to N sums or maxima over threadIdx.x, given to all of its threads, always in the same order.
//
// A row is those threads of a block that have one threadIdx.y. One of one warp needs no barrier. All
// others of a block come here together, or, with APART, those of a row alone, and take one barrier
// each time: two buffers in turn, so that a warp that runs ahead does not overwrite what another
// still reads. APART reserves all 16 barriers of a block, of which a Hopper processor has 64: it is
// for kernels that have a processor to themselves.
template <int N, bool APART = false> class OverRow {
public:
    __device__ __forceinline__ explicit OverRow(float* shared) : shared_(shared) {}

    template <class Op, int M> __device__ __forceinline__ Values<M> all(Values<M> x) {
        static_assert(M <= N);
        x = over_warp<Op>(x);
        const int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        if (warps == 1) return x;
        float* buffer = shared_ + turn_ * N * MAX_WARPS;
        turn_ ^= 1;
        const int first = threadIdx.y * warps;
        if (lane == 0)
#pragma unroll
            for (int i = 0; i < M; i++) buffer[i * MAX_WARPS + first + warp] = x.v[i];
        if constexpr (APART)
            row_barrier();
        else
            __syncthreads();
#pragma unroll
        for (int i = 0; i < M; i++)
            x.v[i] = lane < warps ? buffer[i * MAX_WARPS + first + lane] : Op::nothing;
        return over_warp<Op>(x);
    }
    template <int M> __device__ __forceinline__ Values<M> sum(Values<M> x) { return all<Add>(x); }
    __device__ __forceinline__ float sum(float x) { return all<Add>(Values<1>{{x}}).v[0]; }
    __device__ __forceinline__ float max(float x) { return all<Max>(Values<1>{{x}}).v[0]; }

private:
    float* shared_;  // OVER_ROW_FLOATS(N) of them
    int turn_ = 0;
};
#define OVER_ROW_FLOATS(n) (2 * (n) * megalite::MAX_WARPS)

// -- one number of each column -----------------------------------------------------------------

constexpr int TILE = 32;

// The sum over threadIdx.y of a block of TILE x `rows` threads, given to those with threadIdx.y 0.
__device__ __forceinline__ float tile_sum(float x, float* tile, int rows) {
    __syncthreads();  // what was there before has been read
    tile[threadIdx.y * TILE + threadIdx.x] = x;
    __syncthreads();
    if (threadIdx.y == 0)
        for (int y = 1; y < rows; y++) x += tile[y * TILE + threadIdx.x];
    return x;
}

// outs.at[y][n] = the sum of shares[y, count, n], in one order; y is blockIdx.y.
template <class T> struct Sums { T* at[2]; };

template <class T>
__global__ void column_sum(const Sums<T> outs, const float* shares, int count, int n) {
    SHARED(float, tile, TILE * TILE);
    const int column = blockIdx.x * TILE + threadIdx.x;
    T* out = outs.at[blockIdx.y];
    shares += int64_t(blockIdx.y) * count * n;
    float total = 0.0f;
    if (column < n)
        for (int i = threadIdx.y; i < count; i += TILE) total += shares[int64_t(i) * n + column];
    total = tile_sum(total, tile, TILE);
    if (threadIdx.y == 0 && column < n) out[column] = narrow<T>(total);
}

// -- launches ----------------------------------------------------------------------------------

// 0, or CUDA's error code (the emulator's: 1, and last_error() says what).
// `shared` bytes are LAUNCHED_SHARED.
template <class... Params, class... Args>
int launch_with_shared(int shared, void (*kernel)(Params...), dim3 grid, dim3 block, void* stream,
                       Args... args) {
#ifdef __CUDACC__
    if (shared > 48 << 10) {  // more has to be asked for
        const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
        if (auto error = cudaFuncSetAttribute(kernel, most, shared)) return static_cast<int>(error);
    }
    kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(args...);
    return static_cast<int>(cudaGetLastError());
#else
    (void)stream;
    return emulator::run(grid, block, shared, [=] { kernel(args...); });
#endif
}
template <class... Params, class... Args>
int launch(void (*kernel)(Params...), dim3 grid, dim3 block, void* stream, Args... args) {
    return launch_with_shared(0, kernel, grid, block, stream, args...);
}

// Bytes of shared memory that a block may have on this device; 0 where there is none.
inline int most_shared() {
#ifdef __CUDACC__
    int device = 0, bytes = 0;
    if (cudaGetDevice(&device)) return 0;
    return cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ? 0 : bytes;
#else
    return emulator::shared_bytes();
#endif
}

// launch_with(a number of type T), for the T that `dtype` says; -1 for no such type.
template <class Launch> int with_type(int dtype, Launch launch_with) {
    switch (dtype) {
        case FP32: return launch_with(float{});
        case BF16: return launch_with(bf16{});
        case FP16: return launch_with(fp16{});
    }
    return -1;
}

// What Python calls through ctypes.
#define EXPORT extern "C" __attribute__((visibility("default")))

inline bool aligned(int bytes, const void* at) {
    return reinterpret_cast<uintptr_t>(at) % bytes == 0;  // a null pointer is
}
template <class... Pointers> bool aligned(int bytes, const void* at, Pointers... others) {
    return aligned(bytes, at) && aligned(bytes, others...);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// n elements in packs of v, k packs for each thread: threads of a row, a multiple of a warp.
constexpr int row_threads(int64_t n, int v, int k) {
    return int(ceil_div(ceil_div(n, int64_t(v) * k), WARP) * WARP);
}

// Launches column_sum for one result or, if there is a second, for both.
template <class T>
int sum_shares(void* first, void* second, const float* shares, int count, int64_t n, void* stream) {
    const Sums<T> outs = {{static_cast<T*>(first), static_cast<T*>(second)}};
    return launch(column_sum<T>, dim3(ceil_div(n, TILE), second ? 2 : 1), dim3(TILE, TILE), stream,
                  outs, shares, count, int(n));
}

}  // namespace megalite
