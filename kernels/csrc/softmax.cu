// Launches of softmax.cuh.
#include "softmax.cuh"

namespace megalite {
namespace {

constexpr int64_t FAR = int64_t(1) << 40;  // beyond any sequence

// Packs of 16 bytes if every row starts at a multiple of that, single elements if not; as many of
// them in registers as a row needs.
template <class T, class Launch> int by_form(int64_t keys, bool packs, Launch launch_form) {
    constexpr int V = 16 / sizeof(T);
    using std::integral_constant;
    const auto form = [&](auto v, auto k) {
        const int threads = row_threads(keys, v, k > 0 ? int(k) : 1);
        return launch_form(v, k, std::min(threads, MOST_SOFTMAX_THREADS));
    };
    if (!packs) return form(integral_constant<int, 1>{}, integral_constant<int, 0>{});
    if (row_threads(keys, V, 4) <= MOST_SOFTMAX_THREADS)
        return form(integral_constant<int, V>{}, integral_constant<int, 4>{});
    return form(integral_constant<int, V>{}, integral_constant<int, 0>{});
}

dim3 block_of(int threads) { return dim3(threads, threads == WARP ? 4 : 1); }

template <class T> bool whole_packs(const Broadcast<T>& b, int v) {
    return aligned(v * sizeof(T), b.at) && b.batch % v == 0 && b.head % v == 0 && b.query % v == 0;
}

Seen seen_of(int64_t heads, int64_t queries, int64_t keys, int causal, int64_t window) {
    return {int(heads),       int(queries),
            int(keys),        keys - queries,
            window > 0 ? window : FAR, causal != 0};
}

}  // namespace
}  // namespace megalite

using namespace megalite;

// x, y [batch, heads, queries, keys] of `dtype`, contiguous. mask (one byte each, 0: not seen) and
// bias (`dtype`), or null: their strides in elements for batch, heads and queries; keys are
// contiguous. causal: the last query sees the last key, and so on. window: keys it sees at most,
// 0 for all; needs causal.
EXPORT int megalite_softmax_forward(int dtype, void* y, const void* x, const void* mask,
                                    int64_t mask_batch, int64_t mask_head, int64_t mask_query,
                                    const void* bias, int64_t bias_batch, int64_t bias_head,
                                    int64_t bias_query, int64_t batch, int64_t heads,
                                    int64_t queries, int64_t keys, int causal, int64_t window,
                                    float scale, void* stream) {
    const int64_t rows = batch * heads * queries;
    if (rows == 0 || keys == 0) return 0;
    return with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Softmax<T> a = {static_cast<T*>(y),
                              static_cast<const T*>(x),
                              {static_cast<const uint8_t*>(mask), mask_batch, mask_head, mask_query},
                              {static_cast<const T*>(bias), bias_batch, bias_head, bias_query},
                              seen_of(heads, queries, keys, causal, window),
                              rows,
                              scale};
        constexpr int V = 16 / sizeof(T);
        const bool packs = keys % V == 0 && aligned(16, y, x) && whole_packs(a.mask, V) &&
                           whole_packs(a.bias, V);
        return by_form<T>(keys, packs, [&](auto v, auto k, int threads) {
            const dim3 block = block_of(threads);
            return launch(softmax_forward<T, v, k>, dim3(ceil_div(rows, block.y)), block, stream, a);
        });
    });
}

// dx, dy, y as above.
EXPORT int megalite_softmax_backward(int dtype, void* dx, const void* dy, const void* y,
                                     int64_t batch, int64_t heads, int64_t queries, int64_t keys,
                                     int causal, int64_t window, float scale, void* stream) {
    const int64_t rows = batch * heads * queries;
    if (rows == 0 || keys == 0) return 0;
    return with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        const SoftmaxBackward<T> a = {static_cast<T*>(dx),
                                      static_cast<const T*>(dy),
                                      static_cast<const T*>(y),
                                      seen_of(heads, queries, keys, causal, window),
                                      rows,
                                      scale};
        const bool packs = keys % (16 / sizeof(T)) == 0 && aligned(16, dx, dy, y);
        return by_form<T>(keys, packs, [&](auto v, auto k, int threads) {
            const dim3 block = block_of(threads);
            return launch(softmax_backward<T, v, k>, dim3(ceil_div(rows, block.y)), block, stream,
                          a);
        });
    });
}
