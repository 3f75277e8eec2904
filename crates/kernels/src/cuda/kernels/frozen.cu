// Weights of 4-bit normal floats and 8-bit integers, made bf16.
//
// Equation: nf4:  w_i = code[q_i] absmax[i / 64] over the flattened matrix, first value in the high nibble
//           int8: w_ij = q_ij scale_i
// Shapes:   nf4 codes ceil(n / 2) bytes; absmax [blocks] f32
//           int8 codes [rows, columns] bytes, `zero` stands for 0; scale [rows] f32; result [rows, columns] bf16
// Cost:     one pass
#include "eight.cuh"

/// Rows a thread.
constexpr int ROWS = 4;

__constant__ float CODE[16] = {-1.0f,         -0.6961928f,  -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f,
                               -0.091050036f, 0.0f,         0.0795803f,   0.1609302f,  0.2461123f,   0.33791524f,
                               0.44070983f,   0.562617f,    0.72295684f,  1.0f};

/// VECTOR: the columns are a multiple of 8, so that eight weights are four bytes of one block.
template <bool VECTOR>
__device__ __forceinline__ void nf4(const unsigned char *codes, const float *absmax, bf16 *out, int stride, int rows, int w) {
    __shared__ float table[16];
    if (threadIdx.x < 16) {
        table[threadIdx.x] = CODE[threadIdx.x];
    }
    __syncthreads();
    const Place p(w, ROWS);
    unsigned raw[ROWS];
    float scale[ROWS];
    if constexpr (VECTOR) {
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            if (p.row + k < rows) {
                const size_t first = static_cast<size_t>(p.row + k) * w + p.column;
                raw[k] = __ldg(reinterpret_cast<const unsigned *>(codes + first / 2));
                scale[k] = __ldg(absmax + first / 64);
            }
        }
    }
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        if (p.row + k < rows) {
            const size_t first = static_cast<size_t>(p.row + k) * w + p.column;
            float v[8];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if constexpr (VECTOR) {
                    v[i] = table[raw[k] >> (8 * (i / 2) + (i % 2 ? 0 : 4)) & 15u] * scale[k];
                } else if (i < p.left) {
                    const size_t at = first + i;
                    v[i] = table[codes[at / 2] >> (at % 2 ? 0 : 4) & 15] * __ldg(absmax + at / 64);
                } else {
                    v[i] = 0.f;
                }
            }
            store_raw<VECTOR>(at_row(out, stride, p.row + k) + p.column, p.left, pack(v));
        }
    }
}

template <bool VECTOR>
__device__ __forceinline__ void int8(const unsigned char *codes, const float *scale, int zero, bf16 *out, int stride, int rows,
                                     int w) {
    const Place p(w, ROWS);
    uint2 raw[ROWS];
    if constexpr (VECTOR) {
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            if (p.row + k < rows) {
                raw[k] = __ldg(reinterpret_cast<const uint2 *>(codes + static_cast<size_t>(p.row + k) * w + p.column));
            }
        }
    }
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        if (p.row + k < rows) {
            const unsigned char *bytes = codes + static_cast<size_t>(p.row + k) * w + p.column;
            const float s = __ldg(scale + p.row + k);
            float v[8];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                unsigned byte = 0;
                if constexpr (VECTOR) {
                    byte = (i < 4 ? raw[k].x : raw[k].y) >> 8 * (i % 4) & 255u;
                } else if (i < p.left) {
                    byte = bytes[i];
                }
                // A zero of 128 is for codes + 128, 0 for signed codes.
                const int code = zero ? static_cast<int>(byte) - zero : static_cast<signed char>(byte);
                v[i] = static_cast<float>(code) * s;
            }
            store_raw<VECTOR>(at_row(out, stride, p.row + k) + p.column, p.left, pack(v));
        }
    }
}

BOTH(frozen_nf4, (256), nf4,
     (const unsigned char *codes, const float *absmax, bf16 *out, int stride, int rows, int w), codes, absmax, out, stride, rows,
     w)

BOTH(frozen_int8, (256), int8,
     (const unsigned char *codes, const float *scale, int zero, bf16 *out, int stride, int rows, int w), codes, scale, zero, out,
     stride, rows, w)
