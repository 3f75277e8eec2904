//! One block: attention and MLP with their norms, placed before, after, or on both sides.

use std::sync::Arc;

use candle_core::Tensor;
use espalier_adapters::module::{Linear, Norm};
use espalier_adapters::projected::{FlatParameters, lay_together};
use espalier_adapters::{Flow, ModuleMut};
use espalier_kernels::activation::{Activation, activate, gated};
use espalier_kernels::decode::DecoderBlock;
use espalier_kernels::part::{FeedForwardPart, Node, Upstream, attention_part, feed_forward_part};

use crate::Result;
use crate::attention::Attention;
use crate::builder::Builder;
use crate::cache::LayerCache;
use crate::config::{NormPlacement, Projections};
use crate::context::Context;
use crate::fused::Fused;

/// The feed-forward part: down(act(gate x) * up x), or down(act(up x)).
#[derive(Debug)]
struct Mlp {
    gate_up: Vec<Linear>,
    down: Linear,
    activation: Activation,
    gated: bool,
    width: usize,
}

impl Mlp {
    fn load(build: &mut Builder<'_>, block: &str) -> Result<Self> {
        let c = build.config;
        let mut gate_up: Vec<Linear> = match c.names.gate_up {
            Projections::Fused(name) => {
                vec![build.linear(&format!("{block}.{name}"), 2 * c.intermediate, c.hidden, c.mlp_bias)?]
            }
            Projections::Split(names) => names
                .iter()
                .map(|name| build.linear(&format!("{block}.{name}"), c.intermediate, c.hidden, c.mlp_bias))
                .collect::<Result<_>>()?,
        };
        lay_together(&mut gate_up)?;
        let mut down = build.linear(&format!("{block}.{}", c.names.down), c.hidden, c.intermediate, c.mlp_bias)?;
        lay_together(std::slice::from_mut(&mut down))?;
        Ok(Self { gate_up, down, activation: c.activation, gated: c.gated, width: c.intermediate })
    }

    fn forward(&self, x: &Tensor, flow: &Flow) -> Result<Tensor> {
        let inner = match (self.gate_up.as_slice(), self.gated) {
            ([gate, up], true) => gated(&gate.forward(x, flow)?, &up.forward(x, flow)?, self.activation)?,
            ([fused], true) => {
                let both = fused.forward(x, flow)?;
                let gate = both.narrow(2, 0, self.width)?.contiguous()?;
                gated(&gate, &both.narrow(2, self.width, self.width)?.contiguous()?, self.activation)?
            }
            (all, _) => activate(&all[0].forward(x, flow)?, self.activation)?,
        };
        Ok(self.down.forward(&inner, flow)?)
    }

    /// The whole as one operation and its flat parameters, norm before and residual sum after included; None where something
    /// in it has no such form.
    fn part(
        &self,
        x: &Tensor,
        norm: Option<&Norm>,
        residual: bool,
        flow: &Flow,
    ) -> Result<Option<(Arc<FeedForwardPart>, Option<FlatParameters>)>> {
        let Some(fused) = Fused::of(x, norm, &self.gate_up, &self.down, flow)? else { return Ok(None) };
        let part = FeedForwardPart {
            norm: fused.norm,
            inputs: fused.inputs,
            output: fused.output,
            activation: self.activation,
            gated: self.gated,
            residual,
        };
        let parameters = fused.parameters.as_ref().map_or(&[][..], FlatParameters::parts);
        Ok(part.is_fused(x, parameters)?.then(|| (Arc::new(part), fused.parameters)))
    }
}

/// Flat parameters, each with its gradient.
pub type FlatGradients = Vec<(FlatParameters, Tensor)>;

/// One pass through a block, to go back through without a tape.
#[derive(Debug)]
pub struct BlockPass {
    nodes: [(Node, Option<FlatParameters>); 2],
}

impl BlockPass {
    /// The gradient of the block's input, if wanted, for `g` of its output; and those of its flat parameters that are on the
    /// tape, each with them.
    ///
    /// # Errors
    /// If `g` has another shape than the output.
    pub fn backward(self, g: &Upstream, wants_x: bool) -> Result<(Option<Upstream>, FlatGradients)> {
        let [(attention, a), (mlp, m)] = self.nodes;
        let mut gradients = Vec::with_capacity(2);
        let trained = |flat: &Option<FlatParameters>| flat.as_ref().is_some_and(FlatParameters::is_trained);
        let (dx, d) = mlp.backward(g, (true, trained(&m)))?;
        gradients.extend(m.zip(d));
        drop(mlp);
        let Some(dx) = dx else { return Ok((None, gradients)) };
        let (dx, d) = attention.backward(&dx, (wants_x, trained(&a)))?;
        gradients.extend(a.zip(d));
        Ok((dx, gradients))
    }
}

/// One block.
#[derive(Debug)]
pub(crate) struct Block {
    attention: Attention,
    mlp: Mlp,
    norms: Vec<Norm>,
    placement: NormPlacement,
}

impl Block {
    pub(crate) fn load(build: &mut Builder<'_>, path: &str, layer: usize) -> Result<Self> {
        let c = build.config;
        let attention = Attention::load(build, path, layer)?;
        let mlp = Mlp::load(build, path)?;
        let norms =
            c.names.norms.iter().map(|name| build.norm(&format!("{path}.{name}"), c.hidden)).collect::<Result<_>>()?;
        Ok(Self { attention, mlp, norms, placement: c.placement })
    }

    pub(crate) fn forward(
        &self,
        x: &Tensor,
        context: &Context,
        flow: &Flow,
        cache: Option<&mut LayerCache>,
    ) -> Result<Tensor> {
        let n = &self.norms;
        Ok(match self.placement {
            NormPlacement::Pre => {
                let x = self.attend(x, Some(&n[0]), true, context, flow, cache)?;
                self.feed(&x, Some(&n[1]), true, flow)?
            }
            NormPlacement::Post => {
                let x = n[0].forward(&self.attend(x, None, true, context, flow, cache)?)?;
                n[1].forward(&self.feed(&x, None, true, flow)?)?
            }
            NormPlacement::Sandwich => {
                let attended = self.attend(x, Some(&n[0]), false, context, flow, cache)?;
                let x = (x + n[1].forward(&attended)?)?;
                let fed = self.feed(&x, Some(&n[2]), false, flow)?;
                (&x + n[3].forward(&fed)?)?
            }
        })
    }

    /// The output for `x` off the tape and the way back through it, where the block is two fused operations.
    pub(crate) fn pass(&self, x: &Tensor, context: &Context, flow: &Flow) -> Result<Option<(Tensor, BlockPass)>> {
        let n = &self.norms;
        if self.placement != NormPlacement::Pre {
            return Ok(None);
        }
        let attention = self.attention.part(x, Some(&n[0]), true, context, flow)?;
        let mlp = self.mlp.part(x, Some(&n[1]), true, flow)?;
        let (Some((attention, a)), Some((mlp, m))) = (attention, mlp) else { return Ok(None) };
        let values = |flat: &Option<FlatParameters>| flat.as_ref().map(FlatParameters::off_tape).transpose();
        let (y, attention) = attention.node(x, values(&a)?.as_ref())?;
        let (y, mlp) = mlp.node(&y, values(&m)?.as_ref())?;
        Ok(Some((y, BlockPass { nodes: [(attention, a), (mlp, m)] })))
    }

    /// The block as a decoder takes it for rows like x [b, 1, h], after what its cache holds.
    pub(crate) fn step(
        &self,
        x: &Tensor,
        context: &Context,
        flow: &Flow,
        cache: &LayerCache,
    ) -> Result<Option<DecoderBlock>> {
        let n = &self.norms;
        if self.placement != NormPlacement::Pre {
            return Ok(None);
        }
        let attention = self.attention.part(x, Some(&n[0]), true, context, flow)?;
        let mlp = self.mlp.part(x, Some(&n[1]), true, flow)?;
        let (Some((attention, a)), Some((feed_forward, m))) = (attention, mlp) else { return Ok(None) };
        let Some((keys, values)) = cache.filled()? else { return Ok(None) };
        let attention_parameters = a.as_ref().map(FlatParameters::off_tape).transpose()?;
        let feed_forward_parameters = m.as_ref().map(FlatParameters::off_tape).transpose()?;
        Ok(Some(DecoderBlock { attention, attention_parameters, feed_forward, feed_forward_parameters, keys, values }))
    }

    /// Attention of the normalised input, added to the input if `residual`: as one operation where it has that form.
    fn attend(
        &self,
        x: &Tensor,
        norm: Option<&Norm>,
        residual: bool,
        context: &Context,
        flow: &Flow,
        cache: Option<&mut LayerCache>,
    ) -> Result<Tensor> {
        if cache.is_none()
            && let Some((part, parameters)) = self.attention.part(x, norm, residual, context, flow)?
        {
            let values = parameters.as_ref().map(FlatParameters::on_tape).transpose()?;
            return Ok(attention_part(x, values.as_ref(), &part)?);
        }
        let y = match norm {
            Some(norm) => self.attention.forward(&norm.forward(x)?, context, flow, cache)?,
            None => self.attention.forward(x, context, flow, cache)?,
        };
        if residual { Ok((x + y)?) } else { Ok(y) }
    }

    /// The same for the feed-forward part.
    fn feed(&self, x: &Tensor, norm: Option<&Norm>, residual: bool, flow: &Flow) -> Result<Tensor> {
        if let Some((part, parameters)) = self.mlp.part(x, norm, residual, flow)? {
            let values = parameters.as_ref().map(FlatParameters::on_tape).transpose()?;
            return Ok(feed_forward_part(x, values.as_ref(), &part)?);
        }
        let y = match norm {
            Some(norm) => self.mlp.forward(&norm.forward(x)?, flow)?,
            None => self.mlp.forward(x, flow)?,
        };
        if residual { Ok((x + y)?) } else { Ok(y) }
    }

    pub(crate) fn walk(
        &mut self,
        visit: &mut dyn FnMut(ModuleMut<'_>) -> espalier_adapters::Result<()>,
    ) -> espalier_adapters::Result<()> {
        self.attention.walk(visit)?;
        for linear in &mut self.mlp.gate_up {
            visit(ModuleMut::Linear(linear))?;
        }
        visit(ModuleMut::Linear(&mut self.mlp.down))?;
        self.norms.iter_mut().try_for_each(|norm| visit(ModuleMut::Norm(norm)))
    }
}
