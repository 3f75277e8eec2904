//! The attention part.

use super::group::{Group, Kept};
use super::{Differentiable, Node, PartNorm, Projection, check, is_fused, join, no_parameters, reference, split};
use crate::attention::cpu::{gradients, run};
use crate::attention::{AttentionSpec, Dims};
use crate::element::{Element, by_dtype, cpu_slice, slice, tensor_like};
use crate::product::Multiply;
use crate::rope::cpu::turn;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, WithDType, bail};
use std::any::Any;
use std::sync::{Arc, OnceLock};

/// What an attention part is.
#[derive(Debug, Clone)]
pub struct AttentionPart {
    /// The norm before it.
    pub norm: Option<PartNorm>,
    /// Query, key and value, or one projection whose outputs are all three.
    pub inputs: Vec<Projection>,
    /// The projection back.
    pub output: Projection,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Cosines and sines [b or 1, t, r / 2] of the rotary positions.
    pub rotary: Option<(Tensor, Tensor)>,
    /// Who sees whom.
    pub spec: AttentionSpec,
    /// Whether the input is added to the result.
    pub residual: bool,
}

impl AttentionPart {
    fn check(&self, x: &Tensor, parameters: &Tensor) -> Result<()> {
        let (b, t, _) = check("attention part", x, parameters, self.groups().1.end)?;
        if !matches!(self.inputs.len(), 1 | 3) || self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            bail!("attention part: {} projections for {} heads over {}", self.inputs.len(), self.heads, self.kv_heads)
        }
        if let Some((cos, sin)) = &self.rotary {
            let (cb, ct, half) = cos.dims3()?;
            if sin.dims() != cos.dims() || ct != t || (cb != b && cb != 1) || 2 * half > self.head_dim {
                bail!("attention part: x {:?}, cos {:?}, sin {:?}", x.dims(), cos.dims(), sin.dims())
            }
        }
        Ok(())
    }

    fn groups(&self) -> (Group<'_>, Group<'_>) {
        let inputs = Group::new(&self.inputs, 0);
        let output = Group::new(std::slice::from_ref(&self.output), inputs.end);
        (inputs, output)
    }

    fn widths(&self) -> [usize; 3] {
        [self.heads, self.kv_heads, self.kv_heads].map(|heads| heads * self.head_dim)
    }

    fn split<T: Element>(&self, rows: &[T]) -> Result<[Vec<T>; 3]> {
        match <[Vec<T>; 3]>::try_from(split(rows, &self.widths())) {
            Ok(parts) => Ok(parts),
            Err(_) => bail!("attention part: outputs for {:?}", self.widths()),
        }
    }

    fn dims(&self, b: usize, t: usize) -> Dims {
        let (h, kv, d) = (self.heads, self.kv_heads, self.head_dim);
        Dims { b, tq: t, tk: t, h, kv, d, dv: d }
    }
}

impl AttentionPart {
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
        let op = Attention { part: self.clone(), kept: OnceLock::new() };
        let x = x.detach().contiguous()?;
        let y = x.apply_op2_no_bwd(&parameters, &op)?;
        Ok((y, Node::new(x, parameters, Box::new(op))))
    }
}

/// The part's result for x [b, t, h]; `parameters` holds A of query, key and value, then their B and gains, then A, B and gain
/// of the projection back. Gradients for x and the parameters.
pub fn attention_part(x: &Tensor, parameters: Option<&Tensor>, part: &Arc<AttentionPart>) -> Result<Tensor> {
    let parameters = parameters.map_or_else(|| no_parameters(x), |p| p.contiguous())?;
    part.check(x, &parameters)?;
    if !is_fused(x, Some(&parameters)) {
        return reference::attention_part(x, &parameters, part);
    }
    x.contiguous()?.apply_op2(&parameters, Attention { part: part.clone(), kept: OnceLock::new() })
}

/// What is kept of one pass.
struct Saved<T> {
    qkv: [Vec<T>; 3],
    out: Vec<T>,
    log_sums: Vec<f32>,
    inputs: Kept<T>,
    output: Kept<T>,
}

struct Attention {
    part: Arc<AttentionPart>,
    /// The `Saved` of the forward pass, in the element type of its input.
    kept: OnceLock<Box<dyn Any + Send + Sync>>,
}

impl Attention {
    /// Turns queries and keys by their positions, or back.
    fn turn<T: Element>(&self, parts: &mut [Vec<T>; 3], t: usize, inverse: bool) -> Result<()> {
        let Some((cos, sin)) = &self.part.rotary else { return Ok(()) };
        let half = cos.dim(2)?;
        let values = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
        let (cos, sin) = (values(cos)?, values(sin)?);
        for (x, heads) in parts.iter_mut().zip([self.part.heads, self.part.kv_heads]) {
            *x = turn(x, (t, heads, self.part.head_dim), (&cos, &sin, half), inverse);
        }
        Ok(())
    }

    fn forward<T: Multiply>(&self, x: &[T], parameters: &[f32], (b, t): (usize, usize)) -> Result<Vec<T>> {
        let part = &self.part;
        let (inputs, output) = part.groups();
        let normed =
            part.norm.as_ref().map(|norm| Ok::<_, candle_core::Error>(norm.normaliser()?.forward(x))).transpose()?;
        let (mut outputs, kept_inputs) = inputs.forward(normed.as_deref().unwrap_or(x), b * t, parameters, None)?;
        drop(normed);
        let mut qkv = match (outputs.pop(), outputs.pop(), outputs.pop()) {
            (Some(v), Some(k), Some(q)) => [q, k, v],
            (Some(all), None, None) => part.split(&all)?,
            _ => bail!("attention part: three projections or one"),
        };
        self.turn(&mut qkv, t, false)?;
        let (out, log_sums) = run::<T>(&part.dims(b, t), &part.spec, &qkv[0], &qkv[1], &qkv[2]);
        let (mut y, kept_output) = output.forward(&out, b * t, parameters, part.residual.then_some(x))?;
        let saved = Saved { qkv, out, log_sums, inputs: kept_inputs, output: kept_output };
        let _ = self.kept.set(Box::new(saved));
        Ok(y.pop().unwrap_or_default())
    }

    fn backward<T: Multiply>(
        &self,
        x: &[T],
        parameters: &[f32],
        g: &[T],
        (b, t): (usize, usize),
        mut d_parameters: Option<&mut [f32]>,
        wanted: bool,
    ) -> Result<Option<Vec<T>>> {
        let Some(saved) = self.kept.get().and_then(|s| s.downcast_ref::<Saved<T>>()) else {
            bail!("attention part: backward before forward")
        };
        let part = &self.part;
        let (inputs, output) = part.groups();
        let d_out = output
            .backward(&saved.out, b * t, &[g], &saved.output, parameters, (d_parameters.as_deref_mut(), true))?
            .unwrap_or_default();
        let [q, k, v] = &saved.qkv;
        let (dq, dk, dv) = gradients(&part.dims(b, t), &part.spec, (q, k, v), (&saved.out, &saved.log_sums), &d_out);
        drop(d_out);
        let mut grads = [dq, dk, dv];
        self.turn(&mut grads, t, true)?;
        let joined = (part.inputs.len() == 1).then(|| join(&grads, &part.widths()));
        let grads: Vec<&[T]> = match &joined {
            Some(joined) => vec![joined],
            None => grads.iter().map(Vec::as_slice).collect(),
        };
        let norm = part.norm.as_ref().map(PartNorm::normaliser).transpose()?;
        let normed = norm.as_ref().map(|norm| norm.forward(x));
        let rows = normed.as_deref().unwrap_or(x);
        let dx = inputs.backward(rows, b * t, &grads, &saved.inputs, parameters, (d_parameters, wanted))?;
        Ok(dx.map(|dx| super::finish(dx, norm.as_ref(), x, part.residual.then_some(g))))
    }
}

impl CustomOp2 for Attention {
    fn name(&self) -> &'static str {
        "attention-part"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, p: &CpuStorage, lp: &Layout) -> Result<(CpuStorage, Shape)> {
        let (b, t, _) = lx.shape().dims3()?;
        let parameters = slice::<f32>(p, lp)?;
        let out = by_dtype!(x.dtype(), self.name(), T => {
            <T as WithDType>::to_cpu_storage_owned(self.forward::<T>(slice(x, lx)?, parameters, (b, t))?)
        });
        Ok((out, lx.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, p: &Tensor, _: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        self.gradients(x, p, g, (x.track_op(), p.track_op()))
    }
}

impl Differentiable for Attention {
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
            let dx = self.backward::<T>(xs, parameters, gs, (b, t), d_parameters.as_deref_mut(), wants_x)?;
            Ok((dx.map(|dx| tensor_like(dx, x)).transpose()?, d_parameters.map(|d| tensor_like(d, p)).transpose()?))
        })
    }
}
