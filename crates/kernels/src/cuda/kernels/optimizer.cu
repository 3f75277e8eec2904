// AdamW over many tensors at once, and the sum of their squares.
//
// A block takes one piece of CHUNK values: `pieces` names its tensor and its place in it, 0, 1, 2, ...
// The update is that of the host bit for bit: each operation is rounded by itself, nothing is fused, nothing flushed.
#include <cstdint>

constexpr int CHUNK = 4096;
constexpr int THREADS = 256;

__device__ __forceinline__ float add(float a, float b) {
    float c;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}

__device__ __forceinline__ float sub(float a, float b) {
    float c;
    asm("sub.rn.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}

__device__ __forceinline__ float mul(float a, float b) {
    float c;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}

__device__ __forceinline__ float quotient(float a, float b) {
    float c;
    asm("div.rn.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}

__device__ __forceinline__ float root_of(float a) {
    float c;
    asm("sqrt.rn.f32 %0, %1;" : "=f"(c) : "f"(a));
    return c;
}

/// One parameter: addresses, length, and the scalars that depend on its learning rate.
struct Entry {
    float *p;
    const float *g;
    float *m;
    float *v;
    uint64_t length;
    float keep;
    float rate;
};

struct Scalars {
    float lerp, beta2, square, root, eps, scale;
};

__device__ __forceinline__ void update(float &p, float g, float &m, float &v, const Entry &entry, const Scalars &s) {
    g = mul(g, s.scale);
    m = add(m, mul(s.lerp, sub(g, m)));
    v = add(mul(v, s.beta2), mul(mul(s.square, g), g));
    float root = add(quotient(root_of(v), s.root), s.eps);
    p = sub(mul(p, entry.keep), mul(entry.rate, quotient(m, root)));
}

__device__ __forceinline__ bool aligned(const void *address) {
    return (reinterpret_cast<uintptr_t>(address) & 15) == 0;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    optimizer_adamw(const Entry *entries, const uint2 *pieces, float lerp, float beta2, float square, float root, float eps, float scale) {
    const Scalars s{lerp, beta2, square, root, eps, scale};
    const uint2 piece = pieces[blockIdx.x];
    const Entry entry = entries[piece.x];
    const uint64_t first = static_cast<uint64_t>(piece.y) * CHUNK;
    const int count = static_cast<int>(min(static_cast<uint64_t>(CHUNK), entry.length - first));
    float *p = entry.p + first, *m = entry.m + first, *v = entry.v + first;
    const float *g = entry.g + first;
    // A piece begins at a multiple of 16 bytes where its tensor does.
    const bool wide = aligned(p) && aligned(g) && aligned(m) && aligned(v);
    const int vectors = wide ? count / 4 : 0;
    for (int i = threadIdx.x; i < vectors; i += THREADS) {
        float4 p4 = reinterpret_cast<float4 *>(p)[i];
        const float4 g4 = reinterpret_cast<const float4 *>(g)[i];
        float4 m4 = reinterpret_cast<float4 *>(m)[i];
        float4 v4 = reinterpret_cast<float4 *>(v)[i];
        update(p4.x, g4.x, m4.x, v4.x, entry, s);
        update(p4.y, g4.y, m4.y, v4.y, entry, s);
        update(p4.z, g4.z, m4.z, v4.z, entry, s);
        update(p4.w, g4.w, m4.w, v4.w, entry, s);
        reinterpret_cast<float4 *>(p)[i] = p4;
        reinterpret_cast<float4 *>(m)[i] = m4;
        reinterpret_cast<float4 *>(v)[i] = v4;
    }
    for (int i = 4 * vectors + threadIdx.x; i < count; i += THREADS) {
        update(p[i], g[i], m[i], v[i], entry, s);
    }
}

/// The sum over a block of `threads` threads, always in the same order; whole in thread 0.
template <int threads> __device__ double block_sum(double value) {
    __shared__ double sums[threads / 32];
    for (int step = 16; step > 0; step /= 2) {
        value += __shfl_down_sync(0xffffffffu, value, step);
    }
    if (threadIdx.x % 32 == 0) {
        sums[threadIdx.x / 32] = value;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < threads / 32; ++warp) {
            value += sums[warp];
        }
    }
    return value;
}

struct Values {
    const float *at;
    uint64_t length;
};

/// The sum of the squares of each piece.
extern "C" __global__ void __launch_bounds__(THREADS)
    optimizer_squares(const Values *tensors, const uint2 *pieces, double *partial) {
    const uint2 piece = pieces[blockIdx.x];
    const Values tensor = tensors[piece.x];
    const uint64_t first = static_cast<uint64_t>(piece.y) * CHUNK;
    const int count = static_cast<int>(min(static_cast<uint64_t>(CHUNK), tensor.length - first));
    const float *g = tensor.at + first;
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const double value = g[i];
        sum += value * value;
    }
    sum = block_sum<THREADS>(sum);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
    }
}

/// The sum of `count` values by one block of 1024 threads.
extern "C" __global__ void __launch_bounds__(1024) optimizer_squares_total(const double *partial, int count, double *total) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += 1024) {
        sum += partial[i];
    }
    sum = block_sum<1024>(sum);
    if (threadIdx.x == 0) {
        *total = sum;
    }
}
