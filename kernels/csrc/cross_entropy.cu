// Launches of cross_entropy.cuh.
#include "cross_entropy.cuh"

using namespace megalite;

namespace {

dim3 threads_for(int64_t n, int v) {
    return dim3(std::min(row_threads(n, v, 1), CROSS_ENTROPY_THREADS));
}

}  // namespace

// x [rows, n] of `dtype`, of whose columns `known` are in the vocabulary. label [rows]: this rank's
// column, or any number outside it. top [rows], sums [3, rows] of float32.
EXPORT int megalite_cross_entropy_forward(int dtype, float* top, float* sums, const void* x,
                                          const int64_t* label, int64_t rows, int64_t n,
                                          int64_t known, void* stream) {
    if (rows == 0) return 0;
    return with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int V = 16 / sizeof(T);
        const CrossEntropyForward<T> a = {top, sums, static_cast<const T*>(x), label, rows,
                                          int(n), int(known)};
        const bool packs = n % V == 0 && aligned(16, x);
        auto* kernel = packs ? cross_entropy_forward<T, V> : cross_entropy_forward<T, 1>;
        return launch(kernel, dim3(rows), threads_for(n, packs ? V : 1), stream, a);
    });
}

// x becomes its gradient. lse and scale [rows] of float32; vocabulary: columns of all ranks that
// are known.
EXPORT int megalite_cross_entropy_backward(int dtype, void* x, const float* lse, const float* scale,
                                           const int64_t* label, int64_t rows, int64_t n,
                                           int64_t known, int64_t vocabulary, float smoothing,
                                           float z, void* stream) {
    if (rows == 0) return 0;
    return with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int V = 16 / sizeof(T);
        const CrossEntropyBackward<T> a = {static_cast<T*>(x), lse,        scale,     label, int(n),
                                           int(known),         vocabulary, smoothing, z};
        const bool packs = n % V == 0 && aligned(16, x);
        auto* kernel = packs ? cross_entropy_backward<T, V> : cross_entropy_backward<T, 1>;
        return launch(kernel, dim3(rows), threads_for(n, packs ? V : 1), stream, a);
    });
}
