//! Loops over f32 slices that several kernels share: sums, dot products, scaled additions, exponentials, conversions.
//!
//! Reductions run in a fixed number of lanes that are added pairwise at the end, so a result depends only on the
//! slice, never on threads.

use crate::math::exp;
use crate::simd::{madd, multiversion};

const LANES: usize = 32;

/// Lanes added pairwise.
#[inline(always)]
fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

multiversion! {
    /// Sum of a_i b_i.
    fn dot[FMA](a: &[f32], b: &[f32]) -> f32 {
        let mut lanes = [0f32; LANES];
        let (ca, cb) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
        let tail: f32 = ca.remainder().iter().zip(cb.remainder()).map(|(x, y)| x * y).sum();
        for (x, y) in ca.zip(cb) {
            for i in 0..LANES {
                lanes[i] = madd::<FMA>(x[i], y[i], lanes[i]);
            }
        }
        fold(lanes) + tail
    }
}

multiversion! {
    /// Sum of a_i b_i c_i.
    fn dot3[FMA](a: &[f32], b: &[f32], c: &[f32]) -> f32 {
        let mut lanes = [0f32; LANES];
        let (ca, cb, cc) = (a.chunks_exact(LANES), b.chunks_exact(LANES), c.chunks_exact(LANES));
        let tail: f32 = ca.remainder().iter().zip(cb.remainder()).zip(cc.remainder()).map(|((x, y), z)| x * y * z).sum();
        for ((x, y), z) in ca.zip(cb).zip(cc) {
            for i in 0..LANES {
                lanes[i] = madd::<FMA>(x[i] * y[i], z[i], lanes[i]);
            }
        }
        fold(lanes) + tail
    }
}

multiversion! {
    /// Dot product of bf16 bits with f32.
    fn dot_bf16[FMA](a: &[u16], b: &[f32]) -> f32 {
        let mut lanes = [0f32; LANES];
        let (ca, cb) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
        let tail: f32 =
            ca.remainder().iter().zip(cb.remainder()).map(|(x, y)| f32::from_bits(u32::from(*x) << 16) * y).sum();
        for (x, y) in ca.zip(cb) {
            for i in 0..LANES {
                lanes[i] = madd::<FMA>(f32::from_bits(u32::from(x[i]) << 16), y[i], lanes[i]);
            }
        }
        fold(lanes) + tail
    }
}

multiversion! {
    /// Dot product of int8 with f32.
    fn dot_i8[FMA](a: &[i8], b: &[f32]) -> f32 {
        let mut lanes = [0f32; LANES];
        let (ca, cb) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
        let tail: f32 = ca.remainder().iter().zip(cb.remainder()).map(|(x, y)| f32::from(*x) * y).sum();
        for (x, y) in ca.zip(cb) {
            // Widened as a whole first: the conversion then vectorises.
            let mut wide = [0f32; LANES];
            for i in 0..LANES {
                wide[i] = f32::from(x[i]);
            }
            for i in 0..LANES {
                lanes[i] = madd::<FMA>(wide[i], y[i], lanes[i]);
            }
        }
        fold(lanes) + tail
    }
}

multiversion! {
    /// Sum of the entries.
    fn sum[FMA](a: &[f32]) -> f32 {
        let _ = FMA;
        let mut lanes = [0f32; LANES];
        let chunks = a.chunks_exact(LANES);
        let tail: f32 = chunks.remainder().iter().sum();
        for x in chunks {
            for i in 0..LANES {
                lanes[i] += x[i];
            }
        }
        fold(lanes) + tail
    }
}

multiversion! {
    /// Sum of (a_i - centre)^2.
    fn sum_squares_about[FMA](a: &[f32], centre: f32) -> f32 {
        let mut lanes = [0f32; LANES];
        let chunks = a.chunks_exact(LANES);
        let tail: f32 = chunks.remainder().iter().map(|x| (x - centre) * (x - centre)).sum();
        for x in chunks {
            for i in 0..LANES {
                let d = x[i] - centre;
                lanes[i] = madd::<FMA>(d, d, lanes[i]);
            }
        }
        fold(lanes) + tail
    }
}

multiversion! {
    /// Largest entry; -inf for an empty slice. NaN entries are passed over (they show up in the sum that follows).
    fn max[FMA](a: &[f32]) -> f32 {
        let _ = FMA;
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let chunks = a.chunks_exact(LANES);
        let tail = chunks.remainder().iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m });
        for x in chunks {
            for i in 0..LANES {
                lanes[i] = if x[i] > lanes[i] { x[i] } else { lanes[i] };
            }
        }
        lanes.iter().fold(tail, |m, &x| if x > m { x } else { m })
    }
}

multiversion! {
    /// Sum of e^(a_i - shift).
    fn sum_exp[FMA](a: &[f32], shift: f32) -> f32 {
        let mut lanes = [0f32; LANES];
        let chunks = a.chunks_exact(LANES);
        let tail: f32 = chunks.remainder().iter().map(|x| exp::<FMA>(x - shift)).sum();
        for x in chunks {
            for i in 0..LANES {
                lanes[i] += exp::<FMA>(x[i] - shift);
            }
        }
        fold(lanes) + tail
    }
}

multiversion! {
    /// a_i <- e^(a_i - shift); returns their sum.
    fn exp_in_place[FMA](a: &mut [f32], shift: f32) -> f32 {
        let mut lanes = [0f32; LANES];
        let mut chunks = a.chunks_exact_mut(LANES);
        for x in &mut chunks {
            for i in 0..LANES {
                x[i] = exp::<FMA>(x[i] - shift);
                lanes[i] += x[i];
            }
        }
        let mut tail = 0.0;
        for x in chunks.into_remainder() {
            *x = exp::<FMA>(*x - shift);
            tail += *x;
        }
        fold(lanes) + tail
    }
}

multiversion! {
    /// y_i <- e^(x_i - shift) * scale.
    fn exp_into[FMA](x: &[f32], shift: f32, scale: f32, y: &mut [f32]) {
        for (x, y) in x.iter().zip(y) {
            *y = exp::<FMA>(x - shift) * scale;
        }
    }
}

multiversion! {
    /// y_i <- y_i + a x_i.
    fn axpy[FMA](a: f32, x: &[f32], y: &mut [f32]) {
        for (x, y) in x.iter().zip(y) {
            *y = madd::<FMA>(a, *x, *y);
        }
    }
}

multiversion! {
    /// y_i <- a y_i.
    fn scale[FMA](a: f32, y: &mut [f32]) {
        let _ = FMA;
        for y in y {
            *y *= a;
        }
    }
}

multiversion! {
    /// bf16 bits to f32 (exact).
    fn from_bf16[FMA](x: &[u16], y: &mut [f32]) {
        let _ = FMA;
        // Whole registers first: rows are often no longer than the unrolled loop that a plain one becomes.
        let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks_mut::<LANES>());
        for (x, y) in x.iter().zip(y) {
            for i in 0..LANES {
                y[i] = f32::from_bits(u32::from(x[i]) << 16);
            }
        }
        for (x, y) in x_rest.iter().zip(y_rest) {
            *y = f32::from_bits(u32::from(*x) << 16);
        }
    }
}

multiversion! {
    /// f32 to bf16 bits, to nearest, ties to even; NaN stays NaN.
    fn to_bf16[FMA](x: &[f32], y: &mut [u16]) {
        let _ = FMA;
        let round = |x: f32| {
            let bits = x.to_bits();
            let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
            let nan = (bits >> 16) | 0x40;
            (if bits & 0x7fff_ffff > 0x7f80_0000 { nan } else { rounded }) as u16
        };
        let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks_mut::<LANES>());
        for (x, y) in x.iter().zip(y) {
            for i in 0..LANES {
                y[i] = round(x[i]);
            }
        }
        for (x, y) in x_rest.iter().zip(y_rest) {
            *y = round(*x);
        }
    }
}

multiversion! {
    /// y_i <- a * x_i for int8 x.
    fn from_i8[FMA](a: f32, x: &[i8], y: &mut [f32]) {
        let _ = FMA;
        for (x, y) in x.iter().zip(y) {
            *y = a * f32::from(*x);
        }
    }
}
