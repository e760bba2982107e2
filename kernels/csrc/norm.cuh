// LayerNorm and RMSNorm, forward and backward, with or without the residual's addition.
//
//   sum = x + residual (rounded to T, as torch would)      only with ADD
//   y = (sum - mean) * rstd * weight + bias                RMSNorm: mean 0, rstd of mean(sum^2)
//
// A row's elements stay in its threads' registers from the first pass to the last, so x is read
// once: mean first, then the sum of squares about it, as exact as Welford's and no dearer. Backward
// is one pass, too: a block takes every G-th group of rows, which come into its shared memory, and
// adds up its share of the weight's and the bias' gradients in registers; `column_sum` adds the G
// shares. No atomics, one order of each sum.
#pragma once

#include "common.cuh"

namespace megalite {

// weight and bias are of the activations' type or of float32.
struct Affine {
    const void* weight;
    const void* bias;  // or null
    bool in_fp32;

    template <int V, class T>
    __device__ __forceinline__ void load(const void* from, int column, float (&out)[V]) const {
        if (in_fp32)
            load_wide<V>(static_cast<const float*>(from) + column, out);
        else
            load_wide<V>(static_cast<const T*>(from) + column, out);
    }
};

// The elements of one row that this thread has: K packs of V, far apart so that neighbours read
// neighbours. K = 0: the row is too long to hold, and each pass reads it again (from L2, mostly).
template <class T, int V, int K> class RowOf {
public:
    __device__ __forceinline__ RowOf(const T* row, int n) : row_(row), n_(n) {
        if constexpr (K > 0) {
#pragma unroll
            for (int k = 0; k < K; k++)
                if (column(k) < n_) held_[k] = load_once<T, V>(row_ + column(k));
        }
    }

    // Of the sum of two rows, which is written to a third.
    __device__ __forceinline__ RowOf(const T* x, const T* residual, T* sum, int n)
        : row_(sum), n_(n) {
        if constexpr (K > 0) {
            Pack<T, V> other[K];
#pragma unroll
            for (int k = 0; k < K; k++)
                if (column(k) < n_) {
                    held_[k] = load_once<T, V>(x + column(k));
                    other[k] = load_once<T, V>(residual + column(k));
                }
#pragma unroll
            for (int k = 0; k < K; k++)
                if (column(k) < n_) {
                    held_[k] = added(held_[k], other[k]);
                    store_once<T, V>(sum + column(k), held_[k]);
                }
        } else {
            for (int at = threadIdx.x * V; at < n; at += blockDim.x * V)
                store<T, V>(sum + at,
                            added(load_once<T, V>(x + at), load_once<T, V>(residual + at)));
        }
    }

    // use(column, its V elements), for all that this thread has.
    template <class Use> __device__ __forceinline__ void each(Use use) const {
        if constexpr (K > 0) {
#pragma unroll
            for (int k = 0; k < K; k++)
                if (column(k) < n_) {
                    float x[V];
                    held_[k].unpack(x);
                    use(column(k), x);
                }
        } else {
            for (int at = threadIdx.x * V; at < n_; at += blockDim.x * V) {
                float x[V];
                load<T, V>(row_ + at).unpack(x);
                use(at, x);
            }
        }
    }

private:
    __device__ __forceinline__ static int column(int k) {
        return (k * blockDim.x + threadIdx.x) * V;
    }
    __device__ __forceinline__ static Pack<T, V> added(Pack<T, V> a, Pack<T, V> b) {
        float x[V], y[V];
        a.unpack(x);
        b.unpack(y);
#pragma unroll
        for (int i = 0; i < V; i++) x[i] += y[i];
        return Pack<T, V>::of(x);
    }

    const T* row_;
    int n_;
    Pack<T, V> held_[K > 0 ? K : 1];
};

template <class T> struct NormForward {
    T* y;
    T* sum;       // [rows, n], of ADD
    float* mean;  // [rows], or null for RMSNorm
    float* rstd;  // [rows]
    const T* x;
    const T* residual;  // of ADD
    Affine affine;
    int64_t rows;
    int n;
    float part;  // 1 / n
    float eps;
};

constexpr int MOST_FORWARD_THREADS = 512;

// A row for each threadIdx.y; more than one in a block only if each has one warp.
template <class T, int V, int K, bool ADD>
__global__ void __launch_bounds__(MOST_FORWARD_THREADS) norm_forward(const NormForward<T> a) {
    SHARED(float, shared, OVER_ROW_FLOATS(1));
    OverRow<1> over_row(shared);
    const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= a.rows) return;
    const int64_t at = row * a.n;
    const RowOf<T, V, K> x = ADD ? RowOf<T, V, K>(a.x + at, a.residual + at, a.sum + at, a.n)
                                 : RowOf<T, V, K>(a.x + at, a.n);
    float mean = 0.0f;
    if (a.mean != nullptr) {
        float total = 0.0f;
        x.each([&](int, const float(&v)[V]) {
#pragma unroll
            for (int i = 0; i < V; i++) total += v[i];
        });
        mean = over_row.sum(total) * a.part;
    }
    float squares = 0.0f;
    x.each([&](int, const float(&v)[V]) {
#pragma unroll
        for (int i = 0; i < V; i++) squares += (v[i] - mean) * (v[i] - mean);
    });
    const float rstd = rsqrtf(over_row.sum(squares) * a.part + a.eps);
    x.each([&](int column, float(&v)[V]) {
        float weight[V], bias[V] = {};
        a.affine.template load<V, T>(a.affine.weight, column, weight);
        if (a.affine.bias != nullptr) a.affine.template load<V, T>(a.affine.bias, column, bias);
#pragma unroll
        for (int i = 0; i < V; i++) v[i] = (v[i] - mean) * rstd * weight[i] + bias[i];
        store_once<T, V>(a.y + at + column, Pack<T, V>::of(v));
    });
    if (threadIdx.x == 0) {
        if (a.mean != nullptr) a.mean[row] = mean;
        a.rstd[row] = rstd;
    }
}

template <class T> struct NormBackward {
    T* dx;
    float* dweight;  // [shares, n], a share of the gradient in each row
    float* dbias;    // the same, or null
    const T* dy;
    const T* x;     // what was normalised: `sum` with ADD
    const T* dsum;  // gradient of `sum` from elsewhere, added to dx; or null
    Affine affine;
    const float* mean;  // or null for RMSNorm
    const float* rstd;
    int64_t rows;
    int n;
    float part;  // 1 / n
};

// d loss / d x of V elements from the row's two means.
template <int V>
__device__ __forceinline__ void norm_dx(float (&dx)[V], const float (&unit)[V], float rstd,
                                        float along_unit, float along_one) {
#pragma unroll
    for (int i = 0; i < V; i++) dx[i] = rstd * (dx[i] - unit[i] * along_unit - along_one);
}

// What else there is of the sum's gradient. Rounded before and after, as torch adds two gradients:
// whether the addition is in the norm's pass, or beside a norm that is made again, no bit differs.
template <class T, int V>
__device__ __forceinline__ void add_gradient(float (&dx)[V], Pack<T, V> dsum) {
    float more[V];
    dsum.unpack(more);
    Pack<T, V>::of(dx).unpack(dx);
#pragma unroll
    for (int i = 0; i < V; i++) dx[i] = __fadd_rn(dx[i], more[i]);
}

// Adds what the rows of a block have of a share, in their order, and writes it: `mine` are the sums
// of V columns from `column` on.
template <int V>
__device__ __forceinline__ void add_rows(float* share, float* shared, int column, int n,
                                         const float (&mine)[V]) {
    constexpr int SOME = 4;
    const int wide = blockDim.x * V, first = column - threadIdx.x * V;
    const int number = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
    store_narrow<V>(shared + threadIdx.y * wide + threadIdx.x * V, mine);
    __syncthreads();
    for (int i = number * SOME; i < min(wide, n - first); i += threads * SOME) {
        float total[SOME] = {};
#pragma unroll 1
        for (int y = 0; y < int(blockDim.y); y++) {
            float one[SOME];
            load_wide<SOME>(shared + y * wide + i, one);
#pragma unroll
            for (int j = 0; j < SOME; j++) total[j] += one[j];
        }
        store_narrow<SOME>(share + first + i, total);
    }
    __syncthreads();
}

constexpr int MOST_BACKWARD_THREADS = 512;  // of 65,536 registers, with 128 each

// Bytes of a block's shared memory for one row of each of its threads.
constexpr int backward_turn(int k, bool adds) {
    return (adds ? 3 : 2) * k * 16 * MOST_BACKWARD_THREADS;
}

// A row of K * V elements a thread, blockDim.y rows at once, each at its own pace. While one is worked
// on, TURNS - 1 more are on their way into shared memory, so that there is always something to move.
// CENTERED: there is a mean, or a bias.
template <class T, int V, int K, int TURNS, bool ADD, bool CENTERED>
__global__ void __launch_bounds__(MOST_BACKWARD_THREADS, 1) norm_backward(const NormBackward<T> a) {
    constexpr int INPUTS = ADD ? 3 : 2, AHEAD = TURNS - 1;
    SHARED(float, shared, OVER_ROW_FLOATS(2));
    LAUNCHED_SHARED(uint4, packs);
    OverRow<2, true> over_row(shared);
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    uint4* mine = packs + thread / WARP * (TURNS * INPUTS * K * WARP) + thread % WARP;
    const auto pack_at = [&](int turn, int input, int k) {
        return mine + ((turn * INPUTS + input) * K + k) * WARP;
    };
    const auto column = [](int k) { return (k * int(blockDim.x) + int(threadIdx.x)) * V; };
    const auto ask = [&](int64_t row, int turn) {
        if (row < a.rows)
#pragma unroll
            for (int k = 0; k < K; k++)
                if (column(k) < a.n) {
                    const int64_t from = row * a.n + column(k);
                    ask_copy(pack_at(turn, 0, k), a.x + from);
                    ask_copy(pack_at(turn, 1, k), a.dy + from);
                    if constexpr (ADD) ask_copy(pack_at(turn, 2, k), a.dsum + from);
                }
        copies_asked();
    };
    struct Statistics { float mean, rstd; };
    const auto statistics = [&](int64_t row) -> Statistics {
        if (row >= a.rows) return {};
        return {CENTERED && a.mean != nullptr ? a.mean[row] : 0.0f, a.rstd[row]};
    };
    float dweight[K][V] = {}, dbias[K][V] = {};
    const int64_t first = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    const int64_t step = int64_t(gridDim.x) * blockDim.y;
    int turn = 0;
#pragma unroll
    for (int i = 0; i < AHEAD; i++) ask(first + i * step, i);
    Statistics next = statistics(first);
    for (int64_t row = first; row < a.rows; row += step) {
        ask(row + AHEAD * step, turn == 0 ? AHEAD : turn - 1);
        const Statistics of_row = next;
        next = statistics(row + step);
        wait_for_copies<AHEAD>();
        // The normalised row, the gradient of y, and that times the weight.
        const auto terms = [&](int k, float (&unit)[V], float (&along)[V], float (&g)[V]) {
            Pack<T, V>{*pack_at(turn, 0, k)}.unpack(unit);
            Pack<T, V>{*pack_at(turn, 1, k)}.unpack(along);
            a.affine.template load<V, T>(a.affine.weight, column(k), g);
#pragma unroll
            for (int i = 0; i < V; i++) {
                unit[i] = (unit[i] - of_row.mean) * of_row.rstd;
                g[i] *= along[i];
            }
        };
        Values<CENTERED ? 2 : 1> sums = {};
#pragma unroll
        for (int k = 0; k < K; k++)
            if (column(k) < a.n) {
                float unit[V], along[V], g[V];
                terms(k, unit, along, g);
#pragma unroll
                for (int i = 0; i < V; i++) {
                    dweight[k][i] += along[i] * unit[i];
                    if constexpr (CENTERED) dbias[k][i] += along[i];
                    sums.v[0] += g[i] * unit[i];
                    if constexpr (CENTERED) sums.v[1] += g[i];
                }
            }
        sums = over_row.sum(sums);
        const float along_unit = sums.v[0] * a.part;
        float along_one = 0.0f;
        if constexpr (CENTERED) along_one = a.mean != nullptr ? sums.v[1] * a.part : 0.0f;
#pragma unroll
        for (int k = 0; k < K; k++)
            if (column(k) < a.n) {
                float unit[V], along[V], g[V];
                terms(k, unit, along, g);
                norm_dx(g, unit, of_row.rstd, along_unit, along_one);
                if constexpr (ADD) add_gradient(g, Pack<T, V>{*pack_at(turn, 2, k)});
                store_once<T, V>(a.dx + row * a.n + column(k), Pack<T, V>::of(g));
            }
        turn = turn == AHEAD ? 0 : turn + 1;
    }
    __syncthreads();  // no row needs its packs any more
    auto* rows = reinterpret_cast<float*>(packs);
    const int64_t share = int64_t(blockIdx.x) * a.n;
#pragma unroll
    for (int k = 0; k < K; k++) {
        add_rows<V>(a.dweight + share, rows, column(k), a.n, dweight[k]);
        if (CENTERED && a.dbias != nullptr)
            add_rows<V>(a.dbias + share, rows, column(k), a.n, dbias[k]);
    }
}

// Rows of any length: dx alone, a block for each row.
template <class T, int V, bool ADD> __global__ void norm_backward_rows(const NormBackward<T> a) {
    SHARED(float, shared, OVER_ROW_FLOATS(2));
    OverRow<2> over_row(shared);
    const int64_t row = blockIdx.x, at = row * a.n;
    const float mean = a.mean != nullptr ? a.mean[row] : 0.0f, rstd = a.rstd[row];
    const auto each = [&](auto use) {
        for (int column = threadIdx.x * V; column < a.n; column += blockDim.x * V) {
            float unit[V], g[V], weight[V];
            load<T, V>(a.x + at + column).unpack(unit);
            load<T, V>(a.dy + at + column).unpack(g);
            a.affine.template load<V, T>(a.affine.weight, column, weight);
#pragma unroll
            for (int i = 0; i < V; i++) {
                unit[i] = (unit[i] - mean) * rstd;
                g[i] *= weight[i];
            }
            use(column, g, unit);
        }
    };
    Values<2> along = {};
    each([&](int, const float(&g)[V], const float(&unit)[V]) {
#pragma unroll
        for (int i = 0; i < V; i++) {
            along.v[0] += g[i] * unit[i];
            along.v[1] += g[i];
        }
    });
    along = over_row.sum(along);
    const float along_unit = along.v[0] * a.part;
    const float along_one = a.mean != nullptr ? along.v[1] * a.part : 0.0f;
    each([&](int column, float(&g)[V], const float(&unit)[V]) {
        norm_dx(g, unit, rstd, along_unit, along_one);
        if constexpr (ADD) add_gradient(g, load_once<T, V>(a.dsum + at + column));
        store_once<T, V>(a.dx + at + column, Pack<T, V>::of(g));
    });
}

constexpr int TILE_ROWS = 8;

// Rows of any length: shares of the weight's and the bias' gradients. gridDim.y shares.
template <class T> __global__ void norm_backward_columns(const NormBackward<T> a) {
    SHARED(float, tile, TILE * TILE_ROWS);
    const int column = blockIdx.x * TILE + threadIdx.x;
    float dweight = 0.0f, dbias = 0.0f;
    const int64_t step = int64_t(gridDim.y) * TILE_ROWS;
    if (column < a.n)
        for (int64_t row = blockIdx.y * TILE_ROWS + threadIdx.y; row < a.rows; row += step) {
            const float mean = a.mean != nullptr ? a.mean[row] : 0.0f;
            const float g = wide(a.dy[row * a.n + column]);
            dweight += g * (wide(a.x[row * a.n + column]) - mean) * a.rstd[row];
            dbias += g;
        }
    dweight = tile_sum(dweight, tile, TILE_ROWS);
    if (a.dbias != nullptr) dbias = tile_sum(dbias, tile, TILE_ROWS);
    if (threadIdx.y == 0 && column < a.n) {
        a.dweight[int64_t(blockIdx.y) * a.n + column] = dweight;
        if (a.dbias != nullptr) a.dbias[int64_t(blockIdx.y) * a.n + column] = dbias;
    }
}

}  // namespace megalite
