//! The attention part.
//!
//! Equation: y = x + O(softmax(rope(Q n) rope(K n)^T) V n), n = norm(x)
//! Shapes:   x and y [b, t, h]; kept: q, k, v after rotation, the attention's output and ln-sums
//! Source:   as `crate::attention` and `crate::rope`, in reverse mode; the norm is computed again on the way back

use super::group::{Group, Kept, groups};
use super::node::{Back, Node, Part, apply, node, runs};
use super::{PartNorm, Projection, finish, join, normed, reference, split};
use crate::attention::cpu::{gradients, run};
use crate::attention::{AttentionSpec, Dims};
use crate::element::Element;
use crate::product::Multiply;
use crate::rope::cpu::turn;
use candle_core::{DType, Result, Tensor, bail};
use std::sync::Arc;

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

/// The part's result for x [b, t, h]; `parameters` holds A of query, key and value, then their B and gains, then A, B and gain
/// of the projection back. Gradients for x and the parameters.
pub fn attention_part(x: &Tensor, parameters: Option<&Tensor>, part: &Arc<AttentionPart>) -> Result<Tensor> {
    apply(part, x, parameters)
}

impl AttentionPart {
    /// The part's result for x [b, t, h] off the tape, and the node that gives its gradients.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn node(self: &Arc<Self>, x: &Tensor, parameters: Option<&Tensor>) -> Result<(Tensor, Node)> {
        node(self, x, parameters)
    }

    /// Whether the part runs fused for rows `x` [b, t, h] with parameters like these.
    ///
    /// # Errors
    /// If the device's kernels cannot be loaded.
    pub fn is_fused(&self, x: &Tensor, parameters: &[Tensor]) -> Result<bool> {
        runs(self, x, parameters)
    }

    pub(crate) fn groups(&self) -> (Group<'_>, Group<'_>) {
        groups(&self.inputs, &self.output)
    }

    pub(super) fn widths(&self) -> [usize; 3] {
        [self.heads, self.kv_heads, self.kv_heads].map(|heads| heads * self.head_dim)
    }

    pub(super) fn dims(&self, (b, t): (usize, usize)) -> Dims {
        let (h, kv, d) = (self.heads, self.kv_heads, self.head_dim);
        Dims { b, tq: t, tk: t, room: t, h, kv, d, dv: d }
    }

    /// Turns queries and keys by their positions, or back.
    fn turn<T: Element>(&self, parts: &mut [Vec<T>], t: usize, inverse: bool) -> Result<()> {
        let Some((cos, sin)) = &self.rotary else { return Ok(()) };
        let half = cos.dim(2)?;
        let values = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
        let (cos, sin) = (values(cos)?, values(sin)?);
        for (x, heads) in parts.iter_mut().zip([self.heads, self.kv_heads]) {
            *x = turn(x, (t, heads, self.head_dim), (&cos, &sin, half), inverse);
        }
        Ok(())
    }
}

/// What is kept of one pass.
pub(super) struct Saved<T> {
    /// q, k and v.
    qkv: Vec<Vec<T>>,
    out: Vec<T>,
    log_sums: Vec<f32>,
    inputs: Kept<T>,
    output: Kept<T>,
}

impl Part for AttentionPart {
    const NAME: &'static str = "attention part";
    type Saved<T: Multiply> = Saved<T>;

    fn parameters(&self) -> usize {
        self.groups().1.end
    }

    fn fits(&self, x: &Tensor) -> Result<()> {
        let (b, t, _) = x.dims3()?;
        if !matches!(self.inputs.len(), 1 | 3) || self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            bail!("attention part: {} projections for {} heads over {}", self.inputs.len(), self.heads, self.kv_heads)
        }
        let outputs: usize = self.inputs.iter().map(|p| p.weight.d_out()).sum();
        let inner = self.heads * self.head_dim;
        if outputs != self.widths().iter().sum::<usize>() || self.output.weight.d_in() != inner {
            bail!(
                "attention part: {outputs} outputs and {} inputs back for {} heads",
                self.output.weight.d_in(),
                self.heads
            )
        }
        if let Some(s) = self.spec.segments.as_deref()
            && (s.batch != b || s.query.len() != b * t || s.key.len() != b * t)
        {
            let (ids, keys) = (s.query.len(), s.key.len());
            bail!(
                "attention part: segments for batch {} with {ids} query and {keys} key ids, x {:?}",
                s.batch,
                x.dims()
            )
        }
        if let Some((cos, sin)) = &self.rotary {
            let (cb, ct, half) = cos.dims3()?;
            if sin.dims() != cos.dims() || ct != t || (cb != b && cb != 1) || 2 * half > self.head_dim {
                bail!("attention part: x {:?}, cos {:?}, sin {:?}", x.dims(), cos.dims(), sin.dims())
            }
        }
        Ok(())
    }

    fn forward<T: Multiply>(
        &self,
        x: &[T],
        parameters: &[f32],
        size: (usize, usize),
    ) -> Result<(Vec<T>, Self::Saved<T>)> {
        let (inputs, output) = self.groups();
        let (n, norm) = (size.0 * size.1, PartNorm::normaliser(self.norm.as_ref())?);
        let rows = normed(norm.as_ref(), x);
        let (mut qkv, kept_inputs) = inputs.forward(&rows, n, parameters, None)?;
        drop(rows);
        if let [all] = qkv.as_slice() {
            qkv = split(all, &self.widths());
        }
        self.turn(&mut qkv, size.1, false)?;
        let (out, log_sums) = run::<T>(&self.dims(size), &self.spec, &qkv[0], &qkv[1], &qkv[2]);
        let (mut y, kept_output) = output.forward(&out, n, parameters, self.residual.then_some(x))?;
        let saved = Saved { qkv, out, log_sums, inputs: kept_inputs, output: kept_output };
        Ok((y.pop().unwrap_or_default(), saved))
    }

    fn backward<T: Multiply>(&self, saved: &Saved<T>, back: Back<'_, T>) -> Result<Option<Vec<T>>> {
        let Back { x, parameters, g, size, mut d_parameters, wants_x } = back;
        let (inputs, output) = self.groups();
        let n = size.0 * size.1;
        let d_out = output
            .backward(&saved.out, n, &[g], &saved.output, parameters, (d_parameters.as_deref_mut(), true))?
            .unwrap_or_default();
        let (q, k, v) = (&saved.qkv[0], &saved.qkv[1], &saved.qkv[2]);
        let (dq, dk, dv) = gradients(&self.dims(size), &self.spec, (q, k, v), (&saved.out, &saved.log_sums), &d_out);
        drop(d_out);
        let mut grads = vec![dq, dk, dv];
        self.turn(&mut grads, size.1, true)?;
        if self.inputs.len() == 1 {
            grads = vec![join(&grads, &self.widths())];
        }
        let grads: Vec<&[T]> = grads.iter().map(Vec::as_slice).collect();
        let norm = PartNorm::normaliser(self.norm.as_ref())?;
        let rows = normed(norm.as_ref(), x);
        let dx = inputs.backward(&rows, n, &grads, &saved.inputs, parameters, (d_parameters, wants_x))?;
        Ok(dx.map(|dx| finish(dx, norm.as_ref(), x, self.residual.then_some(g))))
    }

    fn projections(&self) -> impl Iterator<Item = &Projection> {
        self.inputs.iter().chain([&self.output])
    }

    fn reference(&self, x: &Tensor, parameters: &Tensor) -> Result<Tensor> {
        reference::attention_part(x, parameters, self)
    }
}
