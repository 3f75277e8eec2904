//! Half a block in the form that `espalier_kernels::part` takes, where its modules have that form now.

use candle_core::Tensor;
use espalier_adapters::Flow;
use espalier_adapters::module::{Linear, Norm};
use espalier_adapters::projected::{FlatParameters, projections};
use espalier_kernels::part::{PartNorm, Projection, is_fused};

use crate::Result;

/// A norm, projections of its result and the projection back, with the flat parameters of all.
pub(crate) struct Fused {
    pub(crate) norm: Option<PartNorm>,
    pub(crate) inputs: Vec<Projection>,
    pub(crate) output: Projection,
    pub(crate) parameters: Option<FlatParameters>,
}

impl Fused {
    /// None where a module has no such form: a trained norm or bias, an adapter that is no low-rank product.
    pub(crate) fn of(
        x: &Tensor,
        norm: Option<&Norm>,
        inputs: &[Linear],
        output: &Linear,
        flow: &Flow,
    ) -> Result<Option<Self>> {
        if !is_fused(x, &[]) {
            return Ok(None);
        }
        let norm = match norm.map(Norm::frozen_part) {
            Some(None) => return Ok(None),
            Some(part) => part,
            None => None,
        };
        let (Some(inputs), Some(output)) = (projections(inputs, flow)?, output.projection(flow)?) else {
            return Ok(None);
        };
        let parameters = FlatParameters::of(&[&inputs, std::slice::from_ref(&output)])?;
        let inputs = inputs.into_iter().map(|p| p.projection).collect();
        Ok(Some(Self { norm, inputs, output: output.projection, parameters }))
    }
}
