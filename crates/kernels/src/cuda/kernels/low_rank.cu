// Factors of low-rank products in the border of a frozen weight.
//
// Shapes:   whole [d_out + ranks, d_in + ranks] bf16 with W at the left and above: A [ranks, d_in] goes below it, s B at its
//           right, a block [d_out of the member, rank] for each of up to three members, zeros beside the blocks
#include <cstdint>
#include <cuda_bf16.h>

/// Outputs, first output, first rank, rank and place of B (in values) of up to three members, and their factors.
struct Members {
    int count, outputs[3], first[3], row[3], rank[3], b[3];
    float scale[3];
};

extern "C" __global__ void border_fill(__nv_bfloat16 *whole, int stride, int d_out, int d_in, const float *values, int a,
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
