// Factors of low-rank products in the border of a frozen weight, and gains over the norms of its rows.
//
// Equation: gain_i = magnitude_i / |w_i + s b_i A|
// Shapes:   whole [d_out + ranks, d_in + ranks] bf16 with W at the left and above: A [ranks, d_in] goes below it, s B at its
//           right, a block [d_out of the member, rank] for each of up to three members, zeros beside the blocks
#include "eight.cuh"

/// Outputs, first output, first rank, rank and place of B (in values) of up to three members, and their factors.
struct Members {
    int count, outputs[3], first[3], row[3], rank[3], b[3];
    float scale[3];
};

extern "C" __global__ void low_rank_border(bf16 *whole, int stride, int d_out, int d_in, const float *values, int a,
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
extern "C" __global__ void low_rank_row_squares(const bf16 *w, int stride, float *out, int d_out, int d_in) {
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

/// One map: W [d_out, d_in], A [rank, d_in] and B [d_out, rank] as the products read them, and magnitudes, gains and 1 / norm [d_out].
struct Map {
    const bf16 *w, *a, *b;
    const float *magnitude;
    float *gain, *inverse;
    long long stride, d_out, rank, scale;
};

struct Maps {
    Map map[3];
};

/// Rows of W of a block, and its warps, which share out the columns.
constexpr int ROWS = 16, WARPS = 8;

/// Two values of rows of B, the second one's in the upper half; 0 beyond the rank.
__device__ __forceinline__ unsigned pair_of(const bf16 *row, int k, int rank) {
    const unsigned short *p = reinterpret_cast<const unsigned short *>(row);
    return (k < rank ? p[k] : 0u) | (k + 1 < rank ? static_cast<unsigned>(p[k + 1]) << 16 : 0u);
}

/// gain = magnitude / |w_i + s b_i A| of each output: the sums s b_i A of 16 rows and 8 columns are one product of fragments, which
/// no memory ever sees. A thread holds eight neighbouring values of two rows of W, so a product's columns are every fourth pair.
/// ONE: no rank is above 16, so that factors of B stay in registers and loads of the next columns are not held up.
template <bool VECTOR, bool ONE> __device__ __forceinline__ void gains(const Maps &maps, int d_in) {
    __shared__ float totals[WARPS][ROWS];
    int tile = blockIdx.x, which = 0;
    while (which < 2 && tile >= (maps.map[which].d_out + ROWS - 1) / ROWS) {
        tile -= (maps.map[which++].d_out + ROWS - 1) / ROWS;
    }
    const Map &m = maps.map[which];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int d_out = m.d_out, rank = m.rank, first = tile * ROWS, steps = ONE ? 1 : (rank + 15) / 16;
    const float scale = __uint_as_float(static_cast<unsigned>(m.scale));
    // Rows past the end are the last one again.
    const int upper = min(first + g, d_out - 1), lower = min(first + g + 8, d_out - 1);
    const bf16 *const w[2] = {at_row(m.w, m.stride, upper), at_row(m.w, m.stride, lower)};
    const bf16 *const b[2] = {m.b + static_cast<size_t>(upper) * rank, m.b + static_cast<size_t>(lower) * rank};
    const auto factors = [&](int step, unsigned (&left)[4]) {
        const int k = 16 * step + 2 * t;
        left[0] = pair_of(b[0], k, rank), left[1] = pair_of(b[1], k, rank);
        left[2] = pair_of(b[0], k + 8, rank), left[3] = pair_of(b[1], k + 8, rank);
    };
    unsigned left[4];
    factors(0, left);
    float squares[2] = {};
#pragma unroll(ONE ? 4 : 1)
    for (int base = warp * 32; base < d_in; base += WARPS * 32) {
        const int column = base + t * 8, segment = base + g / 2 * 8;
        uint4 raw[2] = {};
        if (column < d_in) {
            raw[0] = load_raw<VECTOR>(w[0] + column, d_in - column);
            raw[1] = load_raw<VECTOR>(w[1] + column, d_in - column);
        }
        float sums[4][4] = {};
        for (int step = 0; step < steps; step++) {
            if (!ONE) {
                factors(step, left);
            }
            uint4 right[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int k = 16 * step + 2 * t + i % 2 + i / 2 * 8;
                const bool inside = k < rank && segment < d_in;
                right[i] = inside ? load_raw<VECTOR>(m.a + static_cast<size_t>(k) * d_in + segment, d_in - segment)
                                  : make_uint4(0, 0, 0, 0);
            }
            const unsigned *const k0 = &right[0].x, *const k1 = &right[1].x, *const k8 = &right[2].x, *const k9 = &right[3].x;
            // The lower or the upper halves of two words.
            const unsigned halves = g % 2 ? 0x7632 : 0x5410;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const unsigned b0 = __byte_perm(k0[j], k1[j], halves), b1 = __byte_perm(k8[j], k9[j], halves);
                asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                    "{%0, %1, %2, %3};"
                    : "+f"(sums[j][0]), "+f"(sums[j][1]), "+f"(sums[j][2]), "+f"(sums[j][3])
                    : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(b0), "r"(b1));
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float v[8];
            unpack(raw[h], v);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float sum = fmaf(scale, sums[i / 2][2 * h + i % 2], v[i]);
                squares[h] = fmaf(sum, sum, squares[h]);
            }
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        squares[h] += __shfl_xor_sync(0xffffffffu, squares[h], 1);
        squares[h] += __shfl_xor_sync(0xffffffffu, squares[h], 2);
        if (t == 0) {
            totals[warp][8 * h + g] = squares[h];
        }
    }
    __syncthreads();
    const int row = first + threadIdx.x;
    if (threadIdx.x < ROWS && row < d_out) {
        float square = 0.f;
#pragma unroll
        for (int k = 0; k < WARPS; k++) {
            square += totals[k][threadIdx.x];
        }
        const float norm = sqrtf(square);
        m.inverse[row] = 1.f / norm;
        m.gain[row] = m.magnitude[row] / norm;
    }
}

#define GAINS(name, vector, one)                                                                                           \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) name(const __grid_constant__ Maps maps, int d_in) {           \
        gains<vector, one>(maps, d_in);                                                                                    \
    }

GAINS(low_rank_gains_16, true, true)
GAINS(low_rank_gains, true, false)
GAINS(low_rank_gains_scalar, false, false)
