//! The one abstraction: how a frozen linear map is adapted, and how a method makes such an adapter.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Shape, Tensor, Var};
use espalier_kernels::frozen::FrozenWeight;

use crate::by_row::ByRow;
use crate::low_rank::LowRankView;
use crate::parameter::ParameterMap;
use crate::{Error, Flow, Result, random};

/// How one frozen linear map is adapted. One implementation per file under `parametrisation/` or `routing/`.
pub trait Adapter: Send + Sync + std::fmt::Debug {
    /// Adapted output for `x` [.., d_in], without the layer's bias. Most methods add to `base.forward(x)`; weight-space
    /// methods replace it.
    ///
    /// # Errors
    /// If shapes do not fit.
    fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, flow: &Flow) -> Result<Tensor> {
        let _ = flow;
        match self.low_rank(base)? {
            Some(view) => view.forward(base, x, None),
            None => Err(Error::unsupported("forward", "a method without a low-rank form must define it")),
        }
    }

    /// ΔW [d_out, d_in] in f32, or None where the change depends on the input (routers, gates).
    ///
    /// # Errors
    /// If shapes do not fit.
    fn delta(&self, base: &Arc<FrozenWeight>) -> Result<Option<Tensor>> {
        self.low_rank(base)?.map(|view| view.delta(base)).transpose()
    }

    /// Change of the vectors [n, width] of the tokens `ids` `[n]` where the map is an embedding; None for methods that are no
    /// plain low-rank product.
    ///
    /// # Errors
    /// If shapes do not fit.
    fn lookup(&self, base: &Arc<FrozenWeight>, ids: &Tensor) -> Result<Option<Tensor>> {
        let view = self.low_rank(base)?.filter(|v| v.gain.is_none() && v.residual.is_none());
        view.map(|view| view.lookup(ids)).transpose()
    }

    /// Named parameters, trainable or frozen, in the on-disk naming of the method.
    fn parameters(&self) -> ParameterMap;

    /// The method in the low-rank normal form, where it is one; lets models share one fused product between projections
    /// and batches of many adapters without any model or method being named.
    ///
    /// # Errors
    /// If a derived gain cannot be computed.
    fn low_rank(&self, base: &Arc<FrozenWeight>) -> Result<Option<LowRankView<'_>>> {
        let _ = base;
        Ok(None)
    }

    /// The parameters in a form that needs no changed base, where [`Self::parameters`] is not: what [`Method::portable`]
    /// describes.
    ///
    /// # Errors
    /// If shapes do not fit.
    fn portable(&self) -> Result<Option<ParameterMap>> {
        Ok(None)
    }

    /// The choice that this is, where each sequence of a batch goes through an adapter of its own.
    fn by_row(&self) -> Option<&ByRow> {
        None
    }

    /// What of the forward pass the gradients leave out on purpose, and why: [`Self::low_rank`] has it as a gain over norms. None
    /// where gradients are the derivatives.
    fn holds(&self) -> Option<&'static str> {
        None
    }

    /// Dropout probability on the input of the product while training; 0 lets fused paths be taken.
    fn dropout(&self) -> f64 {
        0.0
    }
}

/// Makes the layers of one method: one implementation per file.
pub trait Method {
    /// What acts at one site.
    type Layer: Adapter + 'static;

    /// Makes the layer for `site`; every tensor comes from `init`, which draws it (a new adapter) or takes it from a file
    /// (a saved one), so that one code path serves both.
    ///
    /// # Errors
    /// If the settings do not fit the site or the file's tensors do not have the shapes asked for.
    fn attach(&self, site: &Site, init: &mut Init<'_>) -> Result<Self::Layer>;

    /// Rank and scaling numerator of this method before patterns: (r, alpha). Methods without a rank return (0, 0).
    fn rank_and_alpha(&self) -> (usize, f64);

    /// The method that [`Adapter::portable`] parameters belong to, with the factors on ranks and alphas; None where saved
    /// parameters need no changed base anyway.
    fn portable(&self) -> Option<(Self, usize, f64)>
    where
        Self: Sized,
    {
        None
    }

    /// Settings to try the method with, by name: at least as it comes, and one of each way in which it can be set up. What is
    /// promised of every method is tried with each of them.
    fn examples() -> Vec<(String, Self)>
    where
        Self: Sized + Default,
    {
        vec![("as it comes".to_owned(), Self::default())]
    }

    /// The method's settings as keys of PEFT's `adapter_config.json`, with `peft_type`; None where PEFT lacks it.
    fn to_peft(&self) -> Option<serde_json::Map<String, serde_json::Value>>;

    /// Reads the method from PEFT's keys, removing those it used; None if the file is of another method.
    ///
    /// # Errors
    /// If a key has a value this method does not know.
    fn from_peft(keys: &mut serde_json::Map<String, serde_json::Value>) -> Result<Option<Self>>
    where
        Self: Sized;
}

/// Where a layer is made: one frozen map and the rank that placement gave it.
#[derive(Debug, Clone)]
pub struct Site {
    /// Module path in the base model's own naming.
    pub path: String,
    /// Output width.
    pub d_out: usize,
    /// Input width.
    pub d_in: usize,
    /// Rank after rank patterns.
    pub rank: usize,
    /// Scaling numerator after alpha patterns.
    pub alpha: f64,
    /// The frozen weight [d_out, d_in]; an embedding is the map from one-hot tokens, [width, vocabulary].
    pub base: Arc<FrozenWeight>,
    /// Whether the module looks up rows (an embedding) instead of multiplying.
    pub lookup: bool,
    /// Device of the parameters.
    pub device: Device,
}

/// Where the tensors of a layer come from.
#[derive(Debug)]
pub enum Source<'a> {
    /// Drawn: the seed of the run.
    Fresh(u64),
    /// Taken from a file: tensors by full name; what was taken is removed, what was missed is noted.
    File {
        /// Tensors left in the file.
        tensors: &'a mut BTreeMap<String, Tensor>,
        /// Names asked for but not there.
        missing: &'a mut Vec<String>,
    },
}

/// Hands out the tensors of layers.
#[derive(Debug)]
pub struct Init<'a> {
    /// Origin of the values.
    pub source: Source<'a>,
    /// Path of the module the next tensors belong to.
    pub path: String,
    /// Dtype of trainable parameters (f32; f64 in gradient checks).
    pub dtype: DType,
    /// Device of trainable parameters.
    pub device: Device,
}

impl Init<'_> {
    /// Whether values are drawn (a new adapter).
    pub fn is_fresh(&self) -> bool {
        matches!(self.source, Source::Fresh(_))
    }

    /// A trainable tensor: from the file, else `draw` of the module's stream.
    ///
    /// # Errors
    /// If the file's tensor has another shape or the draw fails.
    pub fn trainable(
        &mut self,
        name: &str,
        shape: impl Into<Shape>,
        draw: impl FnOnce(&mut rand_chacha::ChaCha8Rng, &Shape, &Device) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let shape = shape.into();
        let full = format!("{}.{name}", self.path);
        let values = match &mut self.source {
            Source::Fresh(seed) => {
                let mut rng = random::stream(*seed, &full);
                draw(&mut rng, &shape, &self.device)?
            }
            Source::File { tensors, missing } => match tensors.remove(&full) {
                Some(found) if found.shape() == &shape => found,
                Some(found) => {
                    return Err(Error::Shape {
                        tensor: full,
                        expected: shape.dims().to_vec(),
                        found: found.dims().to_vec(),
                    });
                }
                // The file will be refused; until then one zero stands for all values, however many were asked for.
                None => {
                    missing.push(full);
                    return Ok(Tensor::zeros(1, self.dtype, &self.device)?.broadcast_as(&shape)?);
                }
            },
        };
        let values = values.to_dtype(self.dtype)?.to_device(&self.device)?.contiguous()?;
        Ok(Var::from_tensor(&values)?.as_tensor().clone())
    }

    /// A trainable tensor that starts at zero.
    ///
    /// # Errors
    /// As [`Self::trainable`].
    pub fn zeros(&mut self, name: &str, shape: impl Into<Shape>) -> Result<Tensor> {
        self.trainable(name, shape, |_, shape, device| Ok(Tensor::zeros(shape, DType::F32, device)?))
    }

    /// A trainable tensor that starts as a copy of `values`.
    ///
    /// # Errors
    /// As [`Self::trainable`].
    pub fn copy_of(&mut self, name: &str, values: &Tensor) -> Result<Tensor> {
        self.trainable(name, values.shape(), |_, _, _| Ok(values.detach()))
    }
}
