// Root-mean-square and layer normalisation of rows, and the gradient of their input.
//
// Equation: r = 1 / sqrt(mean((x - m)^2) + eps), m = mean(x) for layer norm and 0 for rms; w = gain + offset
//           y  = (x - m) r w + bias
//           dx = beside + r (g w - s1 - (x - m) r s2), s1 = mean(g w) (0 for rms), s2 = r mean(g w (x - m))
// Shapes:   x, g, beside, dx, y [rows, h] bf16; gain, bias [h] bf16 or f32
// Cost:     a row stays in the registers of its group of threads: each value is read once and written once
#include "eight.cuh"

/// Times eight values a thread holds.
constexpr int HELD = 4;

/// Weights of a norm; `wide` if in f32. A bias of null is none.
struct Affine {
    const void *gain, *bias;
    int gain_wide, bias_wide;
    float offset;
};

template <bool VECTOR>
__device__ __forceinline__ void load_either(const void *p, int wide, int column, int left, float (&v)[8]) {
    if (wide) {
        load_wide<VECTOR>(static_cast<const float *>(p) + column, left, v);
    } else if constexpr (VECTOR) {
        unpack(__ldg(reinterpret_cast<const uint4 *>(static_cast<const bf16 *>(p) + column)), v);
    } else {
        unpack(load_raw<VECTOR>(static_cast<const bf16 *>(p) + column, left), v);
    }
}

/// A thread's part of a row.
struct Part {
    int row, lane, group;
    bool live;

    __device__ __forceinline__ Part(int rows, int size) {
        group = size;
        lane = threadIdx.x % group;
        row = blockIdx.x * (blockDim.x / group) + threadIdx.x / group;
        live = row < rows;
    }
    __device__ __forceinline__ int column(int k) const { return (lane + k * group) * 8; }
};

template <bool VECTOR>
__device__ __forceinline__ void load_part(const bf16 *x, int stride, const Part &part, int h, uint4 (&held)[HELD]) {
    const bf16 *p = at_row(x, stride, part.row);
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        const int c = part.column(k);
        held[k] = part.live && c < h ? load_raw<VECTOR>(p + c, h - c) : make_uint4(0, 0, 0, 0);
    }
}

/// Sum of (x - mean)^2 over a thread's part of a row.
template <bool VECTOR>
__device__ __forceinline__ float squares_about(const uint4 (&held)[HELD], float mean, const Part &part, int h) {
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        float v[8];
        unpack(held[k], v);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float d = part.column(k) + (VECTOR ? 0 : i) < h ? v[i] - mean : 0.f;
            sum = fmaf(d, d, sum);
        }
    }
    return sum;
}

__device__ __forceinline__ float plain_sum(const uint4 (&held)[HELD]) {
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        float v[8];
        unpack(held[k], v);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sum += v[i];
        }
    }
    return sum;
}

template <bool VECTOR>
__device__ __forceinline__ void forward(const bf16 *x, int x_stride, bf16 *y, int y_stride, const Affine &w, float eps,
                                        int layer, int rows, int h, int group) {
    __shared__ float parts[2][1][32];
    const Part part(rows, group);
    uint4 held[HELD];
    load_part<VECTOR>(x, x_stride, part, h, held);
    float sum[1], mean = 0.f;
    if (layer) {
        sum[0] = plain_sum(held);
        sum_group(sum, group, parts[0]);
        mean = sum[0] / h;
        forget(held);
    }
    sum[0] = squares_about<VECTOR>(held, mean, part, h);
    sum_group(sum, group, parts[1]);
    forget(held);
    const float r = rsqrtf(sum[0] / h + eps);
    if (!part.live) {
        return;
    }
    bf16 *out = at_row(y, y_stride, part.row);
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        const int c = part.column(k);
        if (c < h) {
            float v[8], gain[8], bias[8] = {};
            unpack(held[k], v);
            load_either<VECTOR>(w.gain, w.gain_wide, c, h - c, gain);
            if (w.bias) {
                load_either<VECTOR>(w.bias, w.bias_wide, c, h - c, bias);
            }
#pragma unroll
            for (int i = 0; i < 8; i++) {
                v[i] = fmaf((v[i] - mean) * r, gain[i] + w.offset, bias[i]);
            }
            store_raw<VECTOR>(out + c, h - c, pack(v));
        }
    }
}

template <bool VECTOR>
__device__ __forceinline__ void backward(const bf16 *x, int x_stride, const bf16 *g, int g_stride, const bf16 *beside,
                                         int beside_stride, bf16 *dx, int dx_stride, const Affine &w, float eps, int layer,
                                         int rows, int h, int group) {
    __shared__ float parts[2][2][32];
    const Part part(rows, group);
    uint4 held[HELD], grad[HELD];
    load_part<VECTOR>(x, x_stride, part, h, held);
    load_part<VECTOR>(g, g_stride, part, h, grad);
    float mean = 0.f, s1 = 0.f;
    if (layer) {
        float sums[2] = {plain_sum(held), 0.f};
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            const int c = part.column(k);
            if (c < h) {
                float d[8], gain[8];
                unpack(grad[k], d);
                load_either<VECTOR>(w.gain, w.gain_wide, c, h - c, gain);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    sums[1] = fmaf(d[i], gain[i] + w.offset, sums[1]);
                }
            }
        }
        sum_group(sums, group, parts[0]);
        mean = sums[0] / h;
        s1 = sums[1] / h;
        forget(held);
        forget(grad);
    }
    float sums[2] = {squares_about<VECTOR>(held, mean, part, h), 0.f};
    forget(held);
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        const int c = part.column(k);
        if (c < h) {
            float v[8], d[8], gain[8];
            unpack(held[k], v);
            unpack(grad[k], d);
            load_either<VECTOR>(w.gain, w.gain_wide, c, h - c, gain);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                sums[1] = fmaf(d[i] * (gain[i] + w.offset), v[i] - mean, sums[1]);
            }
        }
    }
    sum_group(sums, group, parts[1]);
    forget(held);
    forget(grad);
    const float r = rsqrtf(sums[0] / h + eps);
    const float a = r * s1, b = r * r * r * (sums[1] / h);
    if (!part.live) {
        return;
    }
    bf16 *out = at_row(dx, dx_stride, part.row);
    const bf16 *other = at_row(beside, beside_stride, part.row);
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        const int c = part.column(k);
        if (c < h) {
            float v[8], d[8], gain[8], more[8] = {};
            if (beside) {
                unpack(load_raw<VECTOR>(other + c, h - c), more);
            }
            unpack(held[k], v);
            unpack(grad[k], d);
            load_either<VECTOR>(w.gain, w.gain_wide, c, h - c, gain);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                v[i] = more[i] + fmaf(-b, v[i] - mean, fmaf(r * d[i], gain[i] + w.offset, -a));
            }
            store_raw<VECTOR>(out + c, h - c, pack(v));
        }
    }
}

BOTH(norm_forward, (512, 2), forward,
     (const bf16 *x, int x_stride, bf16 *y, int y_stride, const void *gain, const void *bias, int gain_wide, int bias_wide,
      float offset, float eps, int layer, int rows, int h, int group),
     x, x_stride, y, y_stride, Affine{gain, bias, gain_wide, bias_wide, offset}, eps, layer, rows, h, group)

BOTH(norm_backward, (512), backward,
     (const bf16 *x, int x_stride, const bf16 *g, int g_stride, const bf16 *beside, int beside_stride, bf16 *dx,
      int dx_stride, const void *gain, int gain_wide, float offset, float eps, int layer, int rows, int h, int group),
     x, x_stride, g, g_stride, beside, beside_stride, dx, dx_stride, Affine{gain, nullptr, gain_wide, 0, offset}, eps, layer,
     rows, h, group)
