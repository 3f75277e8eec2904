//! The feed-forward part.
//!
//! Equation: y = x + D(act(G n) * (U n)), or y = x + D(act(U n)), n = norm(x)
//! Shapes:   x and y [b, t, h]; kept: the outputs of G and U [b * t, f]
//! Source:   as `crate::activation`, in reverse mode; the norm and the activation are computed again on the way back

use super::group::{Group, Kept, groups};
use super::node::{Back, Node, Part, apply, node, runs};
use super::{PartNorm, Projection, finish, join, normed, reference, split};
use crate::activation::Activation;
use crate::activation::cpu::{activated, activated_gradient, gated_forward, gated_gradients};
use crate::product::Multiply;
use candle_core::{Result, Tensor, bail};
use std::sync::Arc;

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

/// The part's result for x [b, t, h]; `parameters` holds A of gate and up, then their B and gains, then A, B and gain of the
/// projection back. Gradients for x and the parameters.
pub fn feed_forward_part(x: &Tensor, parameters: Option<&Tensor>, part: &Arc<FeedForwardPart>) -> Result<Tensor> {
    apply(part, x, parameters)
}

impl FeedForwardPart {
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

    /// Widths of gate and up where one projection gives both.
    fn halves(&self) -> Option<[usize; 2]> {
        match self.inputs.as_slice() {
            [both] if self.gated => Some([both.weight.d_out() / 2; 2]),
            _ => None,
        }
    }

    fn activate<T: Multiply>(&self, hidden: &[Vec<T>]) -> Vec<T> {
        match hidden {
            [gate, up] => gated_forward(self.activation, gate, up),
            [only, ..] => activated(self.activation, only),
            [] => Vec::new(),
        }
    }
}

/// What is kept of one pass.
pub(super) struct Saved<T> {
    /// Gate and up, or the one output, before the nonlinearity.
    hidden: Vec<Vec<T>>,
    inputs: Kept<T>,
    output: Kept<T>,
}

impl Part for FeedForwardPart {
    const NAME: &'static str = "feed-forward part";
    type Saved<T: Multiply> = Saved<T>;

    fn parameters(&self) -> usize {
        self.groups().1.end
    }

    fn fits(&self, _: &Tensor) -> Result<()> {
        if !matches!((self.inputs.len(), self.gated), (1, _) | (2, true)) {
            bail!("feed-forward part: {} input projections, expected one, or gate and up", self.inputs.len())
        }
        let widths: Vec<usize> = self.inputs.iter().map(|p| p.weight.d_out()).collect();
        let inner = self.output.weight.d_in();
        let fits = match self.halves() {
            Some(_) => widths == [2 * inner],
            None => widths.iter().all(|width| *width == inner),
        };
        if !fits {
            bail!("feed-forward part: outputs {widths:?} for {inner} inputs back")
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
        let (mut hidden, kept_inputs) = inputs.forward(&rows, n, parameters, None)?;
        drop(rows);
        if let (Some(widths), [both]) = (self.halves(), hidden.as_slice()) {
            hidden = split(both, &widths);
        }
        let inner = self.activate(&hidden);
        let (mut y, kept_output) = output.forward(&inner, n, parameters, self.residual.then_some(x))?;
        Ok((y.pop().unwrap_or_default(), Saved { hidden, inputs: kept_inputs, output: kept_output }))
    }

    fn backward<T: Multiply>(&self, saved: &Saved<T>, back: Back<'_, T>) -> Result<Option<Vec<T>>> {
        let Back { x, parameters, g, size, mut d_parameters, wants_x } = back;
        let (inputs, output) = self.groups();
        let n = size.0 * size.1;
        let inner = self.activate(&saved.hidden);
        let d_inner = output
            .backward(&inner, n, &[g], &saved.output, parameters, (d_parameters.as_deref_mut(), true))?
            .unwrap_or_default();
        drop(inner);
        let mut d_hidden: Vec<Vec<T>> = match saved.hidden.as_slice() {
            [gate, up] => {
                let (dg, du) = gated_gradients(self.activation, gate, up, &d_inner, true, true);
                vec![dg.unwrap_or_default(), du.unwrap_or_default()]
            }
            [only, ..] => vec![activated_gradient(self.activation, only, &d_inner)],
            [] => Vec::new(),
        };
        drop(d_inner);
        if let Some(widths) = self.halves() {
            d_hidden = vec![join(&d_hidden, &widths)];
        }
        let grads: Vec<&[T]> = d_hidden.iter().map(Vec::as_slice).collect();
        let norm = PartNorm::normaliser(self.norm.as_ref())?;
        let rows = normed(norm.as_ref(), x);
        let dx = inputs.backward(&rows, n, &grads, &saved.inputs, parameters, (d_parameters, wants_x))?;
        Ok(dx.map(|dx| finish(dx, norm.as_ref(), x, self.residual.then_some(g))))
    }

    fn projections(&self) -> impl Iterator<Item = &Projection> {
        self.inputs.iter().chain([&self.output])
    }

    fn reference(&self, x: &Tensor, parameters: &Tensor) -> Result<Tensor> {
        reference::feed_forward_part(x, parameters, self)
    }
}
