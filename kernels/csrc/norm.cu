// Launches of norm.cuh: which form of a kernel, how many threads.
#include "norm.cuh"

namespace megalite {
namespace {

constexpr int most(int threads) { return std::min(threads, MOST_FORWARD_THREADS); }

template <class T, int V, int K, bool ADD> int forward(const NormForward<T>& a, void* stream) {
    const int threads = K > 0 ? row_threads(a.n, V, K) : most(row_threads(a.n, V, 1));
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

struct Shares {
    int count;    // of the weight's gradient
    int blocks;   // of the one-pass form
    int threads;  // of a row
    int rows;     // of a block
    bool one_pass;
};

// `blocks` to fill the device, of which a multiple for short rows would only add shares.
Shares shares_of(int64_t n, int element, int64_t blocks, bool packs) {
    const int threads = row_threads(n, 16 / element, 4);
    if (!packs || threads > MOST_BACKWARD_THREADS) return {int(blocks), 0, 0, 0, false};
    const int rows = threads == WARP ? 4 : 1;
    return {int(blocks) * rows, int(blocks), threads, rows, true};
}

template <class T, bool ADD>
int backward(const NormBackward<T>& a, const Shares& shares, void* stream) {
    constexpr int V = 16 / sizeof(T);
    if (shares.one_pass)
        return launch(norm_backward<T, V, 4, ADD>, dim3(shares.blocks),
                      dim3(shares.threads, shares.rows), stream, a);
    const bool packs = a.n % V == 0 && aligned(16, a.dx, a.dy, a.x, a.dsum, a.affine.weight);
    const dim3 row_block(most(row_threads(a.n, packs ? V : 1, 1)));
    auto* rows = packs ? norm_backward_rows<T, V, ADD> : norm_backward_rows<T, 1, ADD>;
    if (int error = launch(rows, dim3(a.rows), row_block, stream, a)) return error;
    return launch(norm_backward_columns<T>, dim3(ceil_div(a.n, TILE), shares.count),
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
                                  eps};
        return residual ? forward<T, true>(a, stream) : forward<T, false>(a, stream);
    });
}

// How many rows `shares` must have below, if every tensor is aligned to 16 bytes or not.
EXPORT int64_t megalite_norm_backward_shares(int dtype, int64_t n, int64_t blocks, int aligned16) {
    const int element = dtype == FP32 ? 4 : 2;
    return shares_of(n, element, blocks, aligned16 && n % (16 / element) == 0).count;
}

// dx, dy, x, dsum [rows, n] of `dtype`; dsum or null is added to dx. shares [1 or 2, count, n] of
// float32 is scratch: the second half is for the bias. dweight and dbias [n] as the weight; dbias
// null: there is no bias. mean null: RMSNorm.
EXPORT int megalite_norm_backward(int dtype, void* dx, void* dweight, void* dbias, float* shares,
                                  const void* dy, const void* x, const void* dsum,
                                  const void* weight, int in_fp32, const float* mean,
                                  const float* rstd, int64_t rows, int64_t n, int64_t blocks,
                                  int aligned16, void* stream) {
    return with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        const bool packs = aligned16 && n % (16 / sizeof(T)) == 0;
        const Shares found = shares_of(n, sizeof(T), blocks, packs);
        float* for_bias = dbias ? shares + found.count * n : nullptr;
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
                                   int(n)};
        const int count = rows == 0 ? 0 : found.count;
        if (rows > 0) {
            const int error = dsum ? backward<T, true>(a, found, stream)
                                   : backward<T, false>(a, found, stream);
            if (error) return error;
        }
        const auto sum = in_fp32 ? sum_shares<float> : sum_shares<T>;
        if (int error = sum(dweight, shares, count, n, stream)) return error;
        return dbias ? sum(dbias, for_bias, count, n, stream) : 0;
    });
}
