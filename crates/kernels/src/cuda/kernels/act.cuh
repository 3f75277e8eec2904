// Activation functions and their slopes.
#pragma once

/// act(x) and act'(x).
struct Both {
    float value, slope;
};

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }

/// Kinds: 0 silu, 1 gelu, 2 gelu by tanh, 3 relu, 4 quick gelu, 5 tanh.
template <int KIND> __device__ __forceinline__ Both act(float x) {
    if (KIND == 0) {
        const float s = sigmoid(x);
        return {x * s, s * fmaf(x, 1.f - s, 1.f)};
    }
    if (KIND == 1) {
        // The upper tail of the normal distribution: Abramowitz and Stegun 7.1.26, within 8e-8.
        const float z = fabsf(x) * 0.70710678f, t = __fdividef(1.f, fmaf(0.3275911f, z, 1.f)), e = __expf(-z * z);
        float p = fmaf(t, 1.061405429f, -1.453152027f);
        p = fmaf(t, p, 1.421413741f);
        p = fmaf(t, p, -0.284496736f);
        p = fmaf(t, p, 0.254829592f);
        const float tail = 0.5f * p * t * e, cdf = x < 0.f ? tail : 1.f - tail;
        return {x * cdf, fmaf(x, 0.39894228f * e, cdf)};
    }
    if (KIND == 2) {
        // (1 + tanh u) / 2 = s(2 u): keeps the digits of the lower tail.
        const float square = x * x, s = sigmoid(1.5957691f * x * fmaf(0.044715f, square, 1.f)), both = s * (1.f - s);
        const float slope = x * both * 1.5957691f * fmaf(0.134145f, square, 1.f);
        return {x * s, s + (both == 0.f ? 0.f : slope)};
    }
    if (KIND == 3) {
        const float on = x > 0.f ? 1.f : 0.f;
        return {x * on, on};
    }
    if (KIND == 4) {
        const float s = sigmoid(1.702f * x);
        return {x * s, s * fmaf(1.702f * x, 1.f - s, 1.f)};
    }
    // The quotient loses the digits of small x; the series keeps them.
    const float square = x * x, e = __expf(-2.f * fabsf(x)), far = copysignf(__fdividef(1.f - e, 1.f + e), x);
    const float near = x * fmaf(square, fmaf(square, 0.13333333f, -0.33333333f), 1.f);
    const float t = square < 0.01f ? near : far;
    return {t, fmaf(-t, t, 1.f)};
}

template <int K> struct Kind {
    static constexpr int value = K;
};

template <typename F> __device__ __forceinline__ void by_kind(int kind, F run) {
    switch (kind) {
    case 0: return run(Kind<0>{});
    case 1: return run(Kind<1>{});
    case 2: return run(Kind<2>{});
    case 3: return run(Kind<3>{});
    case 4: return run(Kind<4>{});
    default: return run(Kind<5>{});
    }
}
