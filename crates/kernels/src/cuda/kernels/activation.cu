// Activations, alone and as gates, forward and backward; the backward kernels write the forward result again.
//
// Equation: forward  out = act(x), or act(gate) up
//           backward dx = d_out act'(x); d_gate = d_inner up act'(gate), d_up = d_inner act(gate)
// Shapes:   all [rows, f] bf16; results may replace inputs
// Cost:     one pass; each thread has eight columns of a few rows in flight
#include "act.cuh"
#include "eight.cuh"

/// Rows a thread: of kernels that read one or two matrices, and three.
constexpr int ROWS = 4, ROWS_OF_THREE = 2;

/// A matrix that is read or written.
struct Matrix {
    bf16 *at;
    int stride;
};

template <bool VECTOR, int N>
__device__ __forceinline__ void load_rows(const Matrix &x, const Place &p, int rows, uint4 (&raw)[N]) {
#pragma unroll
    for (int k = 0; k < N; k++) {
        if (p.row + k < rows) {
            raw[k] = load_raw<VECTOR>(at_row(x.at, x.stride, p.row + k) + p.column, p.left);
        }
    }
}

template <bool VECTOR>
__device__ __forceinline__ void store_row(const Matrix &x, const Place &p, int k, const float (&v)[8]) {
    store_raw<VECTOR>(at_row(x.at, x.stride, p.row + k) + p.column, p.left, pack(v));
}

template <bool VECTOR> __device__ __forceinline__ void forward(int kind, Matrix x, Matrix out, int rows, int f) {
    const Place p(f, ROWS);
    uint4 raw[ROWS];
    load_rows<VECTOR>(x, p, rows, raw);
    by_kind(kind, [&](auto which) {
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            if (p.row + k < rows) {
                float v[8];
                unpack(raw[k], v);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    v[i] = act<decltype(which)::value>(v[i]).value;
                }
                store_row<VECTOR>(out, p, k, v);
            }
        }
    });
}

template <bool VECTOR>
__device__ __forceinline__ void backward(int kind, Matrix x, Matrix d_out, Matrix dx, Matrix out, int rows, int f) {
    const Place p(f, ROWS);
    uint4 raw[ROWS], grad[ROWS];
    load_rows<VECTOR>(x, p, rows, raw);
    load_rows<VECTOR>(d_out, p, rows, grad);
    by_kind(kind, [&](auto which) {
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            if (p.row + k < rows) {
                float v[8], d[8];
                unpack(raw[k], v);
                unpack(grad[k], d);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const Both a = act<decltype(which)::value>(v[i]);
                    v[i] = a.value;
                    d[i] *= a.slope;
                }
                store_row<VECTOR>(out, p, k, v);
                store_row<VECTOR>(dx, p, k, d);
            }
        }
    });
}

/// Eight factors from `column` on; ones where there are none.
__device__ __forceinline__ void factors(const float *gain, int column, int left, float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        v[i] = gain && i < left ? __ldg(gain + column + i) : 1.f;
    }
}

template <bool VECTOR>
__device__ __forceinline__ void gated(int kind, Matrix gate, Matrix up, const float *gate_gain, const float *up_gain, Matrix out,
                                      int rows, int f) {
    const Place p(f, ROWS);
    float a[8], b[8];
    factors(gate_gain, p.column, p.left, a);
    factors(up_gain, p.column, p.left, b);
    uint4 raw[ROWS], other[ROWS];
    load_rows<VECTOR>(gate, p, rows, raw);
    load_rows<VECTOR>(up, p, rows, other);
    by_kind(kind, [&](auto which) {
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            if (p.row + k < rows) {
                float v[8], u[8];
                unpack(raw[k], v);
                unpack(other[k], u);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    v[i] = act<decltype(which)::value>(v[i] * a[i]).value * (u[i] * b[i]);
                }
                store_row<VECTOR>(out, p, k, v);
            }
        }
    });
}

template <bool VECTOR>
__device__ __forceinline__ void gated_back(int kind, Matrix gate, Matrix up, Matrix d_inner, Matrix d_gate, Matrix d_up,
                                           Matrix inner, int rows, int f) {
    const Place p(f, ROWS_OF_THREE);
    uint4 raw[ROWS_OF_THREE], other[ROWS_OF_THREE], grad[ROWS_OF_THREE];
    load_rows<VECTOR>(gate, p, rows, raw);
    load_rows<VECTOR>(up, p, rows, other);
    load_rows<VECTOR>(d_inner, p, rows, grad);
    by_kind(kind, [&](auto which) {
#pragma unroll
        for (int k = 0; k < ROWS_OF_THREE; k++) {
            if (p.row + k < rows) {
                float v[8], u[8], d[8];
                unpack(raw[k], v);
                unpack(other[k], u);
                unpack(grad[k], d);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const Both a = act<decltype(which)::value>(v[i]);
                    const float g = d[i];
                    v[i] = g * u[i] * a.slope;
                    d[i] = a.value * u[i];
                    u[i] = g * a.value;
                }
                store_row<VECTOR>(d_gate, p, k, v);
                store_row<VECTOR>(d_up, p, k, u);
                store_row<VECTOR>(inner, p, k, d);
            }
        }
    });
}

BOTH(activation_forward, (256), forward, (int kind, bf16 *x, int x_stride, bf16 *out, int out_stride, int rows, int f), kind,
     Matrix{x, x_stride}, Matrix{out, out_stride}, rows, f)

BOTH(activation_backward, (256), backward,
     (int kind, bf16 *x, int x_stride, bf16 *d_out, int d_out_stride, bf16 *dx, int dx_stride, bf16 *out, int out_stride,
      int rows, int f),
     kind, Matrix{x, x_stride}, Matrix{d_out, d_out_stride}, Matrix{dx, dx_stride}, Matrix{out, out_stride}, rows, f)

BOTH(activation_gated_forward, (256), gated,
     (int kind, bf16 *gate, int gate_stride, bf16 *up, int up_stride, const float *gate_gain, const float *up_gain, bf16 *out,
      int out_stride, int rows, int f),
     kind, Matrix{gate, gate_stride}, Matrix{up, up_stride}, gate_gain, up_gain, Matrix{out, out_stride}, rows, f)

BOTH(activation_gated_backward, (256), gated_back,
     (int kind, bf16 *gate, int gate_stride, bf16 *up, int up_stride, bf16 *d_inner, int d_inner_stride, bf16 *d_gate,
      int d_gate_stride, bf16 *d_up, int d_up_stride, bf16 *inner, int inner_stride, int rows, int f),
     kind, Matrix{gate, gate_stride}, Matrix{up, up_stride}, Matrix{d_inner, d_inner_stride}, Matrix{d_gate, d_gate_stride},
     Matrix{d_up, d_up_stride}, Matrix{inner, inner_stride}, rows, f)

/// Warps of a block, each with rows of its own.
constexpr int WARPS = 8;

/// The gain of a map, and where its gradient goes.
struct Gain {
    const float *values, *slopes;
    float *d;
};

/// As `gated_back` where gate and up are sums times gains: the results are for the sums, and the gradients of the gains. A block
/// has 256 columns, and of every gridDim.y pieces of WARPS rows one.
template <bool VECTOR>
__device__ __forceinline__ void gained_back(int kind, Matrix gate, Matrix up, Gain gate_gain, Gain up_gain, Matrix d_inner,
                                            Matrix d_gate, Matrix d_up, Matrix inner, int rows, int f) {
    __shared__ float totals[WARPS][8][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int column = (blockIdx.x * 32 + lane) * 8, left = f - column;
    float first[8] = {}, second[8] = {}, a[8], b[8];
    if (left > 0) {
        factors(gate_gain.values, column, left, a);
        factors(up_gain.values, column, left, b);
        by_kind(kind, [&](auto which) {
            for (int row = blockIdx.y * WARPS + warp; row < rows; row += gridDim.y * WARPS) {
                const uint4 raw = load_raw<VECTOR>(at_row(gate.at, gate.stride, row) + column, left);
                const uint4 other = load_raw<VECTOR>(at_row(up.at, up.stride, row) + column, left);
                const uint4 grad = load_raw<VECTOR>(at_row(d_inner.at, d_inner.stride, row) + column, left);
                float v[8], u[8], d[8];
                unpack(raw, v);
                unpack(other, u);
                unpack(grad, d);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const Both y = act<decltype(which)::value>(v[i] * a[i]);
                    const float z = u[i] * b[i], g = d[i] * z * y.slope, h = d[i] * y.value;
                    first[i] = fmaf(g, v[i], first[i]);
                    second[i] = fmaf(h, u[i], second[i]);
                    v[i] = g * a[i];
                    u[i] = h * b[i];
                    d[i] = y.value * z;
                }
                store_raw<VECTOR>(at_row(d_gate.at, d_gate.stride, row) + column, left, pack(v));
                store_raw<VECTOR>(at_row(d_up.at, d_up.stride, row) + column, left, pack(u));
                store_raw<VECTOR>(at_row(inner.at, inner.stride, row) + column, left, pack(d));
            }
        });
    }
#pragma unroll
    for (int which = 0; which < 2; which++) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 8; i++) {
            totals[warp][i][lane] = which ? second[i] : first[i];
        }
        __syncthreads();
        // Thread `warp` of a column's eight adds up value `warp` of each chunk.
        float sum = 0.f;
#pragma unroll
        for (int k = 0; k < WARPS; k++) {
            sum += totals[k][warp][lane];
        }
        if (warp < left) {
            const Gain &gain = which ? up_gain : gate_gain;
            add_gain(gain.d, gain.slopes, column + warp, sum);
        }
    }
}

BOTH(activation_gained_backward, (256), gained_back,
     (int kind, bf16 *gate, int gate_stride, bf16 *up, int up_stride, const float *gate_gain, const float *gate_slopes,
      float *d_gate_gain, const float *up_gain, const float *up_slopes, float *d_up_gain, bf16 *d_inner, int d_inner_stride,
      bf16 *d_gate, int d_gate_stride, bf16 *d_up, int d_up_stride, bf16 *inner, int inner_stride, int rows, int f),
     kind, Matrix{gate, gate_stride}, Matrix{up, up_stride}, Gain{gate_gain, gate_slopes, d_gate_gain},
     Gain{up_gain, up_slopes, d_up_gain}, Matrix{d_inner, d_inner_stride}, Matrix{d_gate, d_gate_stride},
     Matrix{d_up, d_up_stride}, Matrix{inner, inner_stride}, rows, f)
