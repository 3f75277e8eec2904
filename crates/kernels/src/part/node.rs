//! What makes a part an operation of the tape, or a node without one: the same for every part.

#[cfg(feature = "cuda")]
use super::cuda::{BackOn, Flat, Input, OnDevice, Rows};
use super::{Projection, check, is_fused, no_parameters};
#[cfg(feature = "cuda")]
use crate::cuda::{Gpu, View, address, address_of, matrix};
use crate::element::{by_dtype, cpu_slice, slice, tensor_like};
use crate::product::Multiply;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, WithDType, bail};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, Device};
#[cfg(feature = "cuda")]
use half::bf16;
use std::any::Any;
use std::sync::{Arc, OnceLock};

/// Builds without CUDA ask nothing of a part for it.
#[cfg(not(feature = "cuda"))]
pub(super) trait OnDevice {}

#[cfg(not(feature = "cuda"))]
impl<P> OnDevice for P {}

/// The mathematics of a part over rows x [b * t, h] and its flat parameters.
pub(super) trait Part: OnDevice + Send + Sync + 'static {
    /// The name in messages.
    const NAME: &'static str;
    /// What a forward pass keeps.
    type Saved<T: Multiply>: Send + Sync + 'static;
    /// The number of parameters.
    fn parameters(&self) -> usize;
    /// Whether the part fits rows [b, t, h].
    fn fits(&self, x: &Tensor) -> Result<()>;
    /// The result [b * t, h].
    fn forward<T: Multiply>(
        &self,
        x: &[T],
        parameters: &[f32],
        size: (usize, usize),
    ) -> Result<(Vec<T>, Self::Saved<T>)>;
    /// The gradients for `back.g` of the result: that of x if wanted; those of the parameters are written where wanted.
    fn backward<T: Multiply>(&self, saved: &Self::Saved<T>, back: Back<'_, T>) -> Result<Option<Vec<T>>>;
    /// The projections, in the order of their parameters.
    fn projections(&self) -> impl Iterator<Item = &Projection>;
    /// The result by definition.
    fn reference(&self, x: &Tensor, parameters: &Tensor) -> Result<Tensor>;
}

/// What a backward pass has.
pub(super) struct Back<'a, T> {
    pub(super) x: &'a [T],
    pub(super) parameters: &'a [f32],
    pub(super) g: &'a [T],
    /// b and t.
    pub(super) size: (usize, usize),
    pub(super) d_parameters: Option<&'a mut [f32]>,
    /// Whether the gradient of x is wanted.
    pub(super) wants_x: bool,
}

/// One pass of a part.
struct Pass<P> {
    part: Arc<P>,
    /// The `Saved` of the forward pass, in the element type of its input.
    saved: OnceLock<Box<dyn Any + Send + Sync>>,
}

impl<P> Pass<P> {
    fn new(part: &Arc<P>) -> Self {
        Self { part: part.clone(), saved: OnceLock::new() }
    }
}

fn checked<P: Part>(part: &P, x: &Tensor, parameters: Option<Tensor>) -> Result<Tensor> {
    let parameters = parameters.map_or_else(|| no_parameters(x), |p| p.contiguous())?;
    check(P::NAME, x, &parameters, part.parameters())?;
    part.fits(x)?;
    Ok(parameters)
}

/// Whether a part runs fused for rows `x`.
pub(super) fn runs<P: Part>(part: &P, x: &Tensor, parameters: &[Tensor]) -> Result<bool> {
    if !is_fused(x, parameters) {
        return Ok(false);
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        let (b, t, _) = x.dims3()?;
        return Ok(part.supports(&*Gpu::of(x.device())?, (b, t)));
    }
    Ok(!part.projections().any(Projection::needs_norms))
}

/// The result of a part on the tape.
pub(super) fn apply<P: Part>(part: &Arc<P>, x: &Tensor, parameters: Option<&Tensor>) -> Result<Tensor> {
    let parameters = checked(&**part, x, parameters.cloned())?;
    if runs(&**part, x, std::slice::from_ref(&parameters))? {
        x.contiguous()?.apply_op2(&parameters, Pass::new(part))
    } else {
        part.reference(x, &parameters)
    }
}

/// The result of a part off the tape, and the way back.
pub(super) fn node<P: Part>(part: &Arc<P>, x: &Tensor, parameters: Option<&Tensor>) -> Result<(Tensor, Node)> {
    if !runs(&**part, x, parameters.map_or(&[], std::slice::from_ref))? {
        bail!(
            "{} without the tape: x is {:?} {:?} on {:?}, which no fused kernel handles with these parameters",
            P::NAME,
            x.dtype(),
            x.dims(),
            x.device().location()
        )
    }
    let parameters = checked(&**part, x, parameters.map(Tensor::detach))?;
    let (x, op) = (x.detach().contiguous()?, Pass::new(part));
    let y = x.apply_op2_no_bwd(&parameters, &op)?;
    Ok((y, Node { x, parameters, op: Box::new(op) }))
}

impl<P: Part> CustomOp2 for Pass<P> {
    fn name(&self) -> &'static str {
        P::NAME
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, p: &CpuStorage, lp: &Layout) -> Result<(CpuStorage, Shape)> {
        let (b, t, _) = lx.shape().dims3()?;
        let parameters = slice::<f32>(p, lp)?;
        let out = by_dtype!(x.dtype(), P::NAME, T => {
            let (y, saved) = self.part.forward::<T>(slice(x, lx)?, parameters, (b, t))?;
            let _ = self.saved.set(Box::new(saved));
            <T as WithDType>::to_cpu_storage_owned(y)
        });
        Ok((out, lx.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, lx: &Layout, p: &CudaStorage, lp: &Layout) -> Result<(CudaStorage, Shape)> {
        let (b, t, _) = lx.shape().dims3()?;
        let gpu = Gpu::of(&Device::Cuda(x.device.clone()))?;
        let flat = Flat::new(&gpu, p, lp)?;
        let rows = View::new(address_of::<bf16>(x, lx)?, lx.dims()[2]);
        let (y, saved) = self.part.forward_on(&gpu, rows, &flat, (b, t))?;
        let _ = self.saved.set(Box::new((flat, saved)));
        Ok((CudaStorage::wrap_cuda_slice(y.into_data(), gpu.device.clone()), lx.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, p: &Tensor, _: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, d) = self.gradients(x, p, &g.clone().into(), (x.track_op(), p.track_op()))?;
        Ok((dx.map(|dx| dx.tensor.contiguous()).transpose()?, d))
    }
}

/// A gradient [b, t, h] on its way back from part to part. On a device its rows may go on with values that nobody else reads, where
/// the next part puts the gradient of a low-rank product beside it.
#[derive(Debug)]
pub struct Upstream {
    tensor: Tensor,
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "there is room on CUDA devices only"))]
    room: bool,
}

impl From<Tensor> for Upstream {
    fn from(tensor: Tensor) -> Self {
        Self { tensor, room: false }
    }
}

impl From<Upstream> for Tensor {
    fn from(upstream: Upstream) -> Self {
        upstream.tensor
    }
}

/// An operation whose gradients can be asked for without a tape.
trait Differentiable: Send + Sync {
    /// Gradients of x and of the parameters for `g` of the result, where wanted.
    fn gradients(
        &self,
        x: &Tensor,
        parameters: &Tensor,
        g: &Upstream,
        wants: (bool, bool),
    ) -> Result<(Option<Upstream>, Option<Tensor>)>;
}

impl<P: Part> Differentiable for Pass<P> {
    fn gradients(
        &self,
        x: &Tensor,
        p: &Tensor,
        g: &Upstream,
        (wants_x, wants_p): (bool, bool),
    ) -> Result<(Option<Upstream>, Option<Tensor>)> {
        let (b, t, _) = x.dims3()?;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return self.gradients_on(x, p, g, (wants_x, wants_p));
        }
        let g = g.tensor.contiguous()?;
        let ((sx, lx), (sp, lp), (sg, lg)) = (x.storage_and_layout(), p.storage_and_layout(), g.storage_and_layout());
        let parameters = cpu_slice::<f32>(&sp, lp)?;
        let mut d_parameters = wants_p.then(|| vec![0f32; parameters.len()]);
        by_dtype!(x.dtype(), P::NAME, T => {
            let Some(saved) = self.saved.get().and_then(|s| s.downcast_ref::<P::Saved<T>>()) else {
                bail!("{}: backward before forward", P::NAME)
            };
            let (x_rows, g_rows) = (cpu_slice::<T>(&sx, lx)?, cpu_slice::<T>(&sg, lg)?);
            let d_parameters_out = d_parameters.as_deref_mut();
            let back =
                Back { x: x_rows, parameters, g: g_rows, size: (b, t), d_parameters: d_parameters_out, wants_x };
            let dx = self.part.backward::<T>(saved, back)?;
            let dx = dx.map(|dx| tensor_like(dx, x)).transpose()?;
            Ok((dx.map(Upstream::from), d_parameters.map(|d| tensor_like(d, p)).transpose()?))
        })
    }
}

#[cfg(feature = "cuda")]
impl<P: Part> Pass<P> {
    fn gradients_on(
        &self,
        x: &Tensor,
        p: &Tensor,
        g: &Upstream,
        (wants_x, wants_p): (bool, bool),
    ) -> Result<(Option<Upstream>, Option<Tensor>)> {
        let (b, t, h) = x.dims3()?;
        let held = if g.room { g.tensor.clone() } else { g.tensor.contiguous()? };
        // Rows of all sequences are equally far apart.
        let upstream = match g.room && b > 0 {
            true => Input { view: matrix(&held.narrow(0, 0, 1)?.squeeze(0)?)?, border: true },
            false => Input { view: View::new(address::<bf16>(&held.contiguous()?)?, h), border: false },
        };
        let gpu = Gpu::of(x.device())?;
        let Some((flat, saved)) = self.saved.get().and_then(|s| s.downcast_ref::<(Flat, P::Kept)>()) else {
            bail!("{}: backward before forward", P::NAME)
        };
        let d_parameters = wants_p.then(|| gpu.zeros::<f32>(p.elem_count())).transpose()?;
        let back = BackOn {
            x: View::new(address::<bf16>(x)?, h),
            g: upstream,
            flat,
            size: (b, t),
            d_parameters: d_parameters.as_ref().map(|d| gpu.address(d)),
            wants_x,
        };
        let dx = self.part.backward_on(&gpu, saved, &back)?;
        let upstream = |dx: Rows| {
            let room = dx.input().border;
            Ok::<_, candle_core::Error>(Upstream { tensor: dx.into_tensor(&gpu, (b, t, h))?, room })
        };
        Ok((dx.map(upstream).transpose()?, d_parameters.map(|d| gpu.tensor(d, p.dims()))))
    }
}

/// One pass of a part, to go back through.
pub struct Node {
    x: Tensor,
    parameters: Tensor,
    op: Box<dyn Differentiable>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("x", &self.x.dims()).field("parameters", &self.parameters.dims()).finish()
    }
}

impl Node {
    /// The gradients of x and of the flat parameters, where wanted, for `g` of the result.
    ///
    /// # Errors
    /// If `g` has another shape or type.
    pub fn backward(&self, g: &Upstream, wants: (bool, bool)) -> Result<(Option<Upstream>, Option<Tensor>)> {
        let of = &g.tensor;
        if of.dims() != self.x.dims() || of.dtype() != self.x.dtype() {
            bail!("part: gradient {:?} {:?} for a result {:?}", of.dtype(), of.dims(), self.x.dims())
        }
        self.op.gradients(&self.x, &self.parameters, g, wants)
    }
}
