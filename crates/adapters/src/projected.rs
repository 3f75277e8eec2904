//! Linear maps in the form that the fused operations of `espalier_kernels::part` take, and their parameters in one vector.

use std::sync::Arc;

use candle_core::Tensor;
use espalier_kernels::frozen::FrozenWeight;
use espalier_kernels::part::Projection;
use espalier_kernels::rows;

use crate::module::Linear;
use crate::{Error, Flow, Result};

/// A linear map in the form that fused operations take.
#[derive(Debug, Clone)]
pub struct Projected {
    /// The frozen part and the shape of the adapter's.
    pub projection: Projection,
    /// A [R, d_in], B [d_out, R] and the gain `[d_out]`, on the tape.
    pub factors: Option<(Tensor, Tensor, Option<Tensor>)>,
}

/// The maps of one input in that form; None if one of them has none.
///
/// # Errors
/// As [`Linear::projection`].
pub fn projections<'a>(linears: impl IntoIterator<Item = &'a Linear>, flow: &Flow) -> Result<Option<Vec<Projected>>> {
    linears.into_iter().map(|linear| linear.projection(flow)).collect()
}

/// The parameters of a fused operation in one vector.
#[derive(Debug, Clone)]
pub struct FlatParameters {
    parts: Vec<Tensor>,
}

impl FlatParameters {
    /// The parameters of a fused operation: for each group of maps with one input, A of all, then B and gain of each. None if
    /// there are none.
    ///
    /// # Errors
    /// If tensors are on different devices.
    pub fn of(groups: &[&[Projected]]) -> Result<Option<Self>> {
        let mut parts = Vec::new();
        for group in groups {
            let factors = || group.iter().filter_map(|p| p.factors.as_ref());
            parts.extend(factors().map(|(a, ..)| a.clone()));
            for (_, b, gain) in factors() {
                parts.push(b.clone());
                parts.extend(gain.clone());
            }
        }
        let device = parts.first().map(|p| p.device().clone());
        if let Some(other) = parts.iter().find(|p| device.as_ref().is_some_and(|d| !p.device().same_device(d))) {
            return Err(Error::config(
                "device",
                format!("parameters of one block are on {device:?} and {:?}", other.device()),
            ));
        }
        Ok(if parts.is_empty() { None } else { Some(Self { parts }) })
    }

    /// The tensors the vector is made of.
    pub fn parts(&self) -> &[Tensor] {
        &self.parts
    }

    /// Whether a part is on the tape.
    pub fn is_trained(&self) -> bool {
        self.parts.iter().any(Tensor::track_op)
    }

    /// All values, on the tape if a part is.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn on_tape(&self) -> Result<Tensor> {
        let flat = self.parts.iter().map(Tensor::flatten_all).collect::<candle_core::Result<Vec<_>>>()?;
        Ok(Tensor::cat(&flat, 0)?)
    }

    /// All values, off the tape.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn off_tape(&self) -> Result<Tensor> {
        Ok(rows::concatenate(&self.parts)?)
    }

    /// Each tensor the vector is made of, with its part of the vector's gradient.
    ///
    /// # Errors
    /// If the gradient is of another length.
    pub fn split(&self, gradient: &Tensor) -> Result<Vec<(&Tensor, Tensor)>> {
        let mut start = 0;
        let part = |part| {
            let count = Tensor::elem_count(part);
            start += count;
            Ok((part, gradient.narrow(0, start - count, count)?.reshape(part.shape())?))
        };
        self.parts.iter().map(part).collect()
    }
}

/// Puts dense frozen weights of maps with one input into one piece of memory, where a device multiplies them as one. Other
/// weights, and those on the CPU, stay where they are.
///
/// # Errors
/// If the device is out of memory.
pub fn lay_together(linears: &mut [Linear]) -> Result<()> {
    let weights: Vec<&FrozenWeight> = linears.iter().map(|l| &**l.base()).collect();
    if let Some(together) = FrozenWeight::lay_together(&weights)? {
        for (linear, weight) in linears.iter_mut().zip(together) {
            linear.set_base(Arc::new(weight))?;
        }
    }
    Ok(())
}
