// Launches of adamw.cuh.
#include "adamw.cuh"

using namespace megalite;

namespace {

template <class G, class C> int adamw_of(const AdamW<G, C>& a, void* stream) {
    constexpr int V = 4;  // of float32, which most are; a narrower gradient or copy takes 8 bytes
    const bool packs = aligned(16, a.master, a.average, a.average_square, a.copy, a.gradient);
    auto* kernel = packs ? adamw<V, G, C> : adamw<1, G, C>;
    const int64_t each = int64_t(ADAMW_THREADS) * ADAMW_PACKS * (packs ? V : 1);
    return launch(kernel, dim3(ceil_div(a.n, each)), dim3(ADAMW_THREADS), stream, a);
}

}  // namespace

// All [n]; master and averages of float32, gradient of `dtype`, copy of `copy_dtype` or null.
// factor and skip: one float32 on the device, or null. step counts from 1.
EXPORT int megalite_adamw(int dtype, float* master, float* average, float* average_square,
                          const void* gradient, void* copy, int copy_dtype, const float* factor,
                          const float* skip, int64_t n, int64_t step, float lr, float beta1,
                          float beta2, float eps, float weight_decay, void* stream) {
    if (n == 0) return 0;
    const double unbias1 = 1.0 / (1.0 - std::pow(double(beta1), double(step)));
    const double unbias2_root = 1.0 / std::sqrt(1.0 - std::pow(double(beta2), double(step)));
    return with_type(dtype, [&](auto g) {
        return with_type(copy_dtype, [&](auto c) {
            using G = decltype(g);
            using C = decltype(c);
            const AdamW<G, C> a = {master,
                                   average,
                                   average_square,
                                   static_cast<C*>(copy),
                                   static_cast<const G*>(gradient),
                                   factor,
                                   skip,
                                   n,
                                   lr,
                                   beta1,
                                   beta2,
                                   eps,
                                   weight_decay,
                                   float(unbias1),
                                   float(unbias2_root)};
            return adamw_of(a, stream);
        });
    });
}
