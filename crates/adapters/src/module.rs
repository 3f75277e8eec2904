//! The modules that models are built from, each with a place where an adapter acts.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::Tensor;
use espalier_kernels::frozen::FrozenWeight;
use espalier_kernels::norm;
use espalier_kernels::part::{self, Factors, PartNorm, Projection};

use crate::adapter::Adapter;
pub use crate::embedding::{Embedding, TokenRows};
pub use crate::formats::gguf_adapter::GgufName;
use crate::low_rank::Gain;
use crate::projected::Projected;
use crate::prompt::PromptSlot;
use crate::{Error, Flow, Result};

/// A small dense tensor (norm gain, bias) that stays frozen unless it is trained on purpose.
#[derive(Debug, Clone)]
pub struct Dense {
    frozen: Tensor,
    trained: Option<Tensor>,
}

impl Dense {
    /// A frozen tensor.
    pub fn new(frozen: Tensor) -> Self {
        Self { frozen, trained: None }
    }

    /// The values in use.
    pub fn get(&self) -> &Tensor {
        self.trained.as_ref().unwrap_or(&self.frozen)
    }

    /// The base model's values.
    pub fn frozen(&self) -> &Tensor {
        &self.frozen
    }

    /// The trained values, where they are in use.
    pub fn trained(&self) -> Option<&Tensor> {
        self.trained.as_ref()
    }

    /// Makes `frozen` the base model's values; what is trained stays in use.
    pub fn set_frozen(&mut self, frozen: Tensor) {
        self.frozen = frozen;
    }

    /// Uses `trained` in place of the frozen values, or the frozen ones again.
    pub fn replace(&mut self, trained: Option<Tensor>) {
        self.trained = trained;
    }

    /// The values in use times `gain`, in the gain's dtype.
    fn scaled(&self, gain: &Tensor) -> Result<Tensor> {
        Ok(self.get().to_dtype(gain.dtype())?.mul(gain)?)
    }

    /// Makes the values in use the base's own (merging), times `gain` where there is one.
    pub(crate) fn bake(&mut self, gain: Option<&Tensor>) -> Result<()> {
        if let Some(gain) = gain {
            self.trained = Some(self.scaled(gain)?);
        }
        if let Some(trained) = self.trained.take() {
            self.frozen = trained.detach().to_dtype(self.frozen.dtype())?;
        }
        Ok(())
    }
}

/// A frozen linear map with a place for an adapter.
#[derive(Debug, Clone)]
pub struct Linear {
    path: String,
    base: Arc<FrozenWeight>,
    bias: Option<Dense>,
    adapter: Option<Arc<dyn Adapter>>,
    transposed_on_disk: bool,
}

impl Linear {
    /// The map of `base` [d_out, d_in] called `path`; `transposed_on_disk` where files keep [d_in, d_out] (GPT-2).
    pub fn new(
        path: impl Into<String>,
        base: FrozenWeight,
        bias: Option<Tensor>,
        transposed_on_disk: bool,
    ) -> Result<Self> {
        let path = path.into();
        if let Some(bias) = &bias
            && bias.dims() != [base.d_out()]
        {
            return Err(Error::Shape {
                tensor: format!("{path}.bias"),
                expected: vec![base.d_out()],
                found: bias.dims().to_vec(),
            });
        }
        Ok(Self { path, base: Arc::new(base), bias: bias.map(Dense::new), adapter: None, transposed_on_disk })
    }

    /// Adapted output for `x` [.., d_in] -> [.., d_out].
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, x: &Tensor, flow: &Flow) -> Result<Tensor> {
        let y = match &self.adapter {
            Some(adapter) => adapter.forward(&self.base, x, flow)?,
            None => self.base.forward(x)?,
        };
        match &self.bias {
            Some(bias) => Ok(y.broadcast_add(&self.adapted_bias(bias)?.to_dtype(y.dtype())?)?),
            None => Ok(y),
        }
    }

    fn adapted_bias(&self, bias: &Dense) -> Result<Tensor> {
        match self.bias_gain()? {
            Some(gain) => bias.scaled(&gain),
            None => Ok(bias.get().clone()),
        }
    }

    /// Factors of the adapter on the bias, where the map has one and the adapter scales it.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn bias_gain(&self) -> Result<Option<Tensor>> {
        match (&self.adapter, &self.bias) {
            (Some(adapter), Some(_)) => adapter.bias_gain(),
            _ => Ok(None),
        }
    }

    /// The map as it takes part in a fused operation; None where it has no such form now: a trained bias, a method that is no
    /// low-rank product or scales the bias, dropout between, or sequences that go through different adapters.
    ///
    /// # Errors
    /// If a derived gain cannot be computed.
    pub fn projection(&self, flow: &Flow) -> Result<Option<Projected>> {
        if self.bias.as_ref().is_some_and(|b| b.trained().is_some()) {
            return Ok(None);
        }
        let bias = self.bias.as_ref().map(|b| b.get().clone());
        let plain = Projection { weight: self.base.clone(), bias, low_rank: None };
        let adapter = match self.adapter.as_ref().and_then(|adapter| adapter.by_row()) {
            Some(by_row) => match by_row.common(flow)? {
                Some(one) => one.as_ref(),
                None => return Ok(None),
            },
            None => self.adapter.as_ref(),
        };
        let Some(adapter) = adapter else { return Ok(Some(Projected { projection: plain, factors: None })) };
        if flow.train && adapter.dropout() > 0.0 {
            return Ok(None);
        }
        if plain.bias.is_some() && adapter.bias_gain()?.is_some() {
            return Ok(None);
        }
        let Some(view) = adapter.low_rank_in(&self.base, flow)? else { return Ok(None) };
        let a = match &view.rank_scale {
            Some(scale) => view.a.broadcast_mul(&scale.unsqueeze(1)?)?,
            None => view.a.clone(),
        };
        let weight = view.start(&self.base).clone();
        // A device computes the norms of a group beside its products.
        let (gain, values) = match &view.gain {
            Some(Gain::OverNorm { magnitude, square }) if weight.is_bf16_on_device() => {
                (Some(part::Gain::OverNorm { square: square.clone() }), Some(magnitude.clone()))
            }
            _ => {
                let values = view.gains(&self.base)?;
                (values.as_ref().map(|_| part::Gain::Given), values)
            }
        };
        let factors = Factors { rank: a.dim(0)?, scale: view.scale, gain };
        let projection = Projection { weight, low_rank: Some(factors), ..plain };
        Ok(Some(Projected { projection, factors: Some((a, view.b.clone(), values)) }))
    }

    /// Module path in the base model's naming.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The frozen weight.
    pub fn base(&self) -> &Arc<FrozenWeight> {
        &self.base
    }

    /// The bias, if the map has one.
    pub fn bias(&self) -> Option<&Dense> {
        self.bias.as_ref()
    }

    /// The bias, to train it.
    pub fn bias_mut(&mut self) -> Option<&mut Dense> {
        self.bias.as_mut()
    }

    /// The adapter that acts now.
    pub fn adapter(&self) -> Option<&Arc<dyn Adapter>> {
        self.adapter.as_ref()
    }

    /// Puts an adapter in the slot, or empties it.
    pub fn set_adapter(&mut self, adapter: Option<Arc<dyn Adapter>>) {
        self.adapter = adapter;
    }

    /// Replaces the frozen weight (merging and unmerging).
    ///
    /// # Errors
    /// If the shape differs.
    pub fn set_base(&mut self, base: Arc<FrozenWeight>) -> Result<()> {
        if (base.d_out(), base.d_in()) != (self.base.d_out(), self.base.d_in()) {
            return Err(Error::Shape {
                tensor: format!("{}.weight", self.path),
                expected: vec![self.base.d_out(), self.base.d_in()],
                found: vec![base.d_out(), base.d_in()],
            });
        }
        self.base = base;
        Ok(())
    }

    /// Whether files keep the weight as [d_in, d_out].
    pub fn transposed_on_disk(&self) -> bool {
        self.transposed_on_disk
    }
}

/// A normalisation over the last dimension.
#[derive(Debug, Clone)]
pub struct Norm {
    path: String,
    kind: NormKind,
    weight: Dense,
    bias: Option<Dense>,
}

/// Which normalisation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NormKind {
    /// x / rms(x) * (offset + w).
    Rms {
        /// Added to the variance.
        eps: f64,
        /// Added to the gain (1 in Gemma).
        offset: f64,
    },
    /// (x - mean) / std * w + b.
    Layer {
        /// Added to the variance.
        eps: f64,
    },
}

impl Norm {
    /// The normalisation called `path` with gain `weight` `[n]` and, for layer norms, `bias` `[n]`.
    pub fn new(path: impl Into<String>, kind: NormKind, weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { path: path.into(), kind, weight: Dense::new(weight), bias: bias.map(Dense::new) }
    }

    /// Normalised `x` [.., n].
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self.kind {
            NormKind::Rms { eps, offset } => norm::rms_norm(x, self.weight.get(), eps, offset)?,
            NormKind::Layer { eps } => norm::layer_norm(x, self.weight.get(), self.bias.as_ref().map(Dense::get), eps)?,
        })
    }

    /// The norm as it takes part in a fused operation; None while it is trained.
    pub fn frozen_part(&self) -> Option<PartNorm> {
        let trained = |dense: &Dense| dense.trained().is_some();
        if trained(&self.weight) || self.bias.as_ref().is_some_and(trained) {
            return None;
        }
        let weight = self.weight.get().clone();
        match (self.kind, &self.bias) {
            (NormKind::Rms { eps, offset }, _) => Some(PartNorm::Rms { weight, eps, offset }),
            (NormKind::Layer { eps }, Some(bias)) => Some(PartNorm::Layer { weight, bias: bias.get().clone(), eps }),
            (NormKind::Layer { .. }, None) => None,
        }
    }

    /// Module path in the base model's naming.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The gain.
    pub fn weight(&self) -> &Dense {
        &self.weight
    }

    /// The gain, to train it.
    pub fn weight_mut(&mut self) -> &mut Dense {
        &mut self.weight
    }

    /// The shift.
    pub fn bias(&self) -> Option<&Dense> {
        self.bias.as_ref()
    }

    /// The shift, to train it.
    pub fn bias_mut(&mut self) -> Option<&mut Dense> {
        self.bias.as_mut()
    }
}

/// A module of a model, on a walk over all of them.
#[derive(Debug)]
pub enum ModuleMut<'a> {
    /// A linear map.
    Linear(&'a mut Linear),
    /// A token table.
    Embedding(&'a mut Embedding),
    /// A normalisation.
    Norm(&'a mut Norm),
}

impl ModuleMut<'_> {
    /// Module path in the base model's naming.
    pub fn path(&self) -> &str {
        match self {
            Self::Linear(m) => m.path(),
            Self::Embedding(m) => m.path(),
            Self::Norm(m) => m.path(),
        }
    }
}

/// A model seen as a sequence of modules: all that adapters know of it.
pub trait Host {
    /// Calls `visit` on every module in a fixed order.
    ///
    /// # Errors
    /// The first error of `visit`.
    fn walk(&mut self, visit: &mut dyn FnMut(ModuleMut<'_>) -> Result<()>) -> Result<()>;

    /// Paths of the output head (excluded from `all-linear`), in the base model's naming.
    fn head_paths(&self) -> Vec<String>;

    /// Path of the token table that is the output head as well, in a model that ties the two.
    fn tied_table(&self) -> Option<String> {
        None
    }

    /// The model's place for what stands before its sequences, where it has one.
    fn prompt_slot(&mut self) -> Option<&mut PromptSlot> {
        None
    }

    /// What llama.cpp calls the weight of the module at `path`, where it knows the model.
    fn gguf_name(&self, path: &str) -> Option<GgufName> {
        let _ = path;
        None
    }

    /// Whether weights are rounded against those that other tools have of the same model (a quantised file).
    fn is_rounded(&self) -> bool {
        false
    }

    /// The settings that make the weights a function (epsilons, positions, soft caps, ...), by name; none where none are known.
    fn settings(&self) -> BTreeMap<String, String> {
        BTreeMap::new()
    }

    /// Content hash of the base weights as they were loaded.
    ///
    /// # Errors
    /// If the weights cannot be read.
    fn base_hash(&self) -> Result<String>;
}
