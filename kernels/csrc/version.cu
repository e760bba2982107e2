// What a library was built from, checked when it is loaded (megalite/ops/library.py).
#include "common.cuh"

#ifndef SOURCE_HASH
#error "kernels/build.py says what SOURCE_HASH is"
#endif

EXPORT const char* megalite_source_hash() { return SOURCE_HASH; }

EXPORT int megalite_emulated() {
#ifdef __CUDACC__
    return 0;
#else
    return 1;
#endif
}

// In words, what an error code of a launch says.
EXPORT const char* megalite_error(int code) {
    if (code < 0) return "no kernel for this dtype";
#ifdef __CUDACC__
    return cudaGetErrorString(static_cast<cudaError_t>(code));
#else
    return emulator::block.error.c_str();
#endif
}
