//! The fused product on the CPU: the low-rank part is a second term of the frozen product's sum, forward and backward; dA and
//! dB come from the kept A x, and a gradient of the frozen weight never exists.

use crate::element::{Element, by_dtype, cpu_slice, slice, tensor_like};
use crate::frozen::{FrozenWeight, multiply_frozen};
use crate::matmul::{Matrix, Target, product};
use crate::product::{Multiply, Rows, Slice, Term};
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
    let target = Target::new(&mut out, n);
    // SAFETY: `out` is ours alone.
    unsafe { product((m, n, k), target, false, a, b, beta, true) };
    out
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
            let x = slice::<T>(x, x_layout)?;
            let mut wide = Vec::new();
            let a = Slice::transposed(a, d_in, rank, self.scale);
            let inner = f32::multiply(n, rank, &[Term::new(T::rows(x, &mut wide), &a)]);
            let b = Slice::transposed(b, rank, d_out, 1.0);
            let y = multiply_frozen::<T>(&self.weight, x, n, false, &[Term::new(Rows::F32(&inner), &b)])?;
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
        let (g, b_tracked) = (g.contiguous()?, b.track_op());
        let tensor = |values: Vec<f32>, shape: (usize, usize)| Tensor::from_vec(values, shape, &Device::Cpu);
        with_values(b, |b| {
            by_dtype!(g.dtype(), self.name(), T => {
                let (storage, layout) = g.storage_and_layout();
                let g = cpu_slice::<T>(&storage, layout)?;
                let mut wide = Vec::new();
                let right = Slice::new(b, d_out, rank, self.scale);
                let d_inner = f32::multiply(n, rank, &[Term::new(T::rows(g, &mut wide), &right)]);
                let g32 = T::widened(g);
                let gm = Matrix::rows(&g32, d_out);
                let dm = Matrix::rows(&d_inner, rank);
                let db = match b_tracked {
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
                        let dx = with_values(a, |a| {
                            let a = Slice::new(a, rank, d_in, 1.0);
                            multiply_frozen::<T>(&self.weight, g, n, true, &[Term::new(Rows::F32(&d_inner), &a)])
                        })?;
                        Some(tensor_like(dx, x)?)
                    }
                    false => None,
                };
                Ok((dx, da, db))
            })
        })
    }
}
