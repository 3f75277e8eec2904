// What the parts of the decoding kernel share: the description of a step, barriers of a block and of the
// whole grid, and copies into shared memory.
//
// Source: PTX ISA 8.x, sections mbarrier, cp.async.bulk and the memory consistency model
#pragma once
#include "eight.cuh"
#include "hopper.cuh"

/// Phases of a step. All blocks end one before any begins the next.
enum Work { ENTER, PRODUCT, ATTEND, BEST };

/// One phase, as `decode/phase.rs` writes it.
struct Phase {
    const bf16 *w;
    /// What goes with eight rows of W: see `beside` in decode.cu.
    const float *beside;
    const bf16 *x;
    bf16 *out;
    /// The results times the gain of the norm after them, or null.
    bf16 *scaled;
    const bf16 *residual;
    /// Of ENTER and ATTEND: the rows of the next A, and of ENTER the gain of the norm.
    const float *a_next, *gain;
    bf16 *keys, *values;
    int kind, w_stride;
    int x_stride, out_stride;
    /// Columns of W, and groups of eight outputs.
    int d_in, groups;
    /// Rows of W from gate to up where outputs are act(gate) up; else 0. Blocks' first tile.
    int second, first;
    int ranks, most;
    int next, record;
    int act, norm;
    float eps, scale;
    int heads, kv_heads;
    int head_dim, together;
    int capacity, window;
    int vocab, half;
    int team, unused;
};

/// One step.
struct Token {
    const Phase *phases;
    unsigned *counter;
    /// Three buffers of `u_size` values that take turns: read, added to, made zero.
    float *u;
    unsigned *ids, *places;
    const unsigned *firsts;
    const float *cos, *sin;
    int count, m;
    int u_size, stages;
    int records, record;
    int scratch, unused;

    /// Eights of rows that the kernel is made for.
    __device__ __forceinline__ int eights() const { return m <= 8 ? 1 : m <= 16 ? 2 : 4; }

    /// The sums that phase `p` reads, and those that it adds to.
    __device__ __forceinline__ float *read(int p) const { return u + p % 3 * u_size; }

    __device__ __forceinline__ float *add(int p) const { return read(p + 1); }
};

/// Warps that multiply and attend, warps that finish sums, and of four more one that brings weights and one that meets the grid.
constexpr int WARPS = 8, FINISHERS = 4, STREAM = WARPS + FINISHERS, MEET = STREAM + 1;
constexpr int THREADS = 32 * (STREAM + 4);
/// Threads that multiply, that finish, and all that a phase ends for.
constexpr int MULTIPLYING = 32 * WARPS, FINISHING = 32 * FINISHERS, ALL = MULTIPLYING + FINISHING + 32;
/// Columns of W that a warp multiplies at once, and all warps together.
constexpr int OWN = 256, COLUMNS = WARPS * OWN;

/// Values of a row of u: the ranks, the sum of squares, and some more.
__host__ __device__ __forceinline__ int row_of_u(int ranks) { return (ranks + 8) / 8 * 8; }

/// Where a value is in rows as products read them: 8 rows by 32 columns lie together, first all of the same columns, `eights`
/// times eight rows; eight columns of a row are neighbours.
__device__ __forceinline__ size_t in_tiles(int eights, int row, int column) {
    return static_cast<size_t>(column / 32 * eights + row / 8) * 256 + (row % 8 * 4 + column % 32 / 8) * 8 + column % 8;
}

__device__ __forceinline__ float wide(bf16 x) { return __bfloat162float(x); }

__device__ __forceinline__ uint4 load_fresh(const bf16 *p) { return __ldcg(reinterpret_cast<const uint4 *>(p)); }

/// One value that another block wrote.
__device__ __forceinline__ float fresh(const bf16 *p) {
    return __uint_as_float(static_cast<unsigned>(__ldcg(reinterpret_cast<const unsigned short *>(p))) << 16);
}

__device__ __forceinline__ void prefetch(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

__device__ __forceinline__ float sum_warp(float v) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        v += __shfl_xor_sync(0xffffffffu, v, o);
    }
    return v;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// Brings bytes into shared memory, in the background.
__device__ __forceinline__ void copy_bytes(void *to, const void *from, int bytes, uint64_t *barrier, uint64_t policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
                 : "memory");
}

/// What is read once leaves the second-level cache first: activations and earlier keys stay there.
__device__ __forceinline__ uint64_t leave_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

/// Adds four values that lie together.
__device__ __forceinline__ void add_four(float *to, float4 v) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

/// Tells those at barrier `id`, and goes on.
__device__ __forceinline__ void meet_later(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// By one thread, after the others of its block: waits until `blocks` blocks have come here.
__device__ __forceinline__ void meet_grid(unsigned *counter, unsigned blocks) {
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
    unsigned seen;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (seen < blocks);
}

#endif
