// Eight neighbouring bf16 values at a time, and sums over threads. VECTOR: rows begin at multiples of 16 bytes and their width is
// a multiple of 8, so that eight values are one access; otherwise each value is its own.
#pragma once
#include <cuda_bf16.h>

using bf16 = __nv_bfloat16;

/// Where a matrix begins at a row. The columns are counted from there.
template <typename T> __device__ __forceinline__ T *at_row(T *x, int stride, int row) {
    return x + static_cast<size_t>(row) * stride;
}

/// Eight values as they are in memory; those from `left` on are 0.
template <bool VECTOR> __device__ __forceinline__ uint4 load_raw(const bf16 *p, int left) {
    if constexpr (VECTOR) {
        return *reinterpret_cast<const uint4 *>(p);
    } else {
        const unsigned short *s = reinterpret_cast<const unsigned short *>(p);
        unsigned v[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            v[i] = i < left ? s[i] : 0;
        }
        return make_uint4(v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16);
    }
}

template <bool VECTOR> __device__ __forceinline__ void store_raw(bf16 *p, int left, uint4 raw) {
    if constexpr (VECTOR) {
        *reinterpret_cast<uint4 *>(p) = raw;
    } else {
        unsigned short *s = reinterpret_cast<unsigned short *>(p);
        const unsigned pair[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (i < left) {
                s[i] = static_cast<unsigned short>(pair[i / 2] >> 16 * (i % 2));
            }
        }
    }
}

__device__ __forceinline__ void unpack(uint4 raw, float (&v)[8]) {
    const unsigned pair[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        v[2 * i] = __uint_as_float(pair[i] << 16);
        v[2 * i + 1] = __uint_as_float(pair[i] & 0xffff0000u);
    }
}

__device__ __forceinline__ uint4 pack(const float (&v)[8]) {
    unsigned pair[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const __nv_bfloat162 two = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
        pair[i] = *reinterpret_cast<const unsigned *>(&two);
    }
    return make_uint4(pair[0], pair[1], pair[2], pair[3]);
}

/// Ends what the compiler knows about values, so that it unpacks them again instead of holding them in 32 bits.
template <int N> __device__ __forceinline__ void forget(uint4 (&raw)[N]) {
#pragma unroll
    for (int k = 0; k < N; k++) {
        asm volatile("" : "+r"(raw[k].x), "+r"(raw[k].y), "+r"(raw[k].z), "+r"(raw[k].w)::"memory");
    }
}

/// Eight values of an f32 vector that the kernel does not write; those from `left` on are 0.
template <bool VECTOR> __device__ __forceinline__ void load_wide(const float *p, int left, float (&v)[8]) {
    if constexpr (VECTOR) {
        const float4 *four = reinterpret_cast<const float4 *>(p);
        const float4 a = __ldg(four), b = __ldg(four + 1);
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            v[i] = i < left ? p[i] : 0.f;
        }
    }
}

/// The work of a thread of an elementwise kernel: eight columns of some rows.
struct Place {
    int row, column, left;

    /// Threads go along the columns first, then to the next `step` rows.
    __device__ __forceinline__ Place(int width, int step) {
        const unsigned across = (width + 7u) / 8u, thread = blockIdx.x * blockDim.x + threadIdx.x;
        const unsigned down = thread / across;
        row = down * step;
        column = (thread - down * across) * 8;
        left = width - column;
    }
};

/// Sums over groups of `group` threads: a power of two up to a warp, or the whole block. `parts` is for this call alone.
template <int N> __device__ __forceinline__ void sum_group(float (&v)[N], int group, float (*parts)[32]) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        if (o < group) {
#pragma unroll
            for (int i = 0; i < N; i++) {
                v[i] += __shfl_xor_sync(0xffffffffu, v[i], o);
            }
        }
    }
    if (group <= 32) {
        return;
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            parts[i][warp] = v[i];
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) {
        v[i] = lane < group / 32 ? parts[i][lane] : 0.f;
#pragma unroll
        for (int o = 16; o > 0; o >>= 1) {
            v[i] += __shfl_xor_sync(0xffffffffu, v[i], o);
        }
    }
}

/// d_gain [column] += a sum over rows, times what makes the gradient of a gain that of its parameter; addresses may be null.
__device__ __forceinline__ void add_gain(float *d_gain, const float *slopes, int column, float sum) {
    if (d_gain) {
        atomicAdd(d_gain + column, slopes ? sum * __ldg(slopes + column) : sum);
    }
}

/// Kernels `name` and `name_scalar`, which call `body<true>` and `body<false>`.
#define BOTH(name, bounds, body, parameters, ...)                                                                          \
    extern "C" __global__ void __launch_bounds__ bounds name parameters { body<true>(__VA_ARGS__); }                      \
    extern "C" __global__ void __launch_bounds__ bounds name##_scalar parameters { body<false>(__VA_ARGS__); }
