// Cross entropy of logits whose vocabulary is cut over ranks: no rank sees a whole row.
//
// Forward reads the logits once and gives, for each row of this rank's columns: the largest, the sum
// of exp(x - largest), the label's logit and the sum of all logits. Ranks combine those (a maximum,
// then a sum of three numbers a row); backward reads the logits again and writes their gradient in
// their place:
//
//   lse = log sum exp x;   p = exp(x - lse);   on = 1 for the label, else 0
//   loss = lse - (1 - s) x[label] - s mean(x) + z lse^2
//   dx = g (p (1 + 2 z lse) - (1 - s) on - s / vocabulary)
//
// with s label smoothing and z the z-loss' weight. Columns from `known` on pad the vocabulary: they
// are not looked at, and their gradient is zero.
#pragma once

#include "common.cuh"

namespace megalite {

constexpr int CROSS_ENTROPY_THREADS = 512;

// fn(column, x, whether all of x is known) of each pack of a row below `stop` that is this thread's;
// some of them are on their way while one is worked on. ONCE: they will not be read again.
template <bool ONCE, int V, class T, class Fn>
__device__ __forceinline__ void each_pack(const T* row, int stop, int known, Fn fn) {
    constexpr int AHEAD = 4;
    const int step = blockDim.x * V;
    const auto some = [&](int at, bool all_known) {
        Pack<T, V> raw[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            const int column = at + k * step;
            if (all_known || column < stop)
                raw[k] = ONCE ? load_once<T, V>(row + column) : load<T, V>(row + column);
        }
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (all_known || at + k * step < stop) {
                float x[V];
                raw[k].unpack(x);
                fn(at + k * step, x, all_known);
            }
    };
    int at = threadIdx.x * V;
    for (; at + (AHEAD - 1) * step + V <= known; at += AHEAD * step) some(at, true);
    for (; at < stop; at += AHEAD * step) some(at, false);
}

template <class T> struct CrossEntropyForward {
    float* top;     // [rows]
    float* sums;    // [3, rows]: of exp(x - top), the label's logit or 0, of x
    const T* x;     // [rows, n]
    const int64_t* label;  // [rows], of this rank's columns; others are elsewhere
    int64_t rows;
    int n, known;
};

template <class T, int V>
__global__ void __launch_bounds__(CROSS_ENTROPY_THREADS)
    cross_entropy_forward(const CrossEntropyForward<T> a) {
    SHARED(float, shared, OVER_ROW_FLOATS(2));
    OverRow<2> over_row(shared);
    const int64_t row = blockIdx.x, start = row * a.n;
    Exponentials seen;
    float plain = 0.0f;
    each_pack<false, V>(a.x + start, a.known, a.known, [&](int column, float (&x)[V], bool known) {
#pragma unroll
        for (int i = 0; i < V; i++) {
            const bool counts = known || column + i < a.known;
            plain += counts ? x[i] : 0.0f;
            x[i] = counts ? x[i] : -INFINITY;
        }
        seen.add(x);
    });
    const float top = over_row.max(seen.top);
    const float shift = top == -INFINITY ? 0.0f : top;
    const auto sums = over_row.sum(Values<2>{{seen.total * exponential(seen.top - shift), plain}});
    if (threadIdx.x == 0) {
        const int64_t label = a.label[row];
        a.top[row] = top;
        a.sums[row] = sums.v[0];
        a.sums[a.rows + row] = label >= 0 && label < a.known ? wide(a.x[start + label]) : 0.0f;
        a.sums[2 * a.rows + row] = sums.v[1];
    }
}

template <class T> struct CrossEntropyBackward {
    T* x;                  // [rows, n], overwritten
    const float* lse;      // [rows]
    const float* scale;    // [rows]: the gradient of each row's loss
    const int64_t* label;  // as above
    int n, known;
    int64_t vocabulary;
    float smoothing, z;
};

template <class T, int V>
__global__ void __launch_bounds__(CROSS_ENTROPY_THREADS)
    cross_entropy_backward(const CrossEntropyBackward<T> a) {
    // The last rows first: they are what forward has left in L2.
    const int64_t row = gridDim.x - 1 - blockIdx.x, start = row * a.n;
    const float lse = a.lse[row], scale = a.scale[row];
    const float of_p = scale * (1.0f + 2.0f * a.z * lse), each = scale * a.smoothing / a.vocabulary;
    // A row whose loss counts for nothing has no gradient, whatever is in it.
    const int stop = scale != 0.0f ? a.known : 0;
    const auto dx = [&](float x) { return exponential(x - lse) * of_p - each; };
    // The label's pack is written like all others; then its thread writes the label's number again.
    const int64_t label = a.label[row];
    const bool mine = label >= 0 && label < stop && int(label) / V % int(blockDim.x) == int(threadIdx.x);
    const float at_label = mine ? dx(wide(a.x[start + label])) - scale * (1.0f - a.smoothing) : 0.0f;
    each_pack<true, V>(a.x + start, a.n, stop, [&](int column, float (&x)[V], bool known) {
#pragma unroll
        for (int i = 0; i < V; i++) x[i] = known || column + i < stop ? dx(x[i]) : 0.0f;
        store_once<T, V>(a.x + start + column, Pack<T, V>::of(x));
    });
    if (mine) a.x[start + label] = narrow<T>(at_label);
}

}  // namespace megalite
