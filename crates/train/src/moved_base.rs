//! Frozen weights that a run rewrites: the values, and putting them into the model.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use espalier_adapters::{FrozenWeight, Host, ModuleMut};
use espalier_models::Model;

use crate::pairs::{Pair, unfit};
use crate::{Error, Result};

/// The weights [d_out, d_in] at the sites of an adapter, by module path.
#[derive(Debug)]
pub struct MovedBase {
    weights: BTreeMap<String, Tensor>,
}

/// What precedes a module path in the names of checkpoints.
const PREFIX: &str = "base.";

impl MovedBase {
    /// The weights at the sites of `pairs`; `what` will rewrite them.
    ///
    /// # Errors
    /// If one is no matrix in f32, or the adapter took a part of it away.
    pub fn of(what: &str, pairs: &[Pair]) -> Result<Self> {
        let mut weights = BTreeMap::new();
        for pair in pairs {
            let path = &pair.path;
            if pair.moved {
                return Err(unfit(
                    what,
                    format!("{path}: the initialisation moved a part of the base into the adapter"),
                ));
            }
            if pair.lookup {
                return Err(unfit(what, format!("{path} looks up rows; products alone are rewritten")));
            }
            let weight = pair.base.as_dense().filter(|w| w.dtype() == DType::F32).ok_or_else(|| {
                let kind = pair.base.dtype_name();
                unfit(what, format!("{path}: it adds to the frozen weight, which is {kind} and would round; use f32"))
            })?;
            weights.insert(path.clone(), weight.clone());
        }
        Ok(Self { weights })
    }

    /// Adds `change` [d_out, d_in] to the weight at `path`; [`Self::put`] lets the model see it.
    ///
    /// # Errors
    /// If there is no such site, or the shape differs.
    pub fn add(&mut self, path: &str, change: &Tensor) -> Result<()> {
        let weight = self.weights.get_mut(path).ok_or_else(|| Error::run(path, "no weight of it is rewritten"))?;
        *weight = (&*weight + change.detach())?;
        Ok(())
    }

    /// Puts the weights of `paths` into the model.
    ///
    /// # Errors
    /// If the walk over the model fails.
    pub fn put(&self, model: &mut Model, wanted: impl Fn(&str) -> bool) -> Result<()> {
        model.walk(&mut |module| {
            if let ModuleMut::Linear(linear) = module
                && wanted(linear.path())
                && let Some(weight) = self.weights.get(linear.path())
            {
                linear.set_base(Arc::new(FrozenWeight::dense(weight.clone())?))?;
            }
            Ok(())
        })?;
        Ok(())
    }

    /// The weights, for checkpoints.
    pub fn state(&self) -> impl Iterator<Item = (String, Tensor)> + '_ {
        self.weights.iter().map(|(path, weight)| (format!("{PREFIX}{path}"), weight.clone()))
    }

    /// Takes the weights out of a checkpoint's tensors and puts them into the model.
    ///
    /// # Errors
    /// If one is missing or has another shape.
    pub fn restore(&mut self, state: &mut BTreeMap<String, Tensor>, model: &mut Model) -> Result<()> {
        for (path, weight) in &mut self.weights {
            *weight = taken(state, &format!("{PREFIX}{path}"), weight.dims())?.to_device(weight.device())?;
        }
        self.put(model, |_| true)
    }

    /// Bytes of the weights.
    pub fn bytes(&self) -> u64 {
        self.weights.values().map(|w| 4 * w.elem_count() as u64).sum()
    }
}

/// Takes a tensor of a shape out of a checkpoint's.
///
/// # Errors
/// If it is missing or has another shape.
pub fn taken(state: &mut BTreeMap<String, Tensor>, name: &str, dims: &[usize]) -> Result<Tensor> {
    match state.remove(name) {
        Some(tensor) if tensor.dims() == dims => Ok(tensor),
        Some(tensor) => Err(Error::run(name, format!("shape {:?}, wanted {dims:?}", tensor.dims()))),
        None => Err(Error::run(name, "missing in the dynamics' state")),
    }
}
