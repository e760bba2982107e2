// Launches of norm.cuh: which form of a kernel, how many threads.
#include "norm.cuh"

namespace megalite {
namespace {

constexpr int OTHER_SHARED = 2 << 10;  // bytes: what a kernel declares, and what CUDA takes
constexpr int forward_threads(int threads) { return std::min(threads, MOST_FORWARD_THREADS); }

template <class T, int V, int K, bool ADD> int forward(const NormForward<T>& a, void* stream) {
    const int threads = K > 0 ? row_threads(a.n, V, K) : forward_threads(row_threads(a.n, V, 1));
    const int rows = threads == WARP ? 4 : 1;  // of a block
    return launch(norm_forward<T, V, K, ADD>, dim3(ceil_div(a.rows, rows)), dim3(threads, rows),
                  stream, a);
}

template <class T, bool ADD> int forward(const NormForward<T>& a, void* stream) {
    constexpr int V = 16 / sizeof(T);
    const bool packs = a.n % V == 0 && aligned(16, a.y, a.sum, a.x, a.residual, a.affine.weight,
                                               a.affine.bias);
    if (!packs) return forward<T, 1, 0, ADD>(a, stream);
    if (row_threads(a.n, V, 4) <= MOST_FORWARD_THREADS) return forward<T, V, 4, ADD>(a, stream);
    if (row_threads(a.n, V, 8) <= MOST_FORWARD_THREADS) return forward<T, V, 8, ADD>(a, stream);
    return forward<T, V, 0, ADD>(a, stream);
}

// In one pass where a block holds a row, and as many rows at once as it has threads for: alike on all
// GPUs, so that sums have one order. Where shared memory is short, fewer rows are asked for ahead.
template <class T, int K, int TURNS, bool ADD>
int backward_turns(const NormBackward<T>& a, dim3 block, int shares, void* stream) {
    constexpr int V = 16 / sizeof(T), SHARED_BYTES = TURNS * backward_turn(K, ADD);
    if constexpr (TURNS > 1)
        if (SHARED_BYTES > most_shared() - OTHER_SHARED)
            return backward_turns<T, K, TURNS - 1, ADD>(a, block, shares, stream);
    static_assert(MOST_BACKWARD_THREADS / (2 * WARP) < 16, "a barrier for each row");
    auto* kernel = a.mean != nullptr || a.dbias != nullptr
                       ? norm_backward<T, V, K, TURNS, ADD, true>
                       : norm_backward<T, V, K, TURNS, ADD, false>;
    return launch_with_shared(SHARED_BYTES, kernel, dim3(shares), block, stream, a);
}

template <class T, bool ADD> int backward(const NormBackward<T>& a, int shares, void* stream) {
    constexpr int V = 16 / sizeof(T), K = 4;
    const bool packs = a.n % V == 0 && aligned(16, a.dx, a.dy, a.x, a.dsum, a.affine.weight);
    const int threads = row_threads(a.n, V, K);
    const bool fits = backward_turn(K, ADD) <= most_shared() - OTHER_SHARED;
    if (packs && fits && threads <= MOST_BACKWARD_THREADS)
        return backward_turns<T, K, ADD ? 2 : 3, ADD>(
            a, dim3(threads, MOST_BACKWARD_THREADS / threads), shares, stream);
    const dim3 row_block(forward_threads(row_threads(a.n, packs ? V : 1, 1)));
    auto* rows = packs ? norm_backward_rows<T, V, ADD> : norm_backward_rows<T, 1, ADD>;
    if (int error = launch(rows, dim3(a.rows), row_block, stream, a)) return error;
    return launch(norm_backward_columns<T>, dim3(ceil_div(a.n, TILE), shares),
                  dim3(TILE, TILE_ROWS), stream, a);
}

}  // namespace
}  // namespace megalite

using namespace megalite;

// y, sum, x, residual [rows, n] of `dtype`; sum and residual null: nothing is added. mean and rstd
// [rows] of float32; mean null: RMSNorm. weight and bias [n] of `dtype`, or of float32 if in_fp32.
EXPORT int megalite_norm_forward(int dtype, void* y, void* sum, float* mean, float* rstd,
                                 const void* x, const void* residual, const void* weight,
                                 const void* bias, int in_fp32, int64_t rows, int64_t n, float eps,
                                 void* stream) {
    if (rows == 0) return 0;
    return with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        const NormForward<T> a = {static_cast<T*>(y),
                                  static_cast<T*>(sum),
                                  mean,
                                  rstd,
                                  static_cast<const T*>(x),
                                  static_cast<const T*>(residual),
                                  {weight, bias, in_fp32 != 0},
                                  rows,
                                  int(n),
                                  1.0f / n,
                                  eps};
        return residual ? forward<T, true>(a, stream) : forward<T, false>(a, stream);
    });
}

// dx, dy, x, dsum [rows, n] of `dtype`; dsum or null is added to dx. shares [1 or 2, count, n] of
// float32 is scratch: the second half is for the bias; `count` blocks fill the device. dweight and
// dbias [n] as the weight; dbias null: there is no bias. mean null: RMSNorm.
EXPORT int megalite_norm_backward(int dtype, void* dx, void* dweight, void* dbias, float* shares,
                                  const void* dy, const void* x, const void* dsum,
                                  const void* weight, int in_fp32, const float* mean,
                                  const float* rstd, int64_t rows, int64_t n, int64_t count,
                                  void* stream) {
    return with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        float* for_bias = dbias ? shares + count * n : nullptr;
        const NormBackward<T> a = {static_cast<T*>(dx),
                                   shares,
                                   for_bias,
                                   static_cast<const T*>(dy),
                                   static_cast<const T*>(x),
                                   static_cast<const T*>(dsum),
                                   {weight, nullptr, in_fp32 != 0},
                                   mean,
                                   rstd,
                                   rows,
                                   int(n),
                                   1.0f / n};
        if (rows > 0) {
            const int error = dsum ? backward<T, true>(a, int(count), stream)
                                   : backward<T, false>(a, int(count), stream);
            if (error) return error;
        }
        const auto sum = in_fp32 ? sum_shares<float> : sum_shares<T>;
        return sum(dweight, dbias, shares, rows > 0 ? int(count) : 0, n, stream);
    });
}
