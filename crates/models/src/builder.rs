//! Makes modules from a weight source: paths in, modules out.

use candle_core::{DType, Tensor};
use espalier_adapters::module::{Linear, Norm, NormKind};
use espalier_adapters::{Embedding, FrozenWeight, random};

use crate::Result;
use crate::config::ModelConfig;
use crate::source::{LoadOptions, WeightSource};

/// A weight source with the architecture and the options.
pub(crate) struct Builder<'a> {
    pub(crate) source: &'a mut dyn WeightSource,
    pub(crate) config: &'a ModelConfig,
    pub(crate) options: &'a LoadOptions,
}

impl Builder<'_> {
    /// The linear map at `path`.
    pub(crate) fn linear(&mut self, path: &str, d_out: usize, d_in: usize, bias: bool) -> Result<Linear> {
        let transposed = self.config.transposed;
        let base = self.source.matrix(&format!("{path}.weight"), d_out, d_in, transposed, self.options)?;
        let bias = bias.then(|| self.source.dense(&format!("{path}.bias"), &[d_out], self.options)).transpose()?;
        Ok(Linear::new(path, base, bias, transposed)?)
    }

    /// A linear map that stays dense (output heads).
    pub(crate) fn dense_linear(&mut self, path: &str, d_out: usize, d_in: usize, bias: bool) -> Result<Linear> {
        let weight = self.source.dense(&format!("{path}.weight"), &[d_out, d_in], self.options)?;
        let bias = bias.then(|| self.source.dense(&format!("{path}.bias"), &[d_out], self.options)).transpose()?;
        Ok(Linear::new(path, self.frozen(weight)?, bias, false)?)
    }

    /// A head with new weights: normal with standard deviation `initializer_range`, zero bias.
    pub(crate) fn new_linear(&mut self, path: &str, d_out: usize, d_in: usize) -> Result<Linear> {
        let std = self.config.raw.get("initializer_range").and_then(serde_json::Value::as_f64).unwrap_or(0.02);
        let mut rng = random::stream(self.options.seed, path);
        let weight = random::normal(&mut rng, std, (d_out, d_in), &self.options.device)?;
        let bias = Tensor::zeros(d_out, DType::F32, &self.options.device)?.to_dtype(self.options.dtype)?;
        Ok(Linear::new(path, FrozenWeight::dense(weight.to_dtype(self.options.dtype)?)?, Some(bias), false)?)
    }

    /// The normalisation of the architecture at `path`.
    pub(crate) fn norm(&mut self, path: &str, width: usize) -> Result<Norm> {
        let weight = self.source.dense(&format!("{path}.weight"), &[width], self.options)?;
        let bias = matches!(self.config.norm, NormKind::Layer { .. })
            .then(|| self.source.dense(&format!("{path}.bias"), &[width], self.options))
            .transpose()?;
        Ok(Norm::new(path, self.config.norm, weight, bias))
    }

    /// The table at `path`.
    pub(crate) fn embedding(&mut self, path: &str, rows: usize) -> Result<Embedding> {
        let weight = self.source.dense(&format!("{path}.weight"), &[rows, self.config.hidden], self.options)?;
        match self.source.is_outline() {
            true => Ok(Embedding::blank(path, rows, self.config.hidden, self.options.dtype)?),
            false => Ok(Embedding::new(path, weight)?),
        }
    }

    /// A matrix that stays dense, or its shape alone where the source gives no more.
    fn frozen(&self, weight: Tensor) -> Result<FrozenWeight> {
        let (d_out, d_in) = weight.dims2()?;
        match self.source.is_outline() {
            true => Ok(FrozenWeight::blank(d_out, d_in, self.options.dtype)?),
            false => Ok(FrozenWeight::dense(weight)?),
        }
    }
}
