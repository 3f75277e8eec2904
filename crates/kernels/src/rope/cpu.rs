//! Rotary embedding on the CPU: positions in parallel; backward is the same loop with the sines negated.

use crate::element::{Element, by_dtype, slice, zeros};
use crate::parallel::{chunks, rows_per_piece};
use crate::simd::{madd, multiversion};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, WithDType};

multiversion! {
    /// (ya, yb) <- (a cos - b sin, b cos + a sin), sin times `sign`
    fn rotate[FMA](x: &[f32], cos: &[f32], sin: &[f32], sign: f32, y: &mut [f32]) {
        let half = cos.len();
        let (a, b) = x.split_at(half);
        let (ya, yb) = y.split_at_mut(half);
        let sin = &sin[..half];
        let (a, b, ya, yb) = (&a[..half], &b[..half], &mut ya[..half], &mut yb[..half]);
        for i in 0..half {
            let s = sign * sin[i];
            ya[i] = madd::<FMA>(a[i], cos[i], -(b[i] * s));
            yb[i] = madd::<FMA>(b[i], cos[i], a[i] * s);
        }
    }
}

/// `x` [b, t, heads, d] turned by the angles of `cos` and `sin` [b or 1, t, half], or back.
pub(crate) fn turn<T: Element>(
    x: &[T],
    dims: (usize, usize, usize),
    (cos, sin, half): (&[f32], &[f32], usize),
    inverse: bool,
) -> Vec<T> {
    Rope { inverse }.run(x, dims, cos, sin, half)
}

/// Fused rotary embedding: x [b, t, heads, d], cos and sin [b or 1, t, r/2] f32.
pub(super) struct Rope {
    pub(super) inverse: bool,
}

impl Rope {
    fn run<T: Element>(&self, x: &[T], dims: (usize, usize, usize), cos: &[f32], sin: &[f32], half: usize) -> Vec<T> {
        let (t, heads, d) = dims;
        let sign = if self.inverse { -1.0 } else { 1.0 };
        // Angles of one sequence serve all when cos has batch 1.
        let positions = cos.len().checked_div(half).unwrap_or(1).max(1);
        let mut out = zeros::<T>(x.len());
        let row = heads * d;
        let per = rows_per_piece(row, 1);
        debug_assert!(positions.is_multiple_of(t.max(1)) || half == 0);
        chunks(&mut out, per * row, x.len(), |i, piece| {
            let (mut from, mut to) = (T::scratch(d), T::scratch(d));
            for (j, y) in piece.chunks_mut(row).enumerate() {
                let at = i * per + j;
                let angle = (at % positions) * half;
                let (cos, sin) = (&cos[angle..angle + half], &sin[angle..angle + half]);
                for (x, y) in x[at * row..][..row].chunks(d).zip(y.chunks_mut(d)) {
                    let x = T::view(x, &mut from);
                    T::write(y, &mut to, |y| {
                        rotate(&x[..2 * half], cos, sin, sign, &mut y[..2 * half]);
                        y[2 * half..].copy_from_slice(&x[2 * half..]);
                    });
                }
            }
        });
        out
    }
}

impl CustomOp3 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        cos: &CpuStorage,
        lc: &Layout,
        sin: &CpuStorage,
        ls: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, t, heads, d) = lx.shape().dims4()?;
        let (cos, sin) = (slice::<f32>(cos, lc)?, slice::<f32>(sin, ls)?);
        let half = lc.shape().dims3()?.2;
        let out = by_dtype!(candle_core::backend::BackendStorage::dtype(x), self.name(), T => {
            <T as WithDType>::to_cpu_storage_owned(self.run::<T>(slice(x, lx)?, (t, heads, d), cos, sin, half))
        });
        Ok((out, lx.shape().clone()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dx = g.contiguous()?.apply_op3(cos, sin, Rope { inverse: !self.inverse })?;
        Ok((Some(dx), None, None))
    }
}
