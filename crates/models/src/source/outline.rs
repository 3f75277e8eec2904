//! A source that gives shapes for weights: it makes sure that each is there, notes what was asked for, and reads none.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use espalier_adapters::FrozenWeight;

use super::{LoadOptions, WeightSource};
use crate::Result;

/// How a weight was asked for.
#[derive(Debug, Clone)]
pub(crate) enum Request {
    /// A dense tensor of that shape.
    Dense(Vec<usize>),
    /// A matrix of a block.
    Matrix {
        /// Outputs.
        d_out: usize,
        /// Inputs.
        d_in: usize,
        /// Whether files keep [d_in, d_out].
        transposed: bool,
    },
}

/// A tensor of that shape without values.
pub(crate) fn blank(shape: &[usize], dtype: DType) -> Result<Tensor> {
    Ok(Tensor::zeros(1, dtype, &Device::Cpu)?.broadcast_as(shape)?)
}

/// Stands before the source of the weights.
pub(crate) struct OutlineSource<'a> {
    pub(crate) inner: &'a mut dyn WeightSource,
    pub(crate) requests: BTreeMap<String, Request>,
}

impl WeightSource for OutlineSource<'_> {
    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn is_outline(&self) -> bool {
        true
    }

    fn has(&self, name: &str) -> bool {
        self.inner.has(name)
    }

    fn claim(&mut self, name: &str, shape: &[usize]) -> Result<bool> {
        self.inner.claim(name, shape)
    }

    fn dense(&mut self, name: &str, shape: &[usize], options: &LoadOptions) -> Result<Tensor> {
        self.inner.claim(name, shape)?;
        self.requests.insert(name.to_owned(), Request::Dense(shape.to_vec()));
        blank(shape, options.dtype)
    }

    fn matrix(
        &mut self,
        name: &str,
        d_out: usize,
        d_in: usize,
        transposed: bool,
        options: &LoadOptions,
    ) -> Result<FrozenWeight> {
        let shape = if transposed { [d_in, d_out] } else { [d_out, d_in] };
        self.inner.claim(name, &shape)?;
        self.requests.insert(name.to_owned(), Request::Matrix { d_out, d_in, transposed });
        Ok(FrozenWeight::blank(d_out, d_in, options.dtype)?)
    }

    fn missing(&self) -> &[String] {
        self.inner.missing()
    }

    fn unused(&self) -> Vec<String> {
        self.inner.unused()
    }
}
