// What a layer does to each number alone: GeLU, SwiGLU, rotary positions, dropout.
//
// One walk for all of them: a thread has V neighbouring columns (16 bytes) of a row, and then of
// every step-th row below, so that no division says where it is. A Map says what happens there: it
// reads its inputs once, computes in float32, and writes once.
#pragma once

#include "common.cuh"

namespace megalite {

constexpr int ELEMENTWISE_THREADS = 256;

__device__ __forceinline__ int64_t first_column(int v) {
    return (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * v;
}
__device__ __forceinline__ int64_t first_row() {
    return int64_t(blockIdx.y) * blockDim.y + threadIdx.y;
}

// map.at<V>(row, column), once for all of rows x n. The last pack of a row may have fewer than V.
template <int V, class Map>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS)
    elementwise(const Map map, int64_t rows, int64_t n) {
    const int64_t column = first_column(V), step = int64_t(gridDim.y) * blockDim.y;
    for (int64_t row = first_row(); row < rows; row += step)
        if (column + V <= n)
            map.template at<V>(row, column);
        else
#pragma unroll 1
            for (int64_t one = column; one < n; one++) map.template at<1>(row, one);
}

// -- gates: y = x * gate(x) --------------------------------------------------------------------

__device__ __forceinline__ float sigmoid(float x) { return inverse(1.0f + exponential(-x)); }

// A gate gives its value, and its slope where a gradient is wanted.
struct NormalGate {  // GeLU: the normal distribution's share below x
    __device__ __forceinline__ static float of(float x) {
        float slope;
        return of(x, slope);
    }
    // The share beyond |x| is its density times a polynomial in t = 1 / (1 + 0.28 |x|), the form of
    // Hastings 1955. Fitted here to the least largest error, 2e-7 as computed. With erff and expf,
    // which share no work, a kernel has half as many instructions again.
    __device__ __forceinline__ static float of(float x, float& slope) {
        const float t = inverse(1.0f + 0.28f * fabsf(x));
        const float power = power_of_2(-0.72134752f * x * x);  // exp(-x^2 / 2)
        float far = -0.107031435f;
        far = far * t + 0.394921929f;
        far = far * t - 0.245272502f;
        far = far * t + 0.27565369f;
        far = far * t + 0.0647694841f;
        far = far * t + 0.11695879f;
        far *= t * power;
        slope = 0.39894228f * power;  // 1 / sqrt(2 pi)
        return x < 0.0f ? far : 1.0f - far;
    }
};
struct TanhGate {  // its approximation, (1 + tanh(u)) / 2, which is sigmoid(2 u)
    static constexpr float LINEAR = 1.59576912f, CUBIC = 0.044715f;  // 2 sqrt(2 / pi)

    __device__ __forceinline__ static float of(float x) {
        return sigmoid(LINEAR * (x + CUBIC * x * x * x));
    }
    __device__ __forceinline__ static float of(float x, float& slope) {
        const float gate = of(x);
        slope = gate * (1.0f - gate) * LINEAR * (1.0f + 3.0f * CUBIC * x * x);
        return gate;
    }
};
struct SigmoidGate {  // SiLU
    __device__ __forceinline__ static float of(float x) { return sigmoid(x); }
    __device__ __forceinline__ static float of(float x, float& slope) {
        const float gate = of(x);
        slope = gate * (1.0f - gate);
        return gate;
    }
};

// -- GeLU, of x + bias -------------------------------------------------------------------------

template <class T> struct Biased {
    const T* x;
    const T* bias;  // [n], or null
    int64_t n;

    template <int V>
    __device__ __forceinline__ void load(int64_t row, int64_t column, float (&out)[V]) const {
        load_once<T, V>(x + row * n + column).unpack(out);
        if (bias == nullptr) return;
        float more[V];
        load_wide<V>(bias + column, more);
#pragma unroll
        for (int i = 0; i < V; i++) out[i] += more[i];
    }
};

template <class T, class Gate> struct Gelu {
    using Element = T;
    T* y;
    Biased<T> in;

    template <int V> __device__ __forceinline__ void at(int64_t row, int64_t column) const {
        float x[V];
        in.load(row, column, x);
#pragma unroll
        for (int i = 0; i < V; i++) x[i] *= Gate::of(x[i]);
        store_once<T, V>(y + row * in.n + column, Pack<T, V>::of(x));
    }
};

template <class T, class Gate> struct GeluBackward {
    using Element = T;
    T* dx;
    const T* dy;
    Biased<T> in;

    template <int V>
    __device__ __forceinline__ void at(int64_t row, int64_t column, float (&g)[V]) const {
        float x[V];
        in.load(row, column, x);
        load_once<T, V>(dy + row * in.n + column).unpack(g);
#pragma unroll
        for (int i = 0; i < V; i++) {
            float slope;
            const float gate = Gate::of(x[i], slope);
            g[i] *= gate + x[i] * slope;
        }
        store_once<T, V>(dx + row * in.n + column, Pack<T, V>::of(g));
    }
    template <int V> __device__ __forceinline__ void at(int64_t row, int64_t column) const {
        float g[V];
        at(row, column, g);
    }
};

// And shares [count, n] of the bias' gradient: the sum over rows w, w + count, ... in share w.
template <int V, class T, class Gate>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS)
    gelu_backward_bias(const GeluBackward<T, Gate> map, float* shares, int count, int64_t rows) {
    const int64_t column = first_column(V), share = first_row();
    if (column >= map.in.n || share >= count) return;
    float total[V] = {};
    for (int64_t row = share; row < rows; row += count) {
        float g[V];
        map.at(row, column, g);
#pragma unroll
        for (int i = 0; i < V; i++) total[i] += g[i];
    }
    store_narrow<V>(shares + share * map.in.n + column, total);
}

// -- SwiGLU: a row of x has n numbers that make the gate, then n that it lets through ----------

template <class T> struct Swiglu {
    using Element = T;
    T* y;
    const T* x;
    int64_t n;

    template <int V> __device__ __forceinline__ void at(int64_t row, int64_t column) const {
        float x_gate[V], up[V];
        load_once<T, V>(x + 2 * row * n + column).unpack(x_gate);
        load_once<T, V>(x + (2 * row + 1) * n + column).unpack(up);
#pragma unroll
        for (int i = 0; i < V; i++) up[i] *= x_gate[i] * SigmoidGate::of(x_gate[i]);
        store_once<T, V>(y + row * n + column, Pack<T, V>::of(up));
    }
};

template <class T> struct SwigluBackward {
    using Element = T;
    T* dx;
    const T* dy;
    const T* x;
    int64_t n;

    template <int V> __device__ __forceinline__ void at(int64_t row, int64_t column) const {
        const int64_t first = 2 * row * n + column, second = first + n;
        float x_gate[V], up[V], g[V];
        load_once<T, V>(x + first).unpack(x_gate);
        load_once<T, V>(x + second).unpack(up);
        load_once<T, V>(dy + row * n + column).unpack(g);
#pragma unroll
        for (int i = 0; i < V; i++) {
            float slope;
            const float gate = SigmoidGate::of(x_gate[i], slope);
            const float along_gate = g[i] * up[i] * (gate + x_gate[i] * slope);
            up[i] = g[i] * x_gate[i] * gate;
            x_gate[i] = along_gate;
        }
        store_once<T, V>(dx + first, Pack<T, V>::of(x_gate));
        store_once<T, V>(dx + second, Pack<T, V>::of(up));
    }
};

// -- rotary positions --------------------------------------------------------------------------

// x [s, b, heads, 2 half] with any strides but the last, y the same and contiguous; cos and sin
// [s, b, half] with any strides but the last. A row is a token, its columns the first halves of all
// heads. Backward turns the other way: turn -1.
template <class T> struct Rope {
    using Element = T;
    T* y;
    const T* x;
    const T* cos;
    const T* sin;
    int64_t x_token, x_sample, x_head;  // strides
    int64_t angle_token, angle_sample;
    int64_t batch;
    int heads, half;
    float turn;

    template <int V> __device__ __forceinline__ void at(int64_t row, int64_t column) const {
        const int head = int(column) / half, i = int(column) % half;
        const int64_t token = row / batch, sample = row % batch;
        const T* from = x + token * x_token + sample * x_sample + head * x_head + i;
        const int64_t angle = token * angle_token + sample * angle_sample + i;
        float a[V], b[V], c[V], s[V];
        load_once<T, V>(from).unpack(a);
        load_once<T, V>(from + half).unpack(b);
        load<T, V>(cos + angle).unpack(c);
        load<T, V>(sin + angle).unpack(s);
#pragma unroll
        for (int j = 0; j < V; j++) {
            const float first = a[j] * c[j] - b[j] * s[j] * turn;
            b[j] = b[j] * c[j] + a[j] * s[j] * turn;
            a[j] = first;
        }
        T* to = y + (row * heads + head) * 2 * half + i;
        store_once<T, V>(to, Pack<T, V>::of(a));
        store_once<T, V>(to + half, Pack<T, V>::of(b));
    }
};

// -- dropout -----------------------------------------------------------------------------------

// SplitMix64's finaliser, bit for bit that of megalite/ops/splitmix.py.
__device__ __forceinline__ uint64_t mix(uint64_t x) {
    x *= 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

// An element has a name, that of its row and its column. Two neighbours share a hash, half of it each,
// and one is kept where its half, with a sign, is at least `least`. Backward is the same map of dy:
// the mask is made again, never stored.
template <class T> struct Dropout {
    using Element = T;
    T* y;
    const T* x;
    const T* residual;  // is added; or null
    const int64_t* row_names;
    int64_t n;
    int least;
    float factor;  // of what is kept

    template <int V> __device__ __forceinline__ void at(int64_t row, int64_t column) const {
        const uint64_t name = uint64_t(row_names[row]);
        const Pack<T, V> pack = load_once<T, V>(x + row * n + column);
        constexpr int SHARE = V > 1 ? 2 : 1;  // packs start at even columns
        bool kept[V];
#pragma unroll
        for (int i = 0; i < V; i += SHARE) {
            const uint64_t hash = mix(name ^ (uint32_t(column + i) >> 1));
            const int half[] = {int(uint32_t(hash)), int(uint32_t(hash >> 32))};
#pragma unroll
            for (int j = 0; j < SHARE; j++)
                kept[i + j] = half[V > 1 ? j : column % 2] >= least;
        }
        float v[V];
        pack.unpack(v);
#pragma unroll
        for (int i = 0; i < V; i++) v[i] = kept[i] ? v[i] * factor : 0.0f;
        if (residual != nullptr) {
            float more[V];
            load_once<T, V>(residual + row * n + column).unpack(more);
#pragma unroll
            for (int i = 0; i < V; i++) v[i] += more[i];
        }
        store_once<T, V>(y + row * n + column, Pack<T, V>::of(v));
    }
};

}  // namespace megalite
