// The products of one decoding step: a few rows of activations times frozen weights, each of which is read once.
//
// Equation: y = g (W n + B u r) + bias [+ residual] for W [d_out, d_in], or act(gate) up with gate and up such sums;
//           n = x r gain with r = 1 / sqrt(mean(x^2) + eps), or n = x and r = 1; u_next += A_next y, over all outputs
// Shapes:   x, y [m, .] bf16, m <= 32; u [m, ranks], u_next [m, next], A_next [next, d_out], B of each member [d_out, rank], gains
//           and biases [d_out] f32
// Cost:     one pass over W, whose loads are in flight while earlier ones are multiplied, and before x is known. The sums of
//           u_next are added up in the order in which blocks finish, so last bits differ from run to run
#include "act.cuh"
#include "step.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS;
/// Rows of W of a tile, and columns of them that a warp has in flight at once.
constexpr int ROWS = 16, CHUNK = 128, PIECES = CHUNK / 32;
/// Sums of one row of x in shared memory.
constexpr int SUMS = ROWS + 4;

/// Up to three maps one below the other: first row in W, first column in u, rank, place of B.
struct Members {
    int count, first[3], row[3], rank[3], at[3], unused[6];
};

__device__ __forceinline__ void multiply(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                         unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ int padded(int floats) { return (floats + 3) / 4 * 4; }

/// x r gain, eight values from a column on.
__device__ __forceinline__ uint4 normalised(uint4 raw, float r, const float *gain, int column) {
    float v[8], w[8];
    unpack(raw, v);
    *reinterpret_cast<float4 *>(w) = __ldg(reinterpret_cast<const float4 *>(gain + column));
    *reinterpret_cast<float4 *>(w + 4) = __ldg(reinterpret_cast<const float4 *>(gain + column) + 1);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        v[i] = v[i] * r * w[i];
    }
    return pack(v);
}

/// A weight and what it is applied to.
struct Input {
    const bf16 *w;
    int w_stride, d_in, d_out;
    /// The row of W that goes with row 0 where outputs are act(gate) up; else 0.
    int second;
    const bf16 *x;
    int x_stride;
    /// Gain of the norm, or null.
    const float *norm;
    float eps;
    int m;
};

/// Shared rows of x: a row begins 64 bytes after a multiple of 128, so that eight threads of a load meet no bank twice.
__device__ __forceinline__ int staged_stride(int d_in) { return (d_in + 63) / 64 * 64 + 32; }

/// Brings the rows of x into shared memory, in the background.
__device__ __forceinline__ void bring_rows(const Input &in, bf16 *xs) {
    const int stride = staged_stride(in.d_in);
    for (int c = threadIdx.x * 8; c < in.d_in; c += THREADS * 8) {
#pragma unroll 4
        for (int row = 0; row < in.m; row++) {
            copy_fresh(xs + row * stride + c, at_row(in.x, in.x_stride, row) + c);
        }
    }
}

/// r of each row, and the rows in shared memory normalised if they are there.
template <bool STAGED> __device__ __forceinline__ void normalise_rows(const Input &in, float *rstd, float *scratch, bf16 *xs) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, stride = staged_stride(in.d_in);
    // Rows at once, and warps of each.
    int rows = 1;
    while (rows < in.m && rows < WARPS) {
        rows *= 2;
    }
    const int warps = WARPS / rows, from = (warp % warps * 32 + lane) * 8, step = warps * 256;
    for (int base = 0; base < in.m; base += rows) {
        const int row = base + warp / warps;
        const bool live = row < in.m;
        float squares = 0.f;
        if (live) {
#pragma unroll 4
            for (int c = from; c < in.d_in; c += step) {
                float v[8];
                unpack(STAGED ? *reinterpret_cast<const uint4 *>(xs + row * stride + c)
                              : load_fresh(at_row(in.x, in.x_stride, row) + c),
                       v);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    squares = fmaf(v[i], v[i], squares);
                }
            }
        }
        squares = sum_warp(squares);
        if (warps > 1) {
            if (lane == 0) {
                scratch[warp] = squares;
            }
            __syncthreads();
            squares = 0.f;
            for (int i = 0; i < warps; i++) {
                squares += scratch[warp / warps * warps + i];
            }
        }
        const float r = rsqrtf(squares / in.d_in + in.eps);
        if (live && from == 0) {
            rstd[row] = r;
        }
        if (STAGED && live) {
            for (int c = from; c < in.d_in; c += step) {
                uint4 *at = reinterpret_cast<uint4 *>(xs + row * stride + c);
                *at = normalised(*at, r, in.norm, c);
            }
        }
    }
}

/// `n` groups of eight rows of activations.
template <int N, bool STAGED>
__device__ __forceinline__ void
run(const Input &in, const float *u, int ranks, int most, const float *b, const Members &members, const float *gain,
    const float *bias, const bf16 *residual, bf16 *out, int out_stride, const float *a_next, float *u_next, int next, int kind) {
    extern __shared__ uint4 shared[];
    const int m = in.m, b_stride = most | 1;
    float *part = reinterpret_cast<float *>(shared);
    float *rstd = part + WARPS * 8 * N * SUMS;
    // Four zeros, which stand for rows and columns that x does not have.
    float *none = rstd + 32;
    float *us = none + 4;
    float *un = us + padded(m * ranks);
    float *ys = un + padded(m * next);
    float *as = ys + ROWS * 8 * N;
    float *bs = as + ROWS * next;
    bf16 *xs = reinterpret_cast<bf16 *>(bs + padded(ROWS * b_stride));
    const int x_stride = staged_stride(in.d_in);

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int outs = in.second ? ROWS / 2 : ROWS, tiles = (in.d_out + outs - 1) / outs;
    // Every warp takes as many steps a tile, past the end too, and two at a time.
    const int steps = ((in.d_in + CHUNK - 1) / CHUNK + 2 * WARPS - 1) / (2 * WARPS) * 2;
    const uint64_t policy = leave_first();

    // The weights of the step to be loaded next.
    int load_tile = blockIdx.x, load_step = 0;
    const auto load = [&](uint4 (&v)[PIECES][2]) {
        const int o = load_tile * outs + g, column = (warp + load_step * WARPS) * CHUNK + t * 8;
        const int below = in.second ? in.second + o : o + 8;
        const bool first = load_tile < tiles && o < in.d_out;
        const bool last = load_tile < tiles && (in.second ? o : o + 8) < in.d_out;
        const bf16 *p = at_row(in.w, in.w_stride, o) + column, *q = at_row(in.w, in.w_stride, below) + column;
#pragma unroll
        for (int s = 0; s < PIECES; s++) {
            const bool inside = column + s * 32 < in.d_in;
            v[s][0] = load_once(p + s * 32, first && inside, policy);
            v[s][1] = load_once(q + s * 32, last && inside, policy);
        }
        if (++load_step == steps) {
            load_step = 0;
            load_tile += gridDim.x;
        }
    };
    uint4 even[PIECES][2], odd[PIECES][2];
    load(even);
    load(odd);
    let_next_start();

    // The row of W of a row of a tile, and the map that it belongs to.
    const auto row_of = [&](int tile, int r) {
        return in.second ? (r < 8 ? 0 : in.second - 8) + tile * outs + r : tile * outs + r;
    };
    const auto member_of = [&](int row) {
        int k = 0;
        while (k + 1 < members.count && row >= members.first[k + 1]) {
            k++;
        }
        return k;
    };
    const auto begin = [&](int tile) {
        for (int i = threadIdx.x; i < ROWS * most; i += THREADS) {
            const int r = i / most, j = i - r * most, row = row_of(tile, r), k = member_of(row);
            if (tile * outs + r % outs < in.d_out && j < members.rank[k]) {
                copy_in<4>(bs + r * b_stride + j,
                           b + members.at[k] + static_cast<size_t>(row - members.first[k]) * members.rank[k] + j);
            }
        }
        for (int i = threadIdx.x; i < next * (outs / 4); i += THREADS) {
            const int j = i / (outs / 4), r = i % (outs / 4) * 4, o = tile * outs + r;
            if (o < in.d_out) {
                copy_in<16>(as + j * ROWS + r, a_next + static_cast<size_t>(j) * in.d_out + o);
            }
        }
        // The two halves of a tile, which may lie apart.
        if (threadIdx.x < 2 && tile * outs + (in.second ? 0 : 8 * threadIdx.x) < in.d_out) {
            const int row = row_of(tile, 8 * threadIdx.x);
            if (gain) {
                prefetch(gain + row);
            }
            if (bias) {
                prefetch(bias + row);
            }
        }
    };
    begin(blockIdx.x);
    if (in.norm && threadIdx.x * 32 < in.d_in) {
        prefetch(in.norm + threadIdx.x * 32);
    }
    wait_for_results();
    if (STAGED) {
        bring_rows(in, xs);
    }
    for (int i = threadIdx.x; i < m * ranks; i += THREADS) {
        us[i] = __ldcg(u + i);
    }
    for (int i = threadIdx.x; i < m * next; i += THREADS) {
        un[i] = 0.f;
    }
    if (threadIdx.x < 4) {
        none[threadIdx.x] = 0.f;
    }
    if (STAGED) {
        wait_for_copies();
        __syncthreads();
    }
    if (in.norm) {
        normalise_rows<STAGED>(in, rstd, part, xs);
    }
    __syncthreads();

    float sums[N][4] = {};
    const auto multiply_step = [&](const uint4 (&v)[PIECES][2], int step) {
        const int column = (warp + step * WARPS) * CHUNK + t * 8;
#pragma unroll
        for (int s = 0; s < PIECES; s++) {
            const int c = column + s * 32;
#pragma unroll
            for (int n = 0; n < N; n++) {
                const int row = n * 8 + g;
                const bool has = row < m && c < in.d_in;
                uint4 x;
                if (STAGED) {
                    x = *reinterpret_cast<const uint4 *>(has ? static_cast<const void *>(xs + row * x_stride + c) : none);
                } else {
                    x = load_fresh(has ? at_row(in.x, in.x_stride, row) + c : in.x);
                    if (in.norm && has) {
                        x = normalised(x, rstd[row], in.norm, c);
                    }
                    x = has ? x : make_uint4(0, 0, 0, 0);
                }
                multiply(sums[n], v[s][0].x, v[s][1].x, v[s][0].y, v[s][1].y, x.x, x.y);
                multiply(sums[n], v[s][0].z, v[s][1].z, v[s][0].w, v[s][1].w, x.z, x.w);
            }
        }
    };
    // The sum of all warps for row r of the tile and row c of x, with what is beside W: by `lanes` neighbouring threads.
    const auto value = [&](int tile, int r, int c, int lanes) {
        const int own = threadIdx.x % lanes, row = row_of(tile, r);
        float sum = 0.f, beside = 0.f;
        for (int i = own; i < WARPS; i += lanes) {
            sum += part[(i * 8 * N + c) * SUMS + r];
        }
        if (most > 0) {
            const int k = member_of(row);
            const float *left = bs + r * b_stride, *right = us + c * ranks + members.row[k];
#pragma unroll 4
            for (int j = own; j < members.rank[k]; j += lanes) {
                beside = fmaf(left[j], right[j], beside);
            }
        }
        sum = fmaf(beside, in.norm ? rstd[c] : 1.f, sum);
        for (int o = lanes / 2; o > 0; o /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, o);
        }
        sum *= gain ? __ldg(gain + row) : 1.f;
        return sum + (bias ? __ldg(bias + row) : 0.f);
    };
    // Threads of one result where there are few: a power of two that a warp has.
    const auto lanes_of = [](int results) {
        int lanes = 1;
        while (lanes < 32 && 2 * lanes * results <= THREADS) {
            lanes *= 2;
        }
        return lanes;
    };
    const int lanes = lanes_of(outs * m), next_lanes = lanes_of(max(1, m * next));
    const auto finish = [&](int tile) {
        float *mine = part + warp * 8 * N * SUMS;
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                mine[(n * 8 + 2 * t + i % 2) * SUMS + g + i / 2 * 8] = sums[n][i];
                sums[n][i] = 0.f;
            }
        }
        wait_for_copies();
        __syncthreads();
        // As many rounds for every thread: a result's threads add up together.
        for (int base = 0; base < outs * m; base += THREADS / lanes) {
            const int at = base + threadIdx.x / lanes, i = min(at, outs * m - 1);
            const int r = i % outs, c = i / outs, o = tile * outs + r;
            // Rows past the end are those of the last one, and are not written.
            const int inside = min(r, in.d_out - 1 - tile * outs);
            float y = value(tile, inside, c, lanes);
            const float up = in.second ? value(tile, inside + 8, c, lanes) : 0.f;
            if (at >= outs * m || threadIdx.x % lanes != 0) {
                continue;
            }
            if (o >= in.d_out) {
                y = 0.f;
            } else {
                if (in.second) {
                    by_kind(kind, [&](auto which) { y = act<decltype(which)::value>(y).value; });
                    y *= up;
                }
                bf16 *const to = at_row(out, out_stride, c) + o;
                if (residual) {
                    const bf16 *const before = at_row(residual, out_stride, c) + o;
                    y += __uint_as_float(static_cast<unsigned>(__ldcg(reinterpret_cast<const unsigned short *>(before))) << 16);
                }
                const bf16 rounded = __float2bfloat16_rn(y);
                *to = rounded;
                y = __bfloat162float(rounded);
            }
            ys[c * ROWS + r] = y;
        }
        __syncthreads();
        if (next > 0) {
            const int width = min(outs, in.d_out - tile * outs);
            for (int base = 0; base < m * next; base += THREADS / next_lanes) {
                const int at = base + threadIdx.x / next_lanes, i = min(at, m * next - 1), c = i / next, j = i - c * next;
                float sum = 0.f;
#pragma unroll 4
                for (int r = threadIdx.x % next_lanes; r < width; r += next_lanes) {
                    sum = fmaf(as[j * ROWS + r], ys[c * ROWS + r], sum);
                }
                for (int o = next_lanes / 2; o > 0; o /= 2) {
                    sum += __shfl_xor_sync(0xffffffffu, sum, o);
                }
                if (at < m * next && threadIdx.x % next_lanes == 0) {
                    un[i] += sum;
                }
            }
            __syncthreads();
        }
    };
    // Each piece of code is there once: between two kernels of a step the weights have driven it out of the caches.
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        if (tile != blockIdx.x) {
            begin(tile);
        }
#pragma unroll 1
        for (int step = 0; step < steps; step += 2) {
            multiply_step(even, step);
            load(even);
            multiply_step(odd, step + 1);
            load(odd);
        }
        finish(tile);
    }
    for (int i = threadIdx.x; i < m * next; i += THREADS) {
        atomicAdd(u_next + i, un[i]);
    }
}

#define ROWS_KERNEL(name, n, staged, blocks)                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, blocks) name(                                                    \
        const bf16 *w, int w_stride, int d_in, int d_out, int second, const bf16 *x, int x_stride, const float *norm,      \
        float eps, const float *u, int ranks, int most, const float *b, const __grid_constant__ Members members,           \
        const float *gain,                                                                                                 \
        const float *bias, const bf16 *residual, bf16 *out, int out_stride, const float *a_next, float *u_next, int next,  \
        int kind, int m) {                                                                                                 \
        const Input in{w, w_stride, d_in, d_out, second, x, x_stride, norm, eps, m};                                       \
        run<n, staged>(in, u, ranks, most, b, members, gain, bias, residual, out, out_stride, a_next, u_next, next, kind); \
    }

ROWS_KERNEL(decode_rows_8, 1, true, 2)
ROWS_KERNEL(decode_rows_16, 2, true, 2)
ROWS_KERNEL(decode_rows_32, 4, true, 1)
ROWS_KERNEL(decode_rows_8_direct, 1, false, 2)
ROWS_KERNEL(decode_rows_16_direct, 2, false, 1)
ROWS_KERNEL(decode_rows_32_direct, 4, false, 1)
