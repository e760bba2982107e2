// Launches of elementwise.cuh.
#include "elementwise.cuh"

namespace megalite {
namespace {

constexpr int64_t MOST_GRID_Y = 65535;

// A row's packs over as few blocks as can be, alike; more rows in a block where they are short.
struct Shape {
    dim3 block;
    int64_t across;  // blocks of a row

    Shape(int64_t n, int v) {
        const int64_t packs = ceil_div(n, v);
        across = ceil_div(packs, ELEMENTWISE_THREADS);
        const int64_t wide = ceil_div(packs, across);
        block = dim3(wide, ELEMENTWISE_THREADS / wide);
    }
    dim3 grid(int64_t rows) const {
        return dim3(across, std::min(ceil_div(rows, block.y), MOST_GRID_Y));
    }
};

template <class Map> constexpr int pack_of() { return 16 / sizeof(typename Map::Element); }

template <class Map> int walk(const Map& map, int64_t rows, int64_t n, bool packs, void* stream) {
    constexpr int V = pack_of<Map>();
    const Shape shape(n, packs ? V : 1);
    auto* kernel = packs ? elementwise<V, Map> : elementwise<1, Map>;
    return launch(kernel, shape.grid(rows), shape.block, stream, map, rows, n);
}

// launch_with(a gate), of GeLU.
template <class Launch> int with_gate(int tanh_form, Launch launch_with) {
    return tanh_form ? launch_with(TanhGate{}) : launch_with(NormalGate{});
}

}  // namespace
}  // namespace megalite

using namespace megalite;

// y, x [rows, n] and bias [n] or null, of `dtype`.
EXPORT int megalite_gelu(int dtype, void* y, const void* x, const void* bias, int tanh_form,
                         int64_t rows, int64_t n, void* stream) {
    if (rows == 0 || n == 0) return 0;
    if (bias == nullptr) n *= rows, rows = 1;  // one long row: only its end can be uneven
    return with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        return with_gate(tanh_form, [&](auto gate) {
            const Gelu<T, decltype(gate)> map = {
                static_cast<T*>(y), {static_cast<const T*>(x), static_cast<const T*>(bias), n}};
            const bool packs = (rows == 1 || n % pack_of<decltype(map)>() == 0) &&
                               aligned(16, y, x, bias);
            return walk(map, rows, n, packs, stream);
        });
    });
}

// dx, dy, x [rows, n], dbias and bias [n] or both null, of `dtype`. shares [count, n] of float32 is
// scratch, for dbias; count is 0 where rows is.
EXPORT int megalite_gelu_backward(int dtype, void* dx, void* dbias, float* shares, const void* dy,
                                  const void* x, const void* bias, int tanh_form, int64_t rows,
                                  int64_t n, int64_t count, void* stream) {
    if (n == 0 || (rows == 0 && bias == nullptr)) return 0;
    if (bias == nullptr) n *= rows, rows = 1;
    return with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        return with_gate(tanh_form, [&](auto gate) {
            using Map = GeluBackward<T, decltype(gate)>;
            constexpr int V = pack_of<Map>();
            const Map map = {static_cast<T*>(dx),
                             static_cast<const T*>(dy),
                             {static_cast<const T*>(x), static_cast<const T*>(bias), n}};
            const bool at16 = aligned(16, dx, dy, x, bias);
            if (bias == nullptr) return walk(map, rows, n, at16, stream);
            const bool packs = n % V == 0 && at16;
            const Shape shape(n, packs ? V : 1);
            auto* kernel = packs ? gelu_backward_bias<V, T, decltype(gate)>
                                 : gelu_backward_bias<1, T, decltype(gate)>;
            if (count > 0)
                if (int error = launch(kernel, shape.grid(count), shape.block, stream, map, shares,
                                       int(count), rows))
                    return error;
            return sum_shares<T>(dbias, nullptr, shares, int(count), n, stream);
        });
    });
}

// y [rows, n], x [rows, 2 n] of `dtype`.
EXPORT int megalite_swiglu(int dtype, void* y, const void* x, int64_t rows, int64_t n,
                           void* stream) {
    if (rows == 0 || n == 0) return 0;
    return with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Swiglu<T> map = {static_cast<T*>(y), static_cast<const T*>(x), n};
        return walk(map, rows, n, n % pack_of<decltype(map)>() == 0 && aligned(16, y, x), stream);
    });
}

// dx, x [rows, 2 n], dy [rows, n] of `dtype`.
EXPORT int megalite_swiglu_backward(int dtype, void* dx, const void* dy, const void* x,
                                    int64_t rows, int64_t n, void* stream) {
    if (rows == 0 || n == 0) return 0;
    return with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        const SwigluBackward<T> map = {static_cast<T*>(dx), static_cast<const T*>(dy),
                                       static_cast<const T*>(x), n};
        const bool packs = n % pack_of<decltype(map)>() == 0 && aligned(16, dx, dy, x);
        return walk(map, rows, n, packs, stream);
    });
}

// y [tokens, batch, heads, 2 half] of `dtype`, contiguous; x the same by its strides in elements,
// cos and sin [tokens, batch, half] by theirs; each one's last dimension is contiguous.
EXPORT int megalite_rope(int dtype, void* y, const void* x, const void* cos, const void* sin,
                         int64_t x_token, int64_t x_sample, int64_t x_head, int64_t angle_token,
                         int64_t angle_sample, int64_t tokens, int64_t batch, int64_t heads,
                         int64_t half, int back, void* stream) {
    const int64_t rows = tokens * batch, n = heads * half;
    if (rows == 0 || n == 0) return 0;
    return with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Rope<T> map = {static_cast<T*>(y),
                             static_cast<const T*>(x),
                             static_cast<const T*>(cos),
                             static_cast<const T*>(sin),
                             x_token,
                             x_sample,
                             x_head,
                             angle_token,
                             angle_sample,
                             batch,
                             int(heads),
                             int(half),
                             back ? -1.0f : 1.0f};
        bool packs = aligned(16, y, x, cos, sin);
        for (int64_t size : {x_token, x_sample, x_head, angle_token, angle_sample, half})
            packs = packs && size % pack_of<decltype(map)>() == 0;
        return walk(map, rows, n, packs, stream);
    });
}

// y, x, residual [rows, n] of `dtype`; residual or null is added. row_names [rows]. Kept, and
// multiplied by `factor`, is what has a half of a hash that is at least `least`.
EXPORT int megalite_dropout(int dtype, void* y, const void* x, const void* residual,
                            const int64_t* row_names, int64_t rows, int64_t n, int64_t least,
                            float factor, void* stream) {
    if (rows == 0 || n == 0) return 0;
    return with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Dropout<T> map = {static_cast<T*>(y),
                                static_cast<const T*>(x),
                                static_cast<const T*>(residual),
                                row_names,
                                n,
                                int(least),
                                factor};
        const bool packs = n % pack_of<decltype(map)>() == 0 && aligned(16, y, x, residual);
        return walk(map, rows, n, packs, stream);
    });
}
