//! The fused product on the CPU: the low-rank part is added into the frozen product's result; the backward pass forms
//! dA, dB and dx from the kept A x, and never a gradient of the frozen weight.

use crate::element::{Element, by_dtype, slice};
use crate::frozen::{FrozenWeight, multiply_frozen};
use crate::matmul::{Matrix, Target, product};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, Device, Layout, Result, Shape, Storage, Tensor, WithDType, bail};
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

/// out [m, n] <- beta * a b, on all threads.
fn fresh((m, n, k): (usize, usize, usize), a: Matrix<'_>, b: Matrix<'_>, beta: f32) -> Vec<f32> {
    let mut out = vec![0f32; m * n];
    add((m, n, k), &mut out, false, a, b, beta);
    out
}

/// out [m, n] <- (out if `accumulate`) + beta * a b, on all threads.
fn add(size: (usize, usize, usize), out: &mut [f32], accumulate: bool, a: Matrix<'_>, b: Matrix<'_>, beta: f32) {
    let target = Target::new(out, size.1);
    // SAFETY: `out` is borrowed mutably for the call.
    unsafe { product(size, target, accumulate, a, b, beta, true) }
}

/// Runs `f` on the values of a CPU tensor, widened to f32.
fn with_values<R>(t: &Tensor, f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let (storage, layout) = t.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { bail!("low-rank: a tensor is not on the CPU") };
    by_dtype!(storage.dtype(), "low-rank", T => f(&T::widened(slice::<T>(storage, layout)?)))
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
            let x = T::widened(slice::<T>(x, x_layout)?);
            let mut y = multiply_frozen(&self.weight, &x, n, false)?;
            let inner = fresh((n, rank, d_in), Matrix::rows(&x, d_in), Matrix::rows(a, d_in).t(), self.scale);
            add((n, d_out, rank), &mut y, true, Matrix::rows(&inner, rank), Matrix::rows(b, rank).t(), 1.0);
            self.inner.get_or_init(|| inner);
            <T as WithDType>::to_cpu_storage_owned(T::narrowed(y))
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
        let tensor = |values: Vec<f32>, shape: (usize, usize)| Tensor::from_vec(values, shape, &Device::Cpu);
        with_values(&g, |g| {
            let gm = Matrix::rows(g, d_out);
            let d_inner = with_values(b, |b| Ok(fresh((n, rank, d_out), gm, Matrix::rows(b, rank), self.scale)))?;
            let dm = Matrix::rows(&d_inner, rank);
            let db = match b.track_op() {
                true => Some(tensor(fresh((d_out, rank, n), gm.t(), Matrix::rows(inner, rank), 1.0), (d_out, rank))?),
                false => None,
            };
            let da = match a.track_op() {
                true => {
                    let da = with_values(x, |x| Ok(fresh((rank, d_in, n), dm.t(), Matrix::rows(x, d_in), 1.0)))?;
                    Some(tensor(da, (rank, d_in))?)
                }
                false => None,
            };
            let dx = match x.track_op() {
                true => {
                    let mut dx = multiply_frozen(&self.weight, g, n, true)?;
                    with_values(a, |a| {
                        add((n, d_in, rank), &mut dx, true, dm, Matrix::rows(a, d_in), 1.0);
                        Ok(())
                    })?;
                    Some(tensor(dx, (n, d_in))?.to_dtype(x.dtype())?)
                }
                false => None,
            };
            Ok((dx, da, db))
        })
    }
}
