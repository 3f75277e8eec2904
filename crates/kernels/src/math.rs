//! Branch-free f32 elementary functions that vectorise: exp, tanh, erf, sigmoid, to 1-3 units in the last place.
//!
//! Equation: exp(x) = 2^n p(r), n = round(x / ln 2), r = x - n ln 2 in two parts; tanh and erf by a polynomial near zero
//! and through exp elsewhere. exp flushes to zero below the normal range (x < -87.33) and overflows to infinity
//! above 88.72; NaN stays NaN.
//! Source:   Cephes expf and tanhf (S. Moshier); erf after N. Juffa's minimax polynomials.

use crate::simd::madd;

const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
const EXP_LOW: f32 = -87.336_54;

/// e^x.
#[inline(always)]
pub(crate) fn exp<const FMA: bool>(x: f32) -> f32 {
    let low = x < EXP_LOW;
    let x = if low { EXP_LOW } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let shifted = madd::<FMA>(x, std::f32::consts::LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    let r = madd::<FMA>(n, -0.693_359_4, x);
    let r = madd::<FMA>(n, 2.121_944_4e-4, r);
    let p = madd::<FMA>(1.987_569_2e-4, r, 1.398_199_9e-3);
    let p = madd::<FMA>(p, r, 8.333_452e-3);
    let p = madd::<FMA>(p, r, 4.166_579_6e-2);
    let p = madd::<FMA>(p, r, 1.666_666_5e-1);
    let p = madd::<FMA>(p, r, 0.5);
    let p = madd::<FMA>(p, r * r, r) + 1.0;
    // 2^n in two factors, so that n = 128 does not overflow before the product does.
    let n = shifted.to_bits() as i32 - MAGIC.to_bits() as i32;
    let half = n >> 1;
    let a = f32::from_bits(((half + 127) << 23) as u32);
    let b = f32::from_bits(((n - half + 127) << 23) as u32);
    let y = p * a * b;
    if low { 0.0 } else { y }
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FMA>(-x))
}

/// Hyperbolic tangent.
#[inline(always)]
pub(crate) fn tanh<const FMA: bool>(x: f32) -> f32 {
    let z = x * x;
    let p = madd::<FMA>(-5.704_989e-3, z, 2.063_909e-2);
    let p = madd::<FMA>(p, z, -5.373_971_5e-2);
    let p = madd::<FMA>(p, z, 1.333_144_2e-1);
    let p = madd::<FMA>(p, z, -3.333_328e-1);
    let near = madd::<FMA>(p * z, x, x);
    let far = 1.0 - 2.0 / (exp::<FMA>(2.0 * x.abs()) + 1.0);
    if x.abs() < 0.625 { near } else { far.copysign(x) }
}

/// Error function.
#[inline(always)]
pub(crate) fn erf<const FMA: bool>(x: f32) -> f32 {
    let t = x.abs();
    let s = x * x;
    let r = madd::<FMA>(-1.728_534_7e-5, t, 3.831_972e-4);
    let u = madd::<FMA>(-3.883_964_4e-3, t, 2.425_462_2e-2);
    let r = madd::<FMA>(r, s, u);
    let r = madd::<FMA>(r, t, -1.067_778_8e-1);
    let r = madd::<FMA>(r, t, -6.348_467e-1);
    let r = madd::<FMA>(r, t, -1.287_175_1e-1);
    let r = madd::<FMA>(r, t, -t);
    let far = (1.0 - exp::<FMA>(r)).copysign(x);
    let q = madd::<FMA>(-5.967_617e-4, s, 4.991_194_2e-3);
    let q = madd::<FMA>(q, s, -2.676_813_5e-2);
    let q = madd::<FMA>(q, s, 1.128_199_25e-1);
    let q = madd::<FMA>(q, s, -3.761_253_4e-1);
    let q = madd::<FMA>(q, s, 1.283_791_7e-1);
    let near = madd::<FMA>(q, x, x);
    if t > 0.927_734_4 { far } else { near }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distance in units of the last place of the exact value.
    fn ulps(got: f32, want: f64) -> f64 {
        let unit = f64::from((want as f32).abs().max(f32::MIN_POSITIVE).to_bits());
        let next = f64::from(f32::from_bits(unit as u32 + 1)) - f64::from(f32::from_bits(unit as u32));
        (f64::from(got) - want).abs() / next
    }

    fn worst(range: f32, f: impl Fn(f32) -> f32, exact: impl Fn(f64) -> f64) -> f64 {
        (-400_000..=400_000)
            .map(|i| i as f32 / 400_000.0 * range)
            .map(|x| ulps(f(x), exact(f64::from(x))))
            .fold(0.0, f64::max)
    }

    #[test]
    fn close_to_the_exact_functions_with_and_without_fused_multiply_add() {
        for (name, error, bound) in [
            ("exp fma", worst(87.0, exp::<true>, f64::exp), 1.5),
            ("exp", worst(87.0, exp::<false>, f64::exp), 2.5),
            ("tanh fma", worst(12.0, tanh::<true>, f64::tanh), 3.0),
            ("tanh", worst(12.0, tanh::<false>, f64::tanh), 3.5),
            ("erf fma", worst(5.0, erf::<true>, candle_core::cpu::erf::erf_f64), 2.5),
            ("erf", worst(5.0, erf::<false>, candle_core::cpu::erf::erf_f64), 3.5),
        ] {
            assert!(error <= bound, "{name}: {error} ulp");
        }
    }

    #[test]
    fn special_values() {
        assert_eq!(exp::<true>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp::<true>(f32::INFINITY), f32::INFINITY);
        assert!(exp::<true>(88.7).is_finite() && exp::<true>(89.0).is_infinite());
        assert_eq!(exp::<true>(0.0), 1.0);
        assert_eq!((tanh::<true>(f32::INFINITY), tanh::<true>(f32::NEG_INFINITY)), (1.0, -1.0));
        assert_eq!((erf::<true>(f32::INFINITY), erf::<true>(f32::NEG_INFINITY)), (1.0, -1.0));
        assert_eq!((erf::<true>(1e20), sigmoid::<true>(-1e30), sigmoid::<true>(1e30)), (1.0, 0.0, 1.0));
        for f in [exp::<true>, tanh::<true>, erf::<true>, sigmoid::<true>] {
            assert!(f(f32::NAN).is_nan());
        }
    }
}
