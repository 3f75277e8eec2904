// Elementwise work on rows of bf16: copies by index, zeros, rounding, gains and biases.
//
// Equation: affine: y = sums gain + bias + residual; backward: below = g gain, d_gain += sum over rows of g sums
// Shapes:   matrices [rows, width] bf16; gain, bias, d_gain [width] f32; index u32
// Cost:     one pass; each thread has eight columns of a few rows in flight
#include "eight.cuh"

/// Rows a thread.
constexpr int ROWS = 4;

/// out[i] <- x[index[i]], or out[index[i]] <- x[i].
template <bool VECTOR, bool SCATTER>
__device__ __forceinline__ void move(const bf16 *x, int x_stride, const unsigned *index, bf16 *out, int out_stride, int n,
                                     int h) {
    const Place p(h, ROWS);
    uint4 raw[ROWS];
    unsigned other[ROWS];
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        other[k] = p.row + k < n ? __ldg(index + p.row + k) : 0u;
    }
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        if (p.row + k < n) {
            raw[k] = load_raw<VECTOR>(at_row(x, x_stride, SCATTER ? p.row + k : other[k]) + p.column, p.left);
        }
    }
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        if (p.row + k < n) {
            store_raw<VECTOR>(at_row(out, out_stride, SCATTER ? other[k] : p.row + k) + p.column, p.left, raw[k]);
        }
    }
}

template <bool VECTOR>
__device__ __forceinline__ void gather(const bf16 *x, int x_stride, const unsigned *index, bf16 *out, int out_stride, int n,
                                       int h) {
    move<VECTOR, false>(x, x_stride, index, out, out_stride, n, h);
}

template <bool VECTOR>
__device__ __forceinline__ void scatter(const bf16 *x, int x_stride, const unsigned *index, bf16 *out, int out_stride, int n,
                                        int h) {
    move<VECTOR, true>(x, x_stride, index, out, out_stride, n, h);
}

template <bool VECTOR> __device__ __forceinline__ void zero(bf16 *x, int stride, int rows, int h) {
    const Place p(h, ROWS);
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        if (p.row + k < rows) {
            store_raw<VECTOR>(at_row(x, stride, p.row + k) + p.column, p.left, make_uint4(0, 0, 0, 0));
        }
    }
}

/// y <- x factor, one factor a row.
template <bool VECTOR>
__device__ __forceinline__ void scale(const bf16 *x, int x_stride, const float *factors, bf16 *y, int y_stride, int rows,
                                      int h) {
    const Place p(h, ROWS);
    uint4 raw[ROWS];
    float factor[ROWS];
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        if (p.row + k < rows) {
            raw[k] = load_raw<VECTOR>(at_row(x, x_stride, p.row + k) + p.column, p.left);
            factor[k] = __ldg(factors + p.row + k);
        }
    }
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        if (p.row + k < rows) {
            float v[8];
            unpack(raw[k], v);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                v[i] *= factor[k];
            }
            store_raw<VECTOR>(at_row(y, y_stride, p.row + k) + p.column, p.left, pack(v));
        }
    }
}

/// Eight values of a vector that may begin between multiples of 16 bytes.
template <bool VECTOR> __device__ __forceinline__ void load_anywhere(const float *p, int left, float (&v)[8]) {
    if (VECTOR && (reinterpret_cast<size_t>(p) & 15) == 0) {
        load_wide<true>(p, left, v);
    } else {
        load_wide<false>(p, left, v);
    }
}

template <bool VECTOR>
__device__ __forceinline__ void affine(const bf16 *sums, int sums_stride, const float *gain, const float *bias,
                                       const bf16 *residual, int residual_stride, bf16 *y, int y_stride, int rows, int w) {
    const Place p(w, ROWS);
    if (p.row >= rows) {
        return;
    }
    uint4 raw[ROWS], beside[ROWS];
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        if (p.row + k < rows) {
            raw[k] = load_raw<VECTOR>(at_row(sums, sums_stride, p.row + k) + p.column, p.left);
        }
    }
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        beside[k] = residual && p.row + k < rows
                        ? load_raw<VECTOR>(at_row(residual, residual_stride, p.row + k) + p.column, p.left)
                        : make_uint4(0, 0, 0, 0);
    }
    float g[8], b[8] = {};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        g[i] = 1.f;
    }
    if (gain) {
        load_anywhere<VECTOR>(gain + p.column, p.left, g);
    }
    if (bias) {
        load_anywhere<VECTOR>(bias + p.column, p.left, b);
    }
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        if (p.row + k < rows) {
            float v[8], r[8];
            unpack(raw[k], v);
            unpack(beside[k], r);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                v[i] = fmaf(v[i], g[i], b[i]) + r[i];
            }
            store_raw<VECTOR>(at_row(y, y_stride, p.row + k) + p.column, p.left, pack(v));
        }
    }
}

/// Warps of a block, each with rows of its own.
constexpr int WARPS = 8;

/// Gradients of the gains of up to three maps side by side: the first columns of the second and third, and the addresses.
struct GainGradients {
    float *to[3];
    const float *slopes;
    long long first[2];
};

/// A block has 256 columns, and of every gridDim.y pieces of WARPS * ROWS rows one.
template <bool VECTOR>
__device__ __forceinline__ void affine_back(const bf16 *g, int g_stride, const bf16 *sums, int sums_stride, const float *gain,
                                            bf16 *below, int below_stride, const GainGradients &d, int rows, int w) {
    __shared__ float totals[WARPS][8][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int column = (blockIdx.x * 32 + lane) * 8, left = w - column;
    float total[8] = {}, factor[8] = {};
    if (left > 0) {
        load_anywhere<VECTOR>(gain + column, left, factor);
        for (int row = (blockIdx.y * WARPS + warp) * ROWS; row < rows; row += gridDim.y * WARPS * ROWS) {
            uint4 grad[ROWS], raw[ROWS];
#pragma unroll
            for (int k = 0; k < ROWS; k++) {
                if (row + k < rows) {
                    grad[k] = load_raw<VECTOR>(at_row(g, g_stride, row + k) + column, left);
                    raw[k] = load_raw<VECTOR>(at_row(sums, sums_stride, row + k) + column, left);
                }
            }
#pragma unroll
            for (int k = 0; k < ROWS; k++) {
                if (row + k < rows) {
                    float up[8], v[8];
                    unpack(grad[k], up);
                    unpack(raw[k], v);
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        total[i] = fmaf(up[i], v[i], total[i]);
                        up[i] *= factor[i];
                    }
                    store_raw<VECTOR>(at_row(below, below_stride, row + k) + column, left, pack(up));
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        totals[warp][i][lane] = total[i];
    }
    __syncthreads();
    // Thread `warp` of a column's eight adds up value `warp` of each chunk.
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < WARPS; k++) {
        sum += totals[k][warp][lane];
    }
    if (warp < left) {
        const int c = column + warp, which = (c >= d.first[0]) + (c >= d.first[1]);
        float *const to = d.to[which];
        add_gain(to ? to - (which ? d.first[which - 1] : 0) : nullptr, d.slopes, c, sum);
    }
}

BOTH(rows_gather, (256), gather,
     (const bf16 *x, int x_stride, const unsigned *index, bf16 *out, int out_stride, int n, int h), x, x_stride, index, out,
     out_stride, n, h)

BOTH(rows_scatter, (256), scatter,
     (const bf16 *x, int x_stride, const unsigned *index, bf16 *out, int out_stride, int n, int h), x, x_stride, index, out,
     out_stride, n, h)

BOTH(rows_zero, (256), zero, (bf16 *x, int stride, int rows, int h), x, stride, rows, h)

BOTH(rows_scale, (256), scale,
     (const bf16 *x, int x_stride, const float *factors, bf16 *y, int y_stride, int rows, int h), x, x_stride, factors, y,
     y_stride, rows, h)

BOTH(rows_affine, (256), affine,
     (const bf16 *sums, int sums_stride, const float *gain, const float *bias, const bf16 *residual, int residual_stride,
      bf16 *y, int y_stride, int rows, int w),
     sums, sums_stride, gain, bias, residual, residual_stride, y, y_stride, rows, w)

BOTH(rows_affine_backward, (256), affine_back,
     (const bf16 *g, int g_stride, const bf16 *sums, int sums_stride, const float *gain, bf16 *below, int below_stride,
      const __grid_constant__ GainGradients d, int rows, int w),
     g, g_stride, sums, sums_stride, gain, below, below_stride, d, rows, w)

/// Up to 32 vectors and where each begins among all; the rest begin at the end.
struct Vectors {
    const float *from[32];
    long long first[33];
};

/// to <- the values of all vectors, one after the other.
extern "C" __global__ void __launch_bounds__(256) rows_concatenate(const __grid_constant__ Vectors v, float *to) {
    const long long total = v.first[32];
    for (long long i = blockIdx.x * 256ll + threadIdx.x; i < total; i += gridDim.x * 256ll) {
        int which = 0;
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
            which += v.first[which + step] <= i ? step : 0;
        }
        to[i] = v.from[which][i - v.first[which]];
    }
}

/// Rounds n values, 8 * ROWS a thread.
extern "C" __global__ void __launch_bounds__(256) rows_to_bf16(const float *from, bf16 *to, long long n) {
    const long long first = (static_cast<long long>(blockIdx.x) * blockDim.x * ROWS + threadIdx.x) * 8;
    const bool aligned = ((reinterpret_cast<size_t>(from) | reinterpret_cast<size_t>(to)) & 15) == 0;
    float v[ROWS][8];
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        const long long at = first + static_cast<long long>(k) * blockDim.x * 8;
        if (aligned && at + 8 <= n) {
            load_wide<true>(from + at, 8, v[k]);
        } else {
            load_wide<false>(from + at, static_cast<int>(max(min(n - at, 8ll), 0ll)), v[k]);
        }
    }
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        const long long at = first + static_cast<long long>(k) * blockDim.x * 8;
        if (aligned && at + 8 <= n) {
            store_raw<true>(to + at, 8, pack(v[k]));
        } else {
            store_raw<false>(to + at, static_cast<int>(max(min(n - at, 8ll), 0ll)), pack(v[k]));
        }
    }
}
