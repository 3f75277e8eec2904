//! Sums of gradients over the micro-batches of a step, and where a walk over the tape begins.

use std::collections::HashMap;

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor, TensorId};
use espalier_adapters::attach::Attached;
use espalier_adapters::projected::FlatParameters;
use espalier_adapters::{ParameterMap, auxiliary};

use crate::Result;

/// Sums of gradients, in the order of the trainable parameters.
#[derive(Debug)]
pub struct Gradients {
    order: HashMap<TensorId, usize>,
    tensors: Vec<Tensor>,
    sums: Vec<Option<Tensor>>,
}

impl Gradients {
    /// No gradients yet for the trainable ones among `parameters`.
    pub fn new(parameters: &ParameterMap) -> Self {
        let tensors: Vec<Tensor> = parameters.trainable().map(|p| p.tensor.clone()).collect();
        let order = tensors.iter().enumerate().map(|(i, t)| (t.id(), i)).collect();
        let sums = vec![None; tensors.len()];
        Self { order, tensors, sums }
    }

    /// The sums, in order; None where nothing flowed.
    pub fn sums(&self) -> &[Option<Tensor>] {
        &self.sums
    }

    /// The sums, to change them.
    pub fn sums_mut(&mut self) -> &mut [Option<Tensor>] {
        &mut self.sums
    }

    /// Forgets the sum of the `index`-th parameter.
    pub fn drop(&mut self, index: usize) {
        if let Some(sum) = self.sums.get_mut(index) {
            *sum = None;
        }
    }

    /// Where nothing flowed to the `index`-th parameter, its sum becomes 0; whether that was so.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn fill(&mut self, index: usize) -> Result<bool> {
        let (Some(sum @ None), Some(tensor)) = (self.sums.get_mut(index), self.tensors.get(index)) else {
            return Ok(false);
        };
        *sum = Some(tensor.detach().zeros_like()?);
        Ok(true)
    }

    /// Forgets all sums.
    pub fn clear(&mut self) {
        self.sums.iter_mut().for_each(|s| *s = None);
    }

    /// Adds the gradients of `loss` (a scalar) and gives that of `leaf`.
    pub(crate) fn add(&mut self, loss: &Tensor, leaf: Option<&Tensor>) -> Result<Option<Tensor>> {
        let mut grads = loss.backward()?;
        for (id, index) in &self.order {
            if let Some(gradient) = grads.get_id(*id) {
                add_to(&mut self.sums[*index], gradient.detach())?;
            }
        }
        debug_assert_eq!(self.order.len(), self.tensors.len());
        Ok(leaf.and_then(|leaf| grads.remove(leaf)).map(|g| g.detach()))
    }

    /// Adds the gradients of what the adapter's layers ask of their parameters, each at its weight; the means by name, without it.
    ///
    /// # Errors
    /// If terms of one name have different weights.
    pub fn add_penalties(&mut self, adapter: &Attached) -> Result<Vec<(&'static str, f64)>> {
        let mut found = Vec::new();
        for mean in auxiliary::penalties(adapter)? {
            self.add(&mean.weighed()?, None)?;
            found.push((mean.name, mean.number()?));
        }
        Ok(found)
    }

    /// Adds the gradient of a fused operation's parameters: to a trained tensor itself, over the tape to what it was made of.
    pub(crate) fn add_flat(&mut self, flat: &FlatParameters, gradient: &Tensor) -> Result<()> {
        for (part, gradient) in flat.split(gradient)? {
            match self.order.get(&part.id()) {
                Some(index) => add_to(&mut self.sums[*index], gradient)?,
                None if part.track_op() => drop(self.add(&seed(part, gradient)?, None)?),
                None => {}
            }
        }
        Ok(())
    }
}

/// Adds to a sum that may not have begun.
pub(crate) fn add_to(sum: &mut Option<Tensor>, gradient: Tensor) -> Result<()> {
    *sum = Some(match sum.take() {
        Some(sum) => (sum + gradient)?,
        None => gradient,
    });
    Ok(())
}

/// A scalar whose gradient for `y` is `upstream`; its value means nothing.
pub(crate) fn seed(y: &Tensor, upstream: Tensor) -> Result<Tensor> {
    if y.device().is_cpu() { Ok(y.apply_op1(Seed(upstream))?) } else { Ok((y * upstream)?.sum_all()?) }
}

/// Starts a walk over the tape at a tensor with a known gradient, without the product and the sum that would say the same.
struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}
