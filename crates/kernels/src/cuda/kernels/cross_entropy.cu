// Cross entropy of rows of scores against labels, and its gradient in place of the scores.
//
// Equation: loss = ln sum_j e^(x_j) - x_label;  x_j <- scale (e^(x_j) / sum - [j = label])
//           a label that is not below the vocabulary gives loss 0 and gradient 0
// Shapes:   scores [rows, vocab] bf16, labels [rows] u32, losses [rows] f32
// Cost:     one read and one write: a row stays in the registers and shared memory of one block, and each thread asks for its
//           part of the block's next row as soon as it has written the same part of this one. What does not fit is read twice.
#include "eight.cuh"

/// Threads a block, and chunks of eight values that each holds in registers.
constexpr int THREADS = 512, HELD = 12;
/// Chunks taken together from shared or global memory.
constexpr int BATCH = 4;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
/// Below every score, and finite.
constexpr float LOWEST = -1e30f;

/// Part of a sum of exponentials: sum * 2^most, with `most` the largest exponent so far.
struct Partial {
    float most, sum;
};

/// Eight scores that count for nothing.
__device__ __forceinline__ uint4 nothing() { return make_uint4(0xff80ff80u, 0xff80ff80u, 0xff80ff80u, 0xff80ff80u); }

__device__ __forceinline__ __nv_bfloat162 as_pair(unsigned raw) { return *reinterpret_cast<__nv_bfloat162 *>(&raw); }

template <int N> __device__ __forceinline__ void absorb(const uint4 (&raw)[N], Partial &part) {
    __nv_bfloat162 top = as_pair(raw[0].x);
#pragma unroll
    for (int k = 0; k < N; k++) {
        const __nv_bfloat162 low = __hmax2(as_pair(raw[k].x), as_pair(raw[k].y));
        top = __hmax2(top, __hmax2(low, __hmax2(as_pair(raw[k].z), as_pair(raw[k].w))));
    }
    const float most = fmaxf(part.most, LOG2E * fmaxf(__low2float(top), __high2float(top)));
    float sums[4] = {};
#pragma unroll
    for (int k = 0; k < N; k++) {
        float v[8];
        unpack(raw[k], v);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sums[i % 4] += exp2f(fmaf(v[i], LOG2E, -most));
        }
    }
    part.sum = fmaf(part.sum, exp2f(part.most - most), (sums[0] + sums[1]) + (sums[2] + sums[3]));
    part.most = most;
}

__device__ __forceinline__ void absorb_one(float x, Partial &part) {
    const float most = fmaxf(part.most, LOG2E * x);
    part.sum = fmaf(part.sum, exp2f(part.most - most), exp2f(fmaf(x, LOG2E, -most)));
    part.most = most;
}

/// The sum over a warp, in each of its threads.
__device__ __forceinline__ Partial over_warp(Partial part) {
    float most = part.most;
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, o));
    }
    float sum = part.sum * exp2f(part.most - most);
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        sum += __shfl_xor_sync(0xffffffffu, sum, o);
    }
    return {most, sum};
}

/// The sum over the block, in each of its threads; `parts` may be used again after the next barrier.
__device__ __forceinline__ Partial over_block(Partial part, Partial (&parts)[THREADS / 32]) {
    const int lane = threadIdx.x % 32;
    part = over_warp(part);
    if (lane == 0) {
        parts[threadIdx.x / 32] = part;
    }
    __syncthreads();
    return over_warp(lane < THREADS / 32 ? parts[lane] : Partial{LOWEST, 0.f});
}

/// ln sum - score, from the same rounded differences as the sum.
__device__ __forceinline__ float loss_of(Partial all, float score) {
    return LN2 * (log2f(all.sum) - fmaf(score, LOG2E, -all.most));
}

__device__ __forceinline__ void copy_later(uint4 *to, const bf16 *from) {
    const unsigned slot = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(slot), "l"(from) : "memory");
}

__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

/// Rows begin at multiples of 16 bytes. `slots`: chunks that each thread may keep in shared memory.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    cross_entropy(bf16 *scores, int stride, const unsigned *labels, float *losses, float scale, int gradient, int slots,
                  int rows, int vocab) {
    extern __shared__ uint4 shared[];
    __shared__ Partial parts[2][THREADS / 32];
    const int tid = threadIdx.x, chunks = vocab / 8, rest = chunks * 8 + tid;
    const int each = (chunks + THREADS - 1) / THREADS, kept = max(min(slots, each - HELD), 0);
    int row = blockIdx.x;
    if (row >= rows) {
        return;
    }
    bf16 *x = at_row(scores, stride, row);
    uint4 held[HELD];
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        const int c = k * THREADS + tid;
        held[k] = c < chunks ? load_raw<true>(x + c * 8, 8) : nothing();
    }
    for (int k = 0; k < kept; k++) {
        const int c = (HELD + k) * THREADS + tid;
        if (c < chunks) {
            copy_later(shared + k * THREADS + tid, x + c * 8);
        }
    }
    // The last values, less than a chunk, are one to a thread.
    float last = rest < vocab ? __bfloat162float(x[rest]) : 0.f;
    unsigned label = labels[row];
    for (int turn = 0; row < rows; turn ^= 1) {
        const int next = row + gridDim.x;
        const bool more = next < rows, counts = label < static_cast<unsigned>(vocab);
        bf16 *ahead = at_row(scores, stride, more ? next : row);
        const float score = tid == 0 && counts ? __bfloat162float(x[label]) : 0.f;
        const unsigned label_ahead = more ? labels[next] : 0u;

        Partial part = {LOWEST, 0.f};
        absorb(held, part);
        forget(held);
        if (rest < vocab) {
            absorb_one(last, part);
        }
        copies_done();
        for (int k = 0; k < kept; k += BATCH) {
            uint4 raw[BATCH];
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                const bool there = k + j < kept && (HELD + k + j) * THREADS + tid < chunks;
                raw[j] = there ? shared[(k + j) * THREADS + tid] : nothing();
            }
            absorb(raw, part);
        }
        for (int k = HELD + kept; k < each; k += BATCH) {
            uint4 raw[BATCH];
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                const int c = (k + j) * THREADS + tid;
                raw[j] = c < chunks ? load_raw<true>(x + c * 8, 8) : nothing();
            }
            absorb(raw, part);
        }
        const Partial all = over_block(part, parts[turn]);
        if (tid == 0) {
            losses[row] = counts ? loss_of(all, score) : 0.f;
        }

        const float log_sum = all.most + log2f(all.sum), factor = counts ? scale : 0.f;
        const int label_chunk = counts ? static_cast<int>(label / 8) : -1;
        const auto finish = [&](uint4 raw, int c) {
            float v[8];
            unpack(raw, v);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                v[i] = factor * exp2f(fmaf(v[i], LOG2E, -log_sum));
            }
            if (c == label_chunk) {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    v[i] -= i == static_cast<int>(label % 8) ? factor : 0.f;
                }
            }
            store_raw<true>(x + c * 8, 8, pack(v));
        };
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            const int c = k * THREADS + tid;
            if (c < chunks) {
                if (gradient) {
                    finish(held[k], c);
                }
                held[k] = load_raw<true>(ahead + c * 8, 8);
            }
        }
        if (rest < vocab) {
            if (gradient) {
                const float v = factor * exp2f(fmaf(last, LOG2E, -log_sum));
                x[rest] = __float2bfloat16_rn(v - (static_cast<unsigned>(rest) == label ? factor : 0.f));
            }
            last = __bfloat162float(ahead[rest]);
        }
        for (int k = 0; k < kept; k++) {
            const int c = (HELD + k) * THREADS + tid;
            if (c < chunks) {
                uint4 *slot = shared + k * THREADS + tid;
                if (gradient) {
                    finish(*slot, c);
                }
                if (more) {
                    copy_later(slot, ahead + c * 8);
                }
            }
        }
        for (int k = HELD + kept; gradient && k < each; k += BATCH) {
            uint4 raw[BATCH];
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                const int c = (k + j) * THREADS + tid;
                raw[j] = c < chunks ? load_raw<true>(x + c * 8, 8) : nothing();
            }
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                const int c = (k + j) * THREADS + tid;
                if (c < chunks) {
                    finish(raw[j], c);
                }
            }
        }
        row = next;
        x = ahead;
        label = label_ahead;
    }
}

/// Rows that begin anywhere: one block a row, three reads.
extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy_scalar(bf16 *scores, int stride, const unsigned *labels, float *losses, float scale, int gradient, int,
                         int rows, int vocab) {
    __shared__ Partial parts[THREADS / 32];
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        bf16 *x = at_row(scores, stride, row);
        const unsigned label = labels[row];
        const bool counts = label < static_cast<unsigned>(vocab);
        const float score = counts ? __bfloat162float(x[label]) : 0.f;
        Partial part = {LOWEST, 0.f};
        for (int c = threadIdx.x; c < vocab; c += THREADS) {
            absorb_one(__bfloat162float(x[c]), part);
        }
        const Partial all = over_block(part, parts);
        if (threadIdx.x == 0) {
            losses[row] = counts ? loss_of(all, score) : 0.f;
        }
        const float log_sum = all.most + log2f(all.sum), factor = counts ? scale : 0.f;
        for (int c = threadIdx.x; gradient && c < vocab; c += THREADS) {
            const float v = factor * exp2f(fmaf(__bfloat162float(x[c]), LOG2E, -log_sum));
            x[c] = __float2bfloat16_rn(v - (static_cast<unsigned>(c) == label ? factor : 0.f));
        }
        __syncthreads();
    }
}
