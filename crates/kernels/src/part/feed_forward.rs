//! The feed-forward part.

use super::group::{Group, Kept};
use super::{Differentiable, Node, PartNorm, Projection, check, is_fused, join, no_parameters, reference, split};
use crate::activation::Activation;
use crate::activation::cpu::{activated, activated_gradient, gated_forward, gated_gradients};
use crate::element::{by_dtype, cpu_slice, slice, tensor_like};
use crate::product::Multiply;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, WithDType, bail};
use std::any::Any;
use std::sync::{Arc, OnceLock};

/// What a feed-forward part is.
#[derive(Debug, Clone)]
pub struct FeedForwardPart {
    /// The norm before it.
    pub norm: Option<PartNorm>,
    /// Gate and up, or one projection: whose outputs are both, or which is not gated.
    pub inputs: Vec<Projection>,
    /// The projection back.
    pub output: Projection,
    /// The nonlinearity.
    pub activation: Activation,
    /// Whether the nonlinearity of the first half of the inputs' outputs multiplies the second.
    pub gated: bool,
    /// Whether the input is added to the result.
    pub residual: bool,
}

impl FeedForwardPart {
    fn check(&self, x: &Tensor, parameters: &Tensor) -> Result<()> {
        check("feed-forward", x, parameters, self.groups().1.end)?;
        if !matches!((self.inputs.len(), self.gated), (1, _) | (2, true)) {
            bail!("feed-forward: {} input projections, expected one, or gate and up", self.inputs.len())
        }
        Ok(())
    }

    /// Widths of gate and up where one projection gives both.
    fn halves(&self) -> Option<[usize; 2]> {
        match self.inputs.as_slice() {
            [both] if self.gated => Some([both.weight.d_out() / 2; 2]),
            _ => None,
        }
    }

    fn groups(&self) -> (Group<'_>, Group<'_>) {
        let inputs = Group::new(&self.inputs, 0);
        let output = Group::new(std::slice::from_ref(&self.output), inputs.end);
        (inputs, output)
    }
}

impl FeedForwardPart {
    /// The part's result for x [b, t, h] off the tape, and the node that gives its gradients.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn node(self: &Arc<Self>, x: &Tensor, parameters: Option<&Tensor>) -> Result<(Tensor, Node)> {
        if !is_fused(x, parameters) {
            bail!(
                "a part without the tape: x is {:?}, expected f32, bf16 or f16 on the CPU and f32 parameters",
                x.dtype()
            )
        }
        let parameters = parameters.map_or_else(|| no_parameters(x), |p| p.detach().contiguous())?;
        self.check(x, &parameters)?;
        let op = FeedForward { part: self.clone(), kept: OnceLock::new() };
        let x = x.detach().contiguous()?;
        let y = x.apply_op2_no_bwd(&parameters, &op)?;
        Ok((y, Node::new(x, parameters, Box::new(op))))
    }
}

/// The part's result for x [b, t, h]; `parameters` holds A of gate and up, then their B and gains, then A, B and gain of the
/// projection back. Gradients for x and the parameters.
pub fn feed_forward_part(x: &Tensor, parameters: Option<&Tensor>, part: &Arc<FeedForwardPart>) -> Result<Tensor> {
    let parameters = parameters.map_or_else(|| no_parameters(x), |p| p.contiguous())?;
    part.check(x, &parameters)?;
    if !is_fused(x, Some(&parameters)) {
        return reference::feed_forward_part(x, &parameters, part);
    }
    x.contiguous()?.apply_op2(&parameters, FeedForward { part: part.clone(), kept: OnceLock::new() })
}

/// What is kept of one pass, for each element type.
struct Saved<T> {
    hidden: Vec<Vec<T>>,
    inputs: Kept<T>,
    output: Kept<T>,
}

struct FeedForward {
    part: Arc<FeedForwardPart>,
    /// The `Saved` of the forward pass, in the element type of its input.
    kept: OnceLock<Box<dyn Any + Send + Sync>>,
}

impl FeedForward {
    fn activate<T: Multiply>(&self, hidden: &[Vec<T>]) -> Vec<T> {
        match hidden {
            [gate, up] => gated_forward(self.part.activation, gate, up),
            [only, ..] => activated(self.part.activation, only),
            [] => Vec::new(),
        }
    }

    fn forward<T: Multiply>(&self, x: &[T], parameters: &[f32], n: usize) -> Result<Vec<T>> {
        let (inputs, output) = self.part.groups();
        let normed = self
            .part
            .norm
            .as_ref()
            .map(|norm| Ok::<_, candle_core::Error>(norm.normaliser()?.forward(x)))
            .transpose()?;
        let (mut hidden, kept_inputs) = inputs.forward(normed.as_deref().unwrap_or(x), n, parameters, None)?;
        if let Some(widths) = self.part.halves() {
            hidden = hidden.iter().flat_map(|both| split(both, &widths)).collect();
        }
        let inner = self.activate(&hidden);
        let (mut y, kept_output) = output.forward(&inner, n, parameters, self.part.residual.then_some(x))?;
        let _ = self.kept.set(Box::new(Saved { hidden, inputs: kept_inputs, output: kept_output }));
        Ok(y.pop().unwrap_or_default())
    }

    fn backward<T: Multiply>(
        &self,
        x: &[T],
        parameters: &[f32],
        g: &[T],
        n: usize,
        mut d_parameters: Option<&mut [f32]>,
        wanted: bool,
    ) -> Result<Option<Vec<T>>> {
        let Some(saved) = self.kept.get().and_then(|s| s.downcast_ref::<Saved<T>>()) else {
            bail!("feed-forward: backward before forward")
        };
        let (inputs, output) = self.part.groups();
        let inner = self.activate(&saved.hidden);
        let d_inner = output
            .backward(&inner, n, &[g], &saved.output, parameters, (d_parameters.as_deref_mut(), true))?
            .unwrap_or_default();
        drop(inner);
        let d_hidden: Vec<Vec<T>> = match saved.hidden.as_slice() {
            [gate, up] => {
                let (dg, du) = gated_gradients(self.part.activation, gate, up, &d_inner, true, true);
                vec![dg.unwrap_or_default(), du.unwrap_or_default()]
            }
            [only, ..] => vec![activated_gradient(self.part.activation, only, &d_inner)],
            [] => Vec::new(),
        };
        drop(d_inner);
        let d_hidden = match self.part.halves() {
            Some(widths) => vec![join(&d_hidden, &widths)],
            None => d_hidden,
        };
        let norm = self.part.norm.as_ref().map(PartNorm::normaliser).transpose()?;
        let normed = norm.as_ref().map(|norm| norm.forward(x));
        let grads: Vec<&[T]> = d_hidden.iter().map(Vec::as_slice).collect();
        let rows = normed.as_deref().unwrap_or(x);
        let dx = inputs.backward(rows, n, &grads, &saved.inputs, parameters, (d_parameters, wanted))?;
        Ok(dx.map(|dx| super::finish(dx, norm.as_ref(), x, self.part.residual.then_some(g))))
    }
}

impl CustomOp2 for FeedForward {
    fn name(&self) -> &'static str {
        "feed-forward"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, p: &CpuStorage, lp: &Layout) -> Result<(CpuStorage, Shape)> {
        let (b, t, _) = lx.shape().dims3()?;
        let parameters = slice::<f32>(p, lp)?;
        let out = by_dtype!(x.dtype(), self.name(), T => {
            <T as WithDType>::to_cpu_storage_owned(self.forward::<T>(slice(x, lx)?, parameters, b * t)?)
        });
        Ok((out, lx.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, p: &Tensor, _: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        self.gradients(x, p, g, (x.track_op(), p.track_op()))
    }
}

impl Differentiable for FeedForward {
    fn gradients(
        &self,
        x: &Tensor,
        p: &Tensor,
        g: &Tensor,
        (wants_x, wants_p): (bool, bool),
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (b, t, _) = x.dims3()?;
        let g = g.contiguous()?;
        let ((sx, lx), (sp, lp), (sg, lg)) = (x.storage_and_layout(), p.storage_and_layout(), g.storage_and_layout());
        let parameters = cpu_slice::<f32>(&sp, lp)?;
        let mut d_parameters = wants_p.then(|| vec![0f32; parameters.len()]);
        by_dtype!(x.dtype(), self.name(), T => {
            let (xs, gs) = (cpu_slice::<T>(&sx, lx)?, cpu_slice::<T>(&sg, lg)?);
            let dx = self.backward::<T>(xs, parameters, gs, b * t, d_parameters.as_deref_mut(), wants_x)?;
            Ok((dx.map(|dx| tensor_like(dx, x)).transpose()?, d_parameters.map(|d| tensor_like(d, p)).transpose()?))
        })
    }
}
