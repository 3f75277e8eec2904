//! Activations on the CPU: pieces of the flat tensor in parallel, values and slopes from one vectorised loop.

use super::Activation;
use crate::element::{Element, by_dtype, cpu_slice, slice, tensor_like, zeros};
use crate::math::{erf, exp, sigmoid, tanh};
use crate::parallel::{chunks, split, tasks};
use crate::simd::multiversion;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, WithDType};

/// Entries a piece.
const PIECE: usize = 1 << 12;
const SQRT_2_OVER_PI: f32 = 0.797_884_6;
const INV_SQRT_2PI: f32 = 0.398_942_3;

/// (act(x), act'(x)).
#[inline(always)]
fn silu<const FMA: bool>(x: f32) -> (f32, f32) {
    let s = sigmoid::<FMA>(x);
    (x * s, s * (1.0 + x * (1.0 - s)))
}
#[inline(always)]
fn gelu<const FMA: bool>(x: f32) -> (f32, f32) {
    let cdf = 0.5 * (1.0 + erf::<FMA>(x * std::f32::consts::FRAC_1_SQRT_2));
    (x * cdf, cdf + x * (INV_SQRT_2PI * exp::<FMA>(-0.5 * x * x)))
}
#[inline(always)]
fn gelu_tanh<const FMA: bool>(x: f32) -> (f32, f32) {
    let t = tanh::<FMA>(SQRT_2_OVER_PI * x * (1.0 + 0.044715 * x * x));
    let slope = 0.5 * x * (1.0 - t * t) * SQRT_2_OVER_PI * (1.0 + 3.0 * 0.044715 * x * x);
    (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + if t.abs() == 1.0 { 0.0 } else { slope })
}
#[inline(always)]
fn relu<const FMA: bool>(x: f32) -> (f32, f32) {
    let on = if x > 0.0 { 1.0 } else { 0.0 };
    (x * on, on)
}
#[inline(always)]
fn quick_gelu<const FMA: bool>(x: f32) -> (f32, f32) {
    let s = sigmoid::<FMA>(1.702 * x);
    (x * s, s * (1.0 + 1.702 * x * (1.0 - s)))
}
#[inline(always)]
fn tanh_both<const FMA: bool>(x: f32) -> (f32, f32) {
    let t = tanh::<FMA>(x);
    (t, 1.0 - t * t)
}

/// One loop per activation, so that each vectorises.
macro_rules! each {
    ($kind:expr, $fma:ident, $f:ident => $body:expr) => {
        match $kind {
            Activation::Silu => {
                let $f = silu::<$fma>;
                $body
            }
            Activation::Gelu => {
                let $f = gelu::<$fma>;
                $body
            }
            Activation::GeluTanh => {
                let $f = gelu_tanh::<$fma>;
                $body
            }
            Activation::Relu => {
                let $f = relu::<$fma>;
                $body
            }
            Activation::QuickGelu => {
                let $f = quick_gelu::<$fma>;
                $body
            }
            Activation::Tanh => {
                let $f = tanh_both::<$fma>;
                $body
            }
        }
    };
}

multiversion! {
    /// y <- act(x)
    fn values[FMA](kind: Activation, x: &[f32], y: &mut [f32]) {
        each!(kind, FMA, f => for (x, y) in x.iter().zip(y) { *y = f(*x).0 })
    }
}

multiversion! {
    /// dx <- g act'(x)
    fn slopes[FMA](kind: Activation, x: &[f32], g: &[f32], dx: &mut [f32]) {
        each!(kind, FMA, f => for ((x, g), dx) in x.iter().zip(g).zip(dx) { *dx = g * f(*x).1 })
    }
}

multiversion! {
    /// y <- act(x) up
    fn gated_values[FMA](kind: Activation, x: &[f32], up: &[f32], y: &mut [f32]) {
        each!(kind, FMA, f => for ((x, up), y) in x.iter().zip(up).zip(y) { *y = f(*x).0 * up })
    }
}

multiversion! {
    /// dx <- g up act'(x); du <- g act(x)
    fn gated_slopes[FMA](kind: Activation, x: &[f32], up: &[f32], g: &[f32], dx: &mut [f32], du: &mut [f32]) {
        each!(kind, FMA, f => for ((((x, up), g), dx), du) in x.iter().zip(up).zip(g).zip(dx).zip(du) {
            let (value, slope) = f(*x);
            *dx = g * up * slope;
            *du = g * value;
        })
    }
}

/// out <- f(a, b) over fixed pieces.
fn pointwise<T: Element>(a: &[T], b: &[T], f: impl Fn(&[f32], &[f32], &mut [f32]) + Sync) -> Vec<T> {
    let mut out = zeros::<T>(a.len());
    chunks(&mut out, PIECE, 4 * a.len(), |i, piece| {
        let n = piece.len();
        let (mut sa, mut sb, mut so) = (T::scratch(n), T::scratch(n), T::scratch(n));
        let (a, b) = (T::view(&a[i * PIECE..][..n], &mut sa), T::view(&b[i * PIECE..][..n], &mut sb));
        T::write(piece, &mut so, |out| f(a, b, out));
    });
    out
}

/// act(x), entry by entry.
pub(crate) fn activated<T: Element>(kind: Activation, x: &[T]) -> Vec<T> {
    pointwise(x, x, |x, _, y| values(kind, x, y))
}

/// The gradient of `x` for `g` of act(x).
pub(crate) fn activated_gradient<T: Element>(kind: Activation, x: &[T], g: &[T]) -> Vec<T> {
    pointwise(x, g, |x, g, dx| slopes(kind, x, g, dx))
}

/// act(x) up, entry by entry.
pub(crate) fn gated_forward<T: Element>(kind: Activation, x: &[T], up: &[T]) -> Vec<T> {
    pointwise(x, up, |x, up, y| gated_values(kind, x, up, y))
}

/// act(x).
pub(super) struct Activate(pub(super) Activation);

impl CustomOp1 for Activate {
    fn name(&self) -> &'static str {
        "activate"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = by_dtype!(x.dtype(), self.name(), T => {
            <T as WithDType>::to_cpu_storage_owned(activated(self.0, slice::<T>(x, lx)?))
        });
        Ok((out, lx.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let g = g.contiguous()?;
        let ((sx, lx), (sg, lg)) = (x.storage_and_layout(), g.storage_and_layout());
        by_dtype!(x.dtype(), self.name(), T => {
            let (xs, gs) = (cpu_slice::<T>(&sx, lx)?, cpu_slice::<T>(&sg, lg)?);
            Ok(Some(tensor_like(activated_gradient(self.0, xs, gs), x)?))
        })
    }
}

/// act(gate) * up.
pub(super) struct Gated(pub(super) Activation);

impl CustomOp2 for Gated {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, up: &CpuStorage, lu: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = by_dtype!(x.dtype(), self.name(), T => {
            let (x, up) = (slice::<T>(x, lx)?, slice::<T>(up, lu)?);
            <T as WithDType>::to_cpu_storage_owned(gated_forward(self.0, x, up))
        });
        Ok((out, lx.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, up: &Tensor, _: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let g = g.contiguous()?;
        let ((sx, lx), (su, lu), (sg, lg)) = (x.storage_and_layout(), up.storage_and_layout(), g.storage_and_layout());
        by_dtype!(x.dtype(), self.name(), T => {
            let (xs, us, gs) = (cpu_slice::<T>(&sx, lx)?, cpu_slice::<T>(&su, lu)?, cpu_slice::<T>(&sg, lg)?);
            let (dx, du) = gated_gradients(self.0, xs, us, gs, x.track_op(), up.track_op());
            Ok((dx.map(|dx| tensor_like(dx, x)).transpose()?, du.map(|du| tensor_like(du, up)).transpose()?))
        })
    }
}

/// The gradients of x and up for `g` of act(x) up.
pub(crate) fn gated_gradients<T: Element>(
    kind: Activation,
    x: &[T],
    up: &[T],
    g: &[T],
    want_dx: bool,
    want_du: bool,
) -> (Option<Vec<T>>, Option<Vec<T>>) {
    let count = x.len().div_ceil(PIECE);
    let mut dx = want_dx.then(|| zeros::<T>(x.len()));
    let mut du = want_du.then(|| zeros::<T>(x.len()));
    let pieces = split(dx.as_deref_mut(), PIECE, count).into_iter().zip(split(du.as_deref_mut(), PIECE, count));
    let work: Vec<_> = x.chunks(PIECE).zip(up.chunks(PIECE)).zip(g.chunks(PIECE)).zip(pieces).collect();
    tasks(work, 4 * x.len(), |(((x, up), g), (dx, du))| {
        let n = x.len();
        let (mut s1, mut s2, mut s3) = (T::scratch(n), T::scratch(n), T::scratch(n));
        let (x, up, g) = (T::view(x, &mut s1), T::view(up, &mut s2), T::view(g, &mut s3));
        let (mut o1, mut o2) = (T::scratch(n), T::scratch(n));
        match (dx, du) {
            (Some(dx), Some(du)) => {
                T::write(dx, &mut o1, |dx| T::write(du, &mut o2, |du| gated_slopes(kind, x, up, g, dx, du)));
            }
            (Some(dx), None) => T::write(dx, &mut o1, |dx| {
                slopes(kind, x, g, dx);
                dx.iter_mut().zip(up).for_each(|(d, u)| *d *= u);
            }),
            (None, Some(du)) => T::write(du, &mut o2, |du| gated_values(kind, x, g, du)),
            (None, None) => {}
        }
    });
    (dx, du)
}
