// Softmax of attention scores: scaled, and masked in every way at once if asked for.
//
//   v[j] = scale * x[j] + bias[j] where key j is seen, else -inf;  y = exp(v - max) / sum
//
// Key j is seen by query i if j - i <= ahead (causal), j - i > ahead - window, and mask[j]. mask and
// bias are broadcast over batch and heads by strides of 0. A row in which nothing is seen gives
// zeros, and gradients of zero; a NaN that is seen makes its row NaN. Rows may have any length and
// start anywhere. What a causal mask or a window hides is not read, forward or backward.
#pragma once

#include "common.cuh"

namespace megalite {

// A [batch, heads, queries, keys] tensor whose keys are neighbours, and which may be broadcast.
template <class T> struct Broadcast {
    const T* at;  // or null
    int64_t batch, head, query;  // strides

    __device__ __forceinline__ const T* row(int64_t b, int64_t h, int64_t q) const {
        return at + b * batch + h * head + q * query;
    }
};

struct Seen {
    int heads, queries, keys;
    int64_t ahead;   // of a query's own position, keys - queries where the last ones meet
    int64_t window;  // keys seen behind that, or all
    bool causal;

    // Keys from..to may be seen by a query; the others are not.
    __device__ __forceinline__ void span(int query, int& from, int& to) const {
        const int64_t own = query + ahead;
        from = causal ? int(max(int64_t(0), min(int64_t(keys), own + 1 - window))) : 0;
        to = causal ? int(max(int64_t(0), min(int64_t(keys), own + 1))) : keys;
    }
};

template <class T> struct Softmax {
    T* y;
    const T* x;
    Broadcast<uint8_t> mask;
    Broadcast<T> bias;
    Seen seen;
    int64_t rows;
    float scale;
};

constexpr int MOST_SOFTMAX_THREADS = 512;

// The values of a row that this thread has: K packs of V in registers, or read again each time.
template <class T, int V, int K> class SoftmaxRow {
public:
    __device__ __forceinline__ SoftmaxRow(const Softmax<T>& a, int64_t row) : a_(a) {
        const auto [above, query] = divided(row, a.seen.queries);
        x_ = a.x + row * a.seen.keys;
        if (a.mask.at != nullptr || a.bias.at != nullptr) {
            const auto [batch, head] = divided(above, a.seen.heads);
            if (a.mask.at != nullptr) mask_ = a.mask.row(batch, head, query);
            if (a.bias.at != nullptr) bias_ = a.bias.row(batch, head, query);
        }
        a.seen.span(query, from_, to_);
        if constexpr (K > 0) {
            Pack<T, V> raw[K];
            Mask mask[K];
#pragma unroll
            for (int k = 0; k < K; k++)
                if (touches(column(k))) {
                    raw[k] = load_once<T, V>(x_ + column(k));
                    mask[k] = mask_at(column(k));
                }
#pragma unroll
            for (int k = 0; k < K; k++) values(column(k), raw[k], mask[k], held_[k]);
        }
    }

    // use(column, V values, whether any of them is seen), of every column.
    template <class Use> __device__ __forceinline__ void each(Use use) {
        if constexpr (K > 0) {
#pragma unroll
            for (int k = 0; k < K; k++)
                if (column(k) < a_.seen.keys) use(column(k), held_[k], touches(column(k)));
        } else {
            for (int at = threadIdx.x * V; at < a_.seen.keys; at += blockDim.x * V) {
                Pack<T, V> raw;
                Mask mask;
                float v[V];
                if (touches(at)) {
                    raw = load<T, V>(x_ + at);
                    mask = mask_at(at);
                }
                values(at, raw, mask, v);
                use(at, v, touches(at));
            }
        }
    }

private:
    __device__ __forceinline__ static int column(int k) {
        return (k * int(blockDim.x) + int(threadIdx.x)) * V;
    }
    __device__ __forceinline__ bool touches(int column) const {
        return column < to_ && column + V > from_;
    }
    union Mask {
        typename Word<V>::type word;
        uint8_t seen[V];
    };
    __device__ __forceinline__ Mask mask_at(int column) const {
        if (mask_ == nullptr) return {};
        return {*reinterpret_cast<const typename Word<V>::type*>(mask_ + column)};
    }
    __device__ __forceinline__ void values(int column, Pack<T, V> raw, Mask mask,
                                           float (&v)[V]) const {
        if (!touches(column)) {
#pragma unroll
            for (int i = 0; i < V; i++) v[i] = 0.0f;
            return;
        }
        raw.unpack(v);
#pragma unroll
        for (int i = 0; i < V; i++) v[i] *= a_.scale;
        if (bias_ != nullptr) {
            float bias[V];
            load<T, V>(bias_ + column).unpack(bias);
#pragma unroll
            for (int i = 0; i < V; i++) v[i] += bias[i];
        }
        if (mask_ != nullptr)
#pragma unroll
            for (int i = 0; i < V; i++) v[i] = mask.seen[i] ? v[i] : -INFINITY;
        if (column < from_ || column + V > to_)
#pragma unroll
            for (int i = 0; i < V; i++)
                v[i] = column + i >= from_ && column + i < to_ ? v[i] : -INFINITY;
    }

    const Softmax<T>& a_;
    const T* x_;
    const uint8_t* mask_ = nullptr;
    const T* bias_ = nullptr;
    int from_, to_;
    float held_[K > 0 ? K : 1][V];
};

template <class T, int V, int K>
__global__ void __launch_bounds__(MOST_SOFTMAX_THREADS) softmax_forward(const Softmax<T> a) {
    SHARED(float, shared, OVER_ROW_FLOATS(1));
    OverRow<1> over_row(shared);
    const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= a.rows) return;
    SoftmaxRow<T, V, K> values(a, row);
    Exponentials row_so_far;  // where the row is held, of its maximum alone
    values.each([&](int, const float(&v)[V], bool seen) {
        if (!seen) return;
        if constexpr (K == 0)
            row_so_far.add(v);
        else
#pragma unroll
            for (int i = 0; i < V; i++) row_so_far.top = fmaxf(row_so_far.top, v[i]);
    });
    float top = over_row.max(row_so_far.top);
    top = top == -INFINITY ? 0.0f : top;  // nothing is seen: every weight is exp(-inf)
    float total = K > 0 ? 0.0f : row_so_far.total * exponential(row_so_far.top - top);
    if constexpr (K > 0)
        values.each([&](int, float(&v)[V], bool seen) {
            if (!seen) return;
#pragma unroll
            for (int i = 0; i < V; i++) total += v[i] = exponential(v[i] - top);
        });
    total = over_row.sum(total);
    const float factor = total == 0.0f ? 0.0f : 1.0f / total;
    values.each([&](int column, float(&v)[V], bool seen) {
        if (K == 0 && seen)
#pragma unroll
            for (int i = 0; i < V; i++) v[i] = exponential(v[i] - top);
#pragma unroll
        for (int i = 0; i < V; i++) v[i] *= factor;
        store_once<T, V>(a.y + row * a.seen.keys + column, Pack<T, V>::of(v));
    });
}

template <class T> struct SoftmaxBackward {
    T* dx;
    const T* dy;
    const T* y;
    Seen seen;
    int64_t rows;
    float scale;
};

// dx = scale * y * (dy - sum(y dy)); zero where y is, whatever dy is there.
template <class T, int V, int K>
__global__ void __launch_bounds__(MOST_SOFTMAX_THREADS)
    softmax_backward(const SoftmaxBackward<T> a) {
    SHARED(float, shared, OVER_ROW_FLOATS(1));
    OverRow<1> over_row(shared);
    const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= a.rows) return;
    const int64_t start = row * a.seen.keys;
    int from, to;
    a.seen.span(divided(row, a.seen.queries).rest, from, to);
    const auto column = [](int k) { return (k * int(blockDim.x) + int(threadIdx.x)) * V; };
    const auto touches = [&](int at) { return at < to && at + V > from; };
    Pack<T, V> raw_y[K > 0 ? K : 1] = {}, raw_dy[K > 0 ? K : 1] = {};
    if constexpr (K > 0) {
#pragma unroll
        for (int k = 0; k < K; k++)
            if (touches(column(k))) {
                raw_y[k] = load_once<T, V>(a.y + start + column(k));
                raw_dy[k] = load_once<T, V>(a.dy + start + column(k));
            }
    }
    // use(column, y, dy) of every column; zeros of those that are not seen.
    const auto one = [&](int at, Pack<T, V> y_pack, Pack<T, V> dy_pack, auto use) {
        float y[V], dy[V];
        y_pack.unpack(y);
        dy_pack.unpack(dy);
#pragma unroll
        for (int i = 0; i < V; i++) dy[i] = y[i] == 0.0f ? 0.0f : dy[i];
        use(at, y, dy);
    };
    const auto each = [&](auto use) {
        if constexpr (K > 0) {
#pragma unroll
            for (int k = 0; k < K; k++)
                if (column(k) < a.seen.keys) one(column(k), raw_y[k], raw_dy[k], use);
        } else {
            for (int at = threadIdx.x * V; at < a.seen.keys; at += blockDim.x * V) {
                Pack<T, V> y = {}, dy = {};
                if (touches(at)) {
                    y = load<T, V>(a.y + start + at);
                    dy = load<T, V>(a.dy + start + at);
                }
                one(at, y, dy, use);
            }
        }
    };
    float along = 0.0f;
    each([&](int, const float(&y)[V], const float(&dy)[V]) {
#pragma unroll
        for (int i = 0; i < V; i++) along += y[i] * dy[i];
    });
    along = over_row.sum(along);
    each([&](int at, const float(&y)[V], float(&dy)[V]) {
#pragma unroll
        for (int i = 0; i < V; i++) dy[i] = a.scale * y[i] * (dy[i] - along);
        store_once<T, V>(a.dx + start + at, Pack<T, V>::of(dy));
    });
}

}  // namespace megalite
