// Factors of low-rank products in the border of a frozen weight, and gains over the norms of its rows.
//
// Equation: |w_i + s b_i A|^2 = |w_i|^2 + 2 s <(W A^T)_i, b_i> + s^2 <b_i (A A^T), b_i>, gain = magnitude / norm
// Shapes:   whole [d_out + ranks, d_in + ranks] bf16 with W at the left and above: A [ranks, d_in] goes below it, s B at its
//           right, a block [d_out of the member, rank] for each of up to three members, zeros beside the blocks
#include <cstdint>
#include <cuda_bf16.h>

/// Outputs, first output, first rank, rank and place of B (in values) of up to three members, and their factors.
struct Members {
    int count, outputs[3], first[3], row[3], rank[3], b[3];
    float scale[3];
};

extern "C" __global__ void low_rank_border(__nv_bfloat16 *whole, int stride, int d_out, int d_in, const float *values, int a,
                                       int ranks, Members m) {
    long long below = static_cast<long long>(ranks) * d_in, total = below + static_cast<long long>(d_out) * ranks;
    for (long long i = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x; i < total;
         i += static_cast<long long>(gridDim.x) * blockDim.x) {
        if (i < below) {
            int row = i / d_in, column = i % d_in;
            whole[static_cast<size_t>(d_out + row) * stride + column] = __float2bfloat16_rn(values[a + i]);
            continue;
        }
        int output = (i - below) / ranks, column = (i - below) % ranks;
        float value = 0;
        for (int k = 0; k < m.count; k++) {
            int row = output - m.first[k], rank = column - m.row[k];
            if (row >= 0 && row < m.outputs[k] && rank >= 0 && rank < m.rank[k])
                value = m.scale[k] * values[m.b[k] + static_cast<size_t>(row) * m.rank[k] + rank];
        }
        whole[static_cast<size_t>(output) * stride + d_in + column] = __float2bfloat16_rn(value);
    }
}

/// |w_i|^2 of rows [d_out, d_in], one warp a row.
extern "C" __global__ void low_rank_row_squares(const __nv_bfloat16 *w, int stride, float *out, int d_out, int d_in) {
    int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= d_out) return;
    float sum = 0;
    for (int i = lane; i < d_in; i += 32) {
        float v = __bfloat162float(w[static_cast<size_t>(row) * stride + i]);
        sum = fmaf(v, v, sum);
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) out[row] = sum;
}

/// gain and 1 / norm of each output, one warp an output; `cross` is W A^T with rows of `cross_stride`, `gram` A A^T with rows of
/// `gram_stride`, `b` [d_out, rank]. Shared memory: `rank` values a warp.
extern "C" __global__ void low_rank_gain(const float *cross, int cross_stride, const float *gram, int gram_stride,
                                         const float *b, float scale, const float *square, const float *magnitude, float *gain,
                                         float *inverse, int d_out, int rank) {
    extern __shared__ float rows[];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, i = blockIdx.x * (blockDim.x / 32) + warp;
    if (i >= d_out) return;
    float *row = rows + warp * rank;
    for (int k = lane; k < rank; k += 32) row[k] = b[static_cast<size_t>(i) * rank + k];
    __syncwarp();
    float sum = 0;
    for (int k = lane; k < rank; k += 32) {
        float inner = 0;
        // The matrix is its own transpose.
        for (int l = 0; l < rank; l++) inner = fmaf(__ldg(gram + static_cast<size_t>(l) * gram_stride + k), row[l], inner);
        sum += row[k] * (2 * cross[static_cast<size_t>(i) * cross_stride + k] + scale * inner);
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) {
        float norm = sqrtf(fmaxf(square[i] + scale * sum, 0.f));
        inverse[i] = 1 / norm;
        gain[i] = magnitude[i] / norm;
    }
}
