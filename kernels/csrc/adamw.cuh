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

template <int V, class G, class C>
__device__ __forceinline__ void adamw_pack(const AdamW<G, C>& a, int64_t at, float factor) {
    float p[V], m[V], v[V], g[V];
    load_wide<V>(a.master + at, p);
    load_wide<V>(a.average + at, m);
    load_wide<V>(a.average_square + at, v);
    load_wide<V>(a.gradient + at, g);
#pragma unroll
    for (int i = 0; i < V; i++) {
        g[i] *= factor;
        p[i] -= a.lr * a.weight_decay * p[i];
        m[i] += (1.0f - a.beta1) * (g[i] - m[i]);
        v[i] = a.beta2 * v[i] + (1.0f - a.beta2) * g[i] * g[i];
        p[i] -= a.lr * a.unbias1 * m[i] / (sqrtf(v[i]) * a.unbias2_root + a.eps);
    }
    store_narrow<V>(a.master + at, p);
    store_narrow<V>(a.average + at, m);
    store_narrow<V>(a.average_square + at, v);
    if (a.copy != nullptr) store_narrow<V>(a.copy + at, p);
}

// V numbers a thread; what is left of them at the end, one a thread of the last block.
template <int V, class G, class C>
__global__ void __launch_bounds__(ADAMW_THREADS) adamw(const AdamW<G, C> a) {
    if (a.skip != nullptr && *a.skip != 0.0f) return;
    const float factor = a.factor != nullptr ? *a.factor : 1.0f;
    const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V;
    const int64_t whole = a.n - a.n % V, one = whole + threadIdx.x;
    if (at < whole) adamw_pack<V>(a, at, factor);
    if (blockIdx.x == gridDim.x - 1 && one < a.n) adamw_pack<1>(a, one, factor);
}

}  // namespace megalite
