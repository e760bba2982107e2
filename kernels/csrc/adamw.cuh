// AdamW (Loshchilov and Hutter 2019) on a flat range of numbers, in one launch.
//
// The master, the two averages and the gradient are read once, the first three written once, and
// the master once more, rounded, as the parameter the model computes with. The factor that clips
// gradients, and whether the step is skipped, are read on the device: the host waits for nothing.
#pragma once

#include "common.cuh"

namespace megalite {

template <class G, class C> struct AdamW {
    float* master;
    float* average;         // of gradients
    float* average_square;  // of their squares
    C* copy;                // or null
    const G* gradient;
    const float* factor;  // of every gradient, or null for 1
    const float* skip;    // not zero: nothing is changed; or null
    int64_t n;
    float lr, beta1, beta2, eps, weight_decay;
    float unbias1, unbias2_root;  // 1 / (1 - beta1^step), 1 / sqrt(1 - beta2^step)
};

constexpr int ADAMW_THREADS = 256;

// M packs of V numbers, `apart` from each other: those of a warp's threads lie side by side. All are
// asked for before the first is used.
template <int V, int M, class G, class C>
__device__ __forceinline__ void adamw_packs(const AdamW<G, C>& a, int64_t first, int64_t apart,
                                            int64_t end, float factor) {
    float p[M][V], m[M][V], v[M][V], g[M][V];
#pragma unroll
    for (int j = 0; j < M; j++) {
        const int64_t at = first + j * apart;
        if (at >= end) continue;
        load_wide<V>(a.master + at, p[j]);
        load_wide<V>(a.average + at, m[j]);
        load_wide<V>(a.average_square + at, v[j]);
        load_wide<V>(a.gradient + at, g[j]);
    }
#pragma unroll
    for (int j = 0; j < M; j++) {
        const int64_t at = first + j * apart;
        if (at >= end) continue;
#pragma unroll
        for (int i = 0; i < V; i++) {
            float &to = p[j][i], &mean = m[j][i], &square = v[j][i];
            const float slope = g[j][i] * factor;
            to -= a.lr * a.weight_decay * to;
            mean += (1.0f - a.beta1) * (slope - mean);
            square = a.beta2 * square + (1.0f - a.beta2) * slope * slope;
            to -= a.lr * a.unbias1 * mean / (sqrtf(square) * a.unbias2_root + a.eps);
        }
        store_narrow<V>(a.master + at, p[j]);
        store_narrow<V>(a.average + at, m[j]);
        store_narrow<V>(a.average_square + at, v[j]);
        if (a.copy != nullptr) store_narrow<V>(a.copy + at, p[j]);
    }
}

constexpr int ADAMW_PACKS = 2;  // of a thread

// What is left at the end when packs are full, one number a thread of the last block.
template <int V, class G, class C>
__global__ void __launch_bounds__(ADAMW_THREADS) adamw(const AdamW<G, C> a) {
    if (a.skip != nullptr && *a.skip != 0.0f) return;
    const float factor = a.factor != nullptr ? *a.factor : 1.0f;
    const int64_t apart = int64_t(blockDim.x) * V, whole = a.n - a.n % V;
    const int64_t first = blockIdx.x * apart * ADAMW_PACKS + threadIdx.x * V;
    adamw_packs<V, ADAMW_PACKS>(a, first, apart, whole, factor);
    if (blockIdx.x == gridDim.x - 1)
        adamw_packs<1, 1>(a, whole + threadIdx.x, 0, a.n, factor);
}

}  // namespace megalite
