//! Generation by a recorded step, where model and device allow it.

use candle_core::{DType, Tensor};
use espalier_adapters::Flow;
use espalier_adapters::module::Norm;
use espalier_kernels::decode::{Decoder, DecoderPlan, ROWS};

use crate::cache::KvCache;
use crate::config::Positions;
use crate::context::{Context, table};
use crate::input::TokenBatch;
use crate::transformer::Model;
use crate::{Error, Result};

impl Model {
    /// A decoder that goes on after `cache`, for rows of at most `capacity` tokens, padding included. It gives what
    /// [`Self::advance`] gives for a token a row at the row's next position, but for rounding. None where the model, its adapters
    /// or the device are not of the form it needs (see [`Decoder::new`]), or rows of the cache are more than one sequence.
    ///
    /// It reads weights and adapters as they are now, and goes stale when they change: make one for each generation. The cache
    /// stays as it is.
    ///
    /// # Errors
    /// If the cache is longer than `capacity`, or the device is out of memory.
    pub fn decoder(&self, cache: &KvCache, capacity: usize, flow: &Flow) -> Result<Option<Decoder>> {
        let embedded = self.position.is_some() || self.token_type.is_some() || self.embed_norm.is_some();
        let scaled = self.config.embed_scale.is_some() || self.config.final_softcap.is_some();
        let fits = if self.device.is_cuda() { self.dtype == DType::BF16 } else { self.device.is_cpu() };
        if !fits || embedded || scaled || self.embed.is_changed() {
            return Ok(None);
        }
        if cache.len() > capacity {
            return Err(Error::Input(format!("a cache of {} tokens for a decoder of {capacity}", cache.len())));
        }
        let (Some(padding), Positions::Rope(rope)) = (cache.padding(), &self.config.positions) else { return Ok(None) };
        let Some(norm) = self.norm.as_ref().and_then(Norm::frozen_part) else { return Ok(None) };
        let Some(head) = self.head.frozen(&self.embed).cloned() else { return Ok(None) };
        let rows = padding.len();
        if !(1..=ROWS).contains(&rows) || self.config.labels().is_some() || !self.config.causal {
            return Ok(None);
        }
        let Some(rotary) = table(rope, capacity, &self.device)? else { return Ok(None) };
        let input = TokenBatch::new(vec![0; rows], rows, 1)?;
        let context = Context::new(&self.config, &input, None, (self.dtype, &self.device), &self.tables)?;
        let x = Tensor::zeros((rows, 1, self.config.hidden), self.dtype, &self.device)?;
        // The sets of adapters that sequences go through, in the order in which these are first named.
        let mut named: Vec<usize> = Vec::new();
        let sets = flow.rows.as_ref().map(|chosen| {
            let mut place = |v: &usize| {
                named.iter().position(|n| n == v).unwrap_or_else(|| {
                    named.push(*v);
                    named.len() - 1
                })
            };
            chosen.iter().map(&mut place).collect::<Vec<_>>()
        });
        let flows = match &sets {
            Some(_) => named.iter().map(|v| Flow { rows: Some(vec![*v; rows].into()), ..flow.clone() }).collect(),
            None => vec![flow.clone()],
        };
        let mut all = Vec::with_capacity(flows.len());
        for flow in &flows {
            let mut blocks = Vec::with_capacity(self.blocks.len());
            for (block, layer) in self.blocks.iter().zip(&cache.layers) {
                let Some(block) = block.step(&x, &context, flow, layer)? else { return Ok(None) };
                blocks.push(block);
            }
            all.push(blocks);
        }
        let mut all = all.into_iter();
        let Some(blocks) = all.next() else { return Ok(None) };
        let others = all.collect();
        let table = self.embed.weight().get().clone();
        Ok(Decoder::new(&DecoderPlan { table, blocks, others, sets, norm, head, rotary, padding, capacity })?)
    }
}
