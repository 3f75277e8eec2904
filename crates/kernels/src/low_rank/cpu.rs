//! The fused product on the CPU: the low-rank part is a second term of the frozen product's sum, forward and backward; dA and
//! dB come from the kept A x, and a gradient of the frozen weight never exists.

use crate::element::{by_dtype, cpu_slice, slice, tensor_like};
use crate::frozen::{FrozenWeight, multiply_frozen, with_operand};
use crate::product::{Multiply, Rows, Slice, Term, outer, outer_transposed};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, WithDType, bail};
use std::sync::{Arc, OnceLock};

/// W x + s B (A x) for rows of x.
pub(super) struct LowRankLinear {
    weight: Arc<FrozenWeight>,
    scale: f32,
    /// s A x [n, R], kept for the backward pass.
    inner: OnceLock<Vec<f32>>,
}

impl LowRankLinear {
    pub(super) fn new(weight: Arc<FrozenWeight>, scale: f32) -> Self {
        Self { weight, scale, inner: OnceLock::new() }
    }
}

impl CustomOp3 for LowRankLinear {
    fn name(&self) -> &'static str {
        "low-rank-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (n, d_in) = x_layout.shape().dims2()?;
        let (d_out, rank) = b_layout.shape().dims2()?;
        let (a, b) = (slice::<f32>(a, a_layout)?, slice::<f32>(b, b_layout)?);
        let out = by_dtype!(x.dtype(), self.name(), T => {
            let x = slice::<T>(x, x_layout)?;
            let mut wide = Vec::new();
            let rows = T::rows(x, &mut wide);
            let a = Slice::transposed(a, d_in, rank, self.scale);
            let inner = f32::multiply(n, rank, &[Term::new(rows, &a)]);
            let b = Slice::transposed(b, rank, d_out, 1.0);
            let y = multiply_frozen::<T>(&self.weight, rows, n, &[Term::new(Rows::F32(&inner), &b)])?;
            self.inner.get_or_init(|| inner);
            <T as WithDType>::to_cpu_storage_owned(y)
        });
        Ok((out, Shape::from((n, d_out))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (n, d_in) = x.dims2()?;
        let (d_out, rank) = b.dims2()?;
        let Some(inner) = self.inner.get() else { bail!("low-rank: backward before forward") };
        let g = g.contiguous()?;
        let ((sx, lx), (sa, la)) = (x.storage_and_layout(), a.storage_and_layout());
        let ((sb, lb), (sg, lg)) = (b.storage_and_layout(), g.storage_and_layout());
        let (a_rows, b_rows) = (cpu_slice::<f32>(&sa, la)?, cpu_slice::<f32>(&sb, lb)?);
        by_dtype!(x.dtype(), self.name(), T => {
            let (x_rows, g_rows) = (cpu_slice::<T>(&sx, lx)?, cpu_slice::<T>(&sg, lg)?);
            let mut wide = Vec::new();
            let rows = T::rows(g_rows, &mut wide);
            let right = Slice::new(b_rows, d_out, rank, self.scale);
            let d_inner = f32::multiply(n, rank, &[Term::new(rows, &right)]);
            let db = b.track_op().then(|| {
                let mut db = vec![0f32; d_out * rank];
                outer_transposed((n, rank, d_out), inner, rank, g_rows, &mut db);
                tensor_like(db, b)
            });
            let da = a.track_op().then(|| {
                let mut da = vec![0f32; rank * d_in];
                outer((n, rank, d_in), &d_inner, rank, x_rows, &mut da);
                tensor_like(da, a)
            });
            let dx = match x.track_op() {
                true => {
                    let right = Slice::new(a_rows, rank, d_in, 1.0);
                    let beside = Term::new(Rows::F32(&d_inner), &right);
                    let dx = with_operand(&self.weight, true, |w| T::multiply(n, d_in, &[Term::new(rows, w), beside]))?;
                    Some(tensor_like(dx, x)?)
                }
                false => None,
            };
            Ok((dx, da.transpose()?, db.transpose()?))
        })
    }
}
