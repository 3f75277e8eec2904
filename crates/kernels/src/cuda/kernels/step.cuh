// What the kernels of one decoding step share: a kernel starts while the one before it still runs, reads what never changes, and
// waits for the other's results before anything else.
#pragma once
#include "eight.cuh"
#include <cstdint>

/// Lets the next kernel start.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Waits for the kernels before this one. What they wrote is read past the first-level cache.
__device__ __forceinline__ void wait_for_results() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void prefetch(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

/// What is read once leaves the second-level cache first: activations, factors and the kernels themselves stay there.
__device__ __forceinline__ uint64_t leave_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

/// Sixteen bytes that are read once and never change, or zeros.
__device__ __forceinline__ uint4 load_once(const void *p, bool wanted, uint64_t policy) {
    uint4 v;
    asm volatile("{\n"
                 ".reg .pred wanted;\n"
                 "setp.ne.b32 wanted, %5, 0;\n"
                 "mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
                 "@wanted ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %6;\n"
                 "}"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p), "r"(static_cast<int>(wanted)), "l"(policy));
    return v;
}

__device__ __forceinline__ uint4 load_fresh(const bf16 *p) { return __ldcg(reinterpret_cast<const uint4 *>(p)); }

/// Copies 4 or 16 bytes into shared memory, in the background.
template <int BYTES> __device__ __forceinline__ void copy_in(void *to, const void *from) {
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(BYTES) : "memory");
}

/// Copies 16 bytes that an earlier kernel wrote into shared memory, in the background.
__device__ __forceinline__ void copy_fresh(void *to, const void *from) {
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ float sum_warp(float v) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        v += __shfl_xor_sync(0xffffffffu, v, o);
    }
    return v;
}
