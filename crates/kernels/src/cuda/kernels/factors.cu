// The two thin products of the way back of a group of low-rank products, which read the same rows.
//
// Equation: slopes_i = s_i dy_i B_i, dB_i += s_i dy_i^T u_i, for each of up to three members i
// Shapes:   dy_i [n, outputs_i] bf16 at column first_i of dy, B_i [outputs_i, rank_i] bf16, u_i and slopes_i [n, rank_i] bf16 at
//           column row_i of u and of slopes, dB_i [outputs_i, rank_i] f32; outputs, ranks, columns and strides are multiples of 8,
//           ranks at most RANK, addresses multiples of 16
// Cost:     dy is read once. A block has 256 columns of one member and a range of rows; from one copy of 64 rows in shared memory
//           both products are made. Its part of the slopes is added to `sums` tile by tile, that of dB once at the end. The order
//           of these additions is not fixed
#include "hopper.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int COLUMNS = 256, TILE = 64;

/// One of the projections that read the same rows.
struct Member {
    const bf16 *b;
    float *d_b;  // null: not wanted
    int first, outputs, row, rank;
    float scale;
    int strip;  // number of its first strip of columns
};

struct Members {
    Member member[3];
};

/// Copies 16 bytes to shared memory, or zeros.
__device__ __forceinline__ void copy_chunk(uint32_t to, const bf16 *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

__device__ __forceinline__ void add(float *to, float a, float b, float c, float d) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d)
                 : "memory");
}

/// B of the strip is the transpose, 64 columns a tile; u has rows of 2 RANK bytes, the width of its swizzle.
template <int RANK, int STAGES> struct FactorsShared {
    bf16 dy[STAGES][TILE * COLUMNS];
    bf16 b[COLUMNS * RANK];
    bf16 u[STAGES][TILE * RANK];
};

/// Describes a tile with rows of RANK values whose swizzle is as wide as they are.
template <int RANK> __device__ __forceinline__ uint64_t narrow_tile(uint32_t address) {
    constexpr uint64_t SWIZZLE = RANK == 16 ? 3 : RANK == 32 ? 2 : 1;
    return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | 1ull << 16 | static_cast<uint64_t>(RANK) << 32 | SWIZZLE << 62;
}

/// Where rank `k` is in a tile of B, so that a thread's values of 16 of them are four neighbours.
__device__ __forceinline__ int place_of(int k) { return (k & ~15) | (k & 2) << 2 | (k & 12) >> 1 | (k & 1); }

template <int RANK, int STAGES>
__device__ __forceinline__ void factors(const bf16 *dy, int dy_stride, const bf16 *u, int u_stride, bf16 *slopes,
                                        int slopes_stride, float *sums, int *done, int n, int range, const Members &members,
                                        char *memory) {
    auto &shared = *reinterpret_cast<FactorsShared<RANK, STAGES> *>(memory);
    const int thread = threadIdx.x, strip = blockIdx.x;
    const int which = strip >= members.member[1].strip ? strip >= members.member[2].strip ? 2 : 1 : 0;
    const Member m = members.member[which];
    const int column = (strip - m.strip) * COLUMNS, width = min(COLUMNS, m.outputs - column);
    const int begin = blockIdx.y * range, end = min(n, begin + range), tiles = (end - begin + TILE - 1) / TILE;
    sums += static_cast<size_t>(which) * n * RANK;

    const bf16 *const dy_from = dy + m.first + column, *const u_from = u + m.row;
    auto fetch = [&](int t) {
        if (t < tiles) {
            const uint32_t to = shared_address(shared.dy[t % STAGES]), u_to = shared_address(shared.u[t % STAGES]);
            const int row = begin + t * TILE, chunk = thread % 32;
#pragma unroll
            for (int i = thread / 32; i < TILE; i += 4) {
                const bool there = row + i < end && chunk * 8 < width;
                const bf16 *from = there ? dy_from + static_cast<size_t>(row + i) * dy_stride + chunk * 8 : dy;
                copy_chunk(to + chunk / 8 * (TILE * 128) + i * 128 + ((chunk % 8) ^ (i % 8)) * 16, from, there);
            }
            constexpr int CHUNKS = RANK / 8;
#pragma unroll
            for (int k = 0; k < TILE * CHUNKS / 128; k++) {
                const int i = (thread + k * 128) / CHUNKS, c = thread % CHUNKS, at = i * RANK * 2 + c * 16;
                const bool there = row + i < end && c * 8 < m.rank;
                const bf16 *from = there ? u_from + static_cast<size_t>(row + i) * u_stride + c * 8 : u;
                copy_chunk(u_to + (at ^ ((at >> 7) % CHUNKS) << 4), from, there);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };

    constexpr int PIECES = COLUMNS * RANK / 8 / 128;
    uint4 piece[PIECES];
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const int i = thread + p * 128, c = i % COLUMNS, k = i / COLUMNS * 8;
        piece[p] = make_uint4(0, 0, 0, 0);
        if (c < width && k < m.rank) {
            piece[p] = __ldg(reinterpret_cast<const uint4 *>(m.b + static_cast<size_t>(column + c) * m.rank + k));
        }
    }
#pragma unroll
    for (int t = 0; t < STAGES - 1; t++) fetch(t);
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const int i = thread + p * 128, c = i % COLUMNS, k = i / COLUMNS * 8;
        const bf16 *v = reinterpret_cast<const bf16 *>(&piece[p]);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int row = place_of(k + j);
            shared.b[c / 64 * (RANK * 64) + row * 64 + ((c / 8 % 8) ^ (row % 8)) * 8 + c % 8] = v[j];
        }
    }

    float d_b[COLUMNS / 64][RANK / 2] = {};
    const int row = 16 * (thread / 32) + thread % 32 / 4, quarter = thread % 4;
    const uint32_t b_at = shared_address(shared.b);
    for (int t = 0; t < tiles; t++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        fence_async();
        __syncthreads();
        const uint32_t at = shared_address(shared.dy[t % STAGES]), u_at = shared_address(shared.u[t % STAGES]);
        float s[RANK / 2];
        products_begin();
#pragma unroll
        for (int k = 0; k < COLUMNS / 16; k++) {
            const int tile_of = k / 4, within = k % 4 * 32;
            multiply<0, 0>(s, tile(at + tile_of * (TILE * 128) + within, 16), tile(b_at + tile_of * (RANK * 128) + within, 16),
                           k > 0);
        }
        products_commit();
#pragma unroll
        for (int k = 0; k < TILE / 16; k++) {
            const uint64_t u_tile = narrow_tile<RANK>(u_at + k * 32 * RANK);
#pragma unroll
            for (int c = 0; c < COLUMNS / 64; c++) {
                multiply<1, 1>(d_b[c], tile(at + c * (TILE * 128) + k * 2048, 16), u_tile, 1);
            }
        }
        products_commit();
        // Into the tile before this one, whose products are done.
        fetch(t + STAGES - 1);
        products_wait<1>();
        pin(s);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = begin + t * TILE + row + 8 * half;
            float *to = sums + static_cast<size_t>(i) * RANK + 4 * quarter;
#pragma unroll
            for (int k = 0; k < RANK / 16; k++) {
                const float *v = s + 8 * k + 2 * half;
                if (i < end && 16 * k + 4 * quarter < m.rank) add(to + 16 * k, v[0], v[1], v[4], v[5]);
            }
        }
        products_wait<0>();
#pragma unroll
        for (int c = 0; c < COLUMNS / 64; c++) pin(d_b[c]);
    }

    __syncthreads();
    const int strips = (m.outputs + COLUMNS - 1) / COLUMNS;
    int *const here = done + which * gridDim.y + blockIdx.y;
    if (thread == 0) {
        // What the block added is there before it says so.
        __threadfence();
        atomicAdd(here, 1);
    }
    if (m.d_b) {
        float *to = reinterpret_cast<float *>(memory);
#pragma unroll
        for (int c = 0; c < COLUMNS / 64; c++) {
#pragma unroll
            for (int k = 0; k < RANK / 4; k++) {
                const int i = 64 * c + row + 8 * (k % 2), rank = k / 2 * 8 + 2 * quarter;
                if (rank < m.rank) {
                    *reinterpret_cast<float2 *>(to + i * m.rank + rank) =
                        make_float2(m.scale * d_b[c][2 * k], m.scale * d_b[c][2 * k + 1]);
                }
            }
        }
        fence_async();
    }
    __syncthreads();
    if (thread == 0) {
        if (m.d_b) add_bytes(m.d_b + static_cast<size_t>(column) * m.rank, memory, width * m.rank * 4);
        int count;
        do {
            asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(count) : "l"(here) : "memory");
        } while (count < strips);
        // The last to leave clears the way for the next launch.
        if (atomicAdd(here, 1) == 2 * strips - 1) *here = 0;
    }
    __syncthreads();
    constexpr int CHUNKS = RANK / 8, STEP = 128 / CHUNKS;
    const int c = thread % CHUNKS * 8;
    for (int r = begin + (strip - m.strip) * STEP + thread / CHUNKS; r < end && c < m.rank; r += strips * STEP) {
        float4 *from = reinterpret_cast<float4 *>(sums + static_cast<size_t>(r) * RANK + c);
        const float4 a = __ldcg(from), b = __ldcg(from + 1);
        from[0] = from[1] = make_float4(0, 0, 0, 0);
        const float s = m.scale;
        *reinterpret_cast<uint4 *>(slopes + static_cast<size_t>(r) * slopes_stride + m.row + c) =
            make_uint4(pack(s * a.x, s * a.y), pack(s * a.z, s * a.w), pack(s * b.x, s * b.y), pack(s * b.z, s * b.w));
    }
    if (thread == 0) added();
}

/// Blocks: strips of all members, ranges of rows, all of them running at the same time. `sums` [members, n, RANK] and `done`
/// [members, ranges] are zeros, and are left so.
#define FACTORS(rank, stages)                                                                                              \
    extern "C" __global__ void __launch_bounds__(128, 2)                                                                   \
        factors_##rank(const bf16 *dy, int dy_stride, const bf16 *u, int u_stride, bf16 *slopes, int slopes_stride,        \
                       float *sums, int *done, int n, int range, const __grid_constant__ Members members) {                \
        extern __shared__ __align__(1024) char memory[];                                                                   \
        factors<rank, stages>(dy, dy_stride, u, u_stride, slopes, slopes_stride, sums, done, n, range, members, memory);   \
    }

FACTORS(16, 3)
FACTORS(32, 2)
FACTORS(64, 2)

#endif
