// Rotary embedding of adjacent heads, in place.
//
// Equation: a, b <- a cos - b sin, b cos + a sin, where b stands `half` behind a; sin times `sign`
// Shapes:   x [rows, heads * head_dim] bf16; cos, sin [positions, half] f32, row i at position i mod positions
// Cost:     one pass over the rotated dimensions; an angle is read once for four heads
#include "eight.cuh"

/// Heads a thread turns.
constexpr int HEADS = 4;

template <bool VECTOR>
__device__ __forceinline__ void turn(bf16 *x, int stride, const float *cos, const float *sin, float sign, int rows,
                                     int positions, int heads, int head_dim, int half) {
    const unsigned across = (half + 7u) / 8u, groups = (heads + HEADS - 1u) / HEADS;
    const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x, down = thread / across;
    const int column = (thread - down * across) * 8, left = half - column;
    const int row = down / groups, first = down - row * groups;
    if (row >= rows) {
        return;
    }
    bf16 *const at = at_row(x, stride, row) + column;
    uint4 low[HEADS], high[HEADS];
#pragma unroll
    for (int k = 0; k < HEADS; k++) {
        const int head = first + k * groups;
        if (head < heads) {
            low[k] = load_raw<VECTOR>(at + head * head_dim, left);
            high[k] = load_raw<VECTOR>(at + head * head_dim + half, left);
        }
    }
    float c[8], s[8];
    const size_t angle = static_cast<size_t>(row % positions) * half + column;
    load_wide<VECTOR>(cos + angle, left, c);
    load_wide<VECTOR>(sin + angle, left, s);
#pragma unroll
    for (int k = 0; k < HEADS; k++) {
        const int head = first + k * groups;
        if (head < heads) {
            float a[8], b[8];
            unpack(low[k], a);
            unpack(high[k], b);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float t = sign * s[i], before = a[i];
                a[i] = fmaf(before, c[i], -b[i] * t);
                b[i] = fmaf(b[i], c[i], before * t);
            }
            store_raw<VECTOR>(at + head * head_dim, left, pack(a));
            store_raw<VECTOR>(at + head * head_dim + half, left, pack(b));
        }
    }
}

BOTH(rope_turn, (256), turn,
     (bf16 *x, int stride, const float *cos, const float *sin, float sign, int rows, int positions, int heads, int head_dim,
      int half),
     x, stride, cos, sin, sign, rows, positions, heads, head_dim, half)
