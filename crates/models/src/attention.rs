//! Multi-head attention with grouped keys and values, windows, soft caps, per-head norms and rotary positions, as switches.

use std::sync::Arc;

use candle_core::Tensor;
use espalier_adapters::module::{Linear, Norm};
use espalier_adapters::projected::{FlatParameters, lay_together};
use espalier_adapters::{Flow, ModuleMut};
use espalier_kernels::attention::attention;
use espalier_kernels::part::AttentionPart;
use espalier_kernels::rope::rope;

use crate::Result;
use crate::builder::Builder;
use crate::cache::LayerCache;
use crate::config::{ModelConfig, Projections};
use crate::context::Context;
use crate::fused::Fused;

/// The projections of one block's attention.
#[derive(Debug)]
pub(crate) struct Attention {
    qkv: Vec<Linear>,
    o: Linear,
    q_norm: Option<Norm>,
    k_norm: Option<Norm>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    layer: usize,
}

impl Attention {
    pub(crate) fn load(build: &mut Builder<'_>, block: &str, layer: usize) -> Result<Self> {
        let c: &ModelConfig = build.config;
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let mut qkv: Vec<Linear> = match c.names.qkv {
            Projections::Fused(name) => {
                vec![build.linear(&format!("{block}.{name}"), q + 2 * kv, c.hidden, c.qkv_bias)?]
            }
            Projections::Split(names) => names
                .iter()
                .zip([q, kv, kv])
                .map(|(name, width)| build.linear(&format!("{block}.{name}"), width, c.hidden, c.qkv_bias))
                .collect::<Result<_>>()?,
        };
        lay_together(&mut qkv)?;
        let mut o = build.linear(&format!("{block}.{}", c.names.o), c.hidden, q, c.o_bias)?;
        lay_together(std::slice::from_mut(&mut o))?;
        let mut head_norm =
            |name: &str| c.qk_norm.then(|| build.norm(&format!("{block}.self_attn.{name}"), c.head_dim)).transpose();
        let (q_norm, k_norm) = (head_norm("q_norm")?, head_norm("k_norm")?);
        Ok(Self { qkv, o, q_norm, k_norm, heads: c.heads, kv_heads: c.kv_heads, head_dim: c.head_dim, layer })
    }

    pub(crate) fn forward(
        &self,
        x: &Tensor,
        context: &Context,
        flow: &Flow,
        cache: Option<&mut LayerCache>,
    ) -> Result<Tensor> {
        let (b, t, _) = x.dims3()?;
        let (q_width, kv_width) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let (q, k, v) = match self.qkv.as_slice() {
            [fused] => {
                let all = fused.forward(x, flow)?;
                let part = |start, width| all.narrow(2, start, width);
                (part(0, q_width)?, part(q_width, kv_width)?, part(q_width + kv_width, kv_width)?)
            }
            split => (split[0].forward(x, flow)?, split[1].forward(x, flow)?, split[2].forward(x, flow)?),
        };
        // Nothing goes back through a cache.
        let (q, k, v) = if cache.is_some() { (q.detach(), k.detach(), v.detach()) } else { (q, k, v) };
        let mut q = q.contiguous()?.reshape((b, t, self.heads, self.head_dim))?;
        let mut k = k.contiguous()?.reshape((b, t, self.kv_heads, self.head_dim))?;
        let v = v.contiguous()?.reshape((b, t, self.kv_heads, self.head_dim))?;
        if let (Some(q_norm), Some(k_norm)) = (&self.q_norm, &self.k_norm) {
            q = q_norm.forward(&q)?;
            k = k_norm.forward(&k)?;
        }
        if let Some((cos, sin)) = &context.rotary {
            q = rope(&q, cos, sin)?;
            k = rope(&k, cos, sin)?;
        }
        let (k, v) = match &context.standing {
            Some(standing) => (standing.put(&k, self.layer, 0)?, standing.put(&v, self.layer, 1)?),
            None => (k, v),
        };
        let (k, v) = match cache {
            Some(cache) => cache.append(&k, &v)?,
            None => (k, v),
        };
        let out = attention(&q, &k, &v, context.attention(self.layer))?;
        Ok(self.o.forward(&out.reshape((b, t, q_width))?, flow)?)
    }

    /// The whole as one operation and its flat parameters, norm before and residual sum after included; None where something
    /// in it has no such form.
    pub(crate) fn part(
        &self,
        x: &Tensor,
        norm: Option<&Norm>,
        residual: bool,
        context: &Context,
        flow: &Flow,
    ) -> Result<Option<(Arc<AttentionPart>, Option<FlatParameters>)>> {
        if self.q_norm.is_some() || self.k_norm.is_some() || context.standing.is_some() {
            return Ok(None);
        }
        let Some(fused) = Fused::of(x, norm, &self.qkv, &self.o, flow)? else { return Ok(None) };
        let part = AttentionPart {
            norm: fused.norm,
            inputs: fused.inputs,
            output: fused.output,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            rotary: context.rotary.clone(),
            spec: context.attention(self.layer).clone(),
            residual,
        };
        let parameters = fused.parameters.as_ref().map_or(&[][..], FlatParameters::parts);
        Ok(part.is_fused(x, parameters)?.then(|| (Arc::new(part), fused.parameters)))
    }

    pub(crate) fn walk(
        &mut self,
        visit: &mut dyn FnMut(ModuleMut<'_>) -> espalier_adapters::Result<()>,
    ) -> espalier_adapters::Result<()> {
        for linear in &mut self.qkv {
            visit(ModuleMut::Linear(linear))?;
        }
        for norm in [&mut self.q_norm, &mut self.k_norm].into_iter().flatten() {
            visit(ModuleMut::Norm(norm))?;
        }
        visit(ModuleMut::Linear(&mut self.o))
    }
}
