//! Losses beside the objective's: what a method asks of its parameters, or of the way a batch went through it.
//!
//! Equation: loss = objective + sum over names of weight * mean of that name's terms
//! Source:   penalties (AdaLoRA arXiv 2303.10512 eq. 4) and the balance of routed experts are of this form

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};

use crate::attach::Attached;
use crate::{Error, Result};

/// Terms of one kind, from one layer.
#[derive(Debug, Clone)]
pub struct Auxiliary {
    /// What they are, as it stands in the logs.
    pub name: &'static str,
    /// Weight of the mean of all terms of that name in the loss.
    pub weight: f64,
    /// Their sum, a scalar on the tape.
    pub sum: Tensor,
    /// How many they are.
    pub count: usize,
}

/// The mean of all terms of one name.
#[derive(Debug, Clone)]
pub struct Mean {
    /// What the terms are.
    pub name: &'static str,
    /// Weight in the loss.
    pub weight: f64,
    /// The mean, a scalar on the tape.
    pub value: Tensor,
}

impl Mean {
    /// Its part of the loss, on the tape.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn weighed(&self) -> Result<Tensor> {
        Ok((&self.value * self.weight)?)
    }

    /// Its value without the weight.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn number(&self) -> Result<f64> {
        Ok(self.value.detach().to_dtype(DType::F64)?.to_scalar::<f64>()?)
    }
}

/// The means of `terms` by name.
///
/// # Errors
/// If terms of one name have different weights, or shapes do not fit.
pub fn means(terms: impl IntoIterator<Item = Auxiliary>) -> Result<Vec<Mean>> {
    let mut sums: BTreeMap<&'static str, Auxiliary> = BTreeMap::new();
    for term in terms {
        let Some(sum) = sums.get_mut(term.name) else {
            sums.insert(term.name, term);
            continue;
        };
        if sum.weight != term.weight {
            let found = format!("weights {} and {} of one auxiliary loss", sum.weight, term.weight);
            return Err(Error::config(term.name, found));
        }
        sum.sum = (&sum.sum + &term.sum)?;
        sum.count += term.count;
    }
    let mean = |a: Auxiliary| Ok(Mean { name: a.name, weight: a.weight, value: (a.sum / a.count.max(1) as f64)? });
    sums.into_values().map(mean).collect()
}

/// What the layers of an adapter ask of their parameters, whatever the data.
///
/// # Errors
/// As [`means`].
pub fn penalties(adapter: &Attached) -> Result<Vec<Mean>> {
    let terms = adapter.layers.values().filter_map(|layer| layer.penalty().transpose());
    means(terms.collect::<Result<Vec<_>>>()?)
}
