//! A model whose weights stay in their files: its shapes are known, and the values of a module are in memory only while they are
//! worked on. It runs part by part, and it is written, with what adapters do to it, row by row.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use espalier_adapters::attach::Attached;
use espalier_adapters::formats::piecewise::Piecewise;
use espalier_adapters::{FrozenWeight, Host, ModuleMut};

use crate::freed::give_back;
use crate::load::{Provenance, open_source};
use crate::source::outline::{OutlineSource, Request, blank};
use crate::source::{LoadOptions, WeightSource};
use crate::transformer::Model;
use crate::{Error, ModelConfig, Result};

/// A part of a model that runs by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Token vectors.
    Embed,
    /// One block.
    Block(usize),
    /// Final norm and head.
    Output,
}

/// Where the values are, and how they were asked for.
pub(crate) struct Store {
    source: Box<dyn WeightSource>,
    requests: BTreeMap<String, Request>,
    options: LoadOptions,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} weights of {}", self.requests.len(), self.source.path().display())
    }
}

/// Gives rows of one matrix.
#[derive(Debug)]
pub(crate) enum Reader {
    /// From the file, as they are asked for.
    File(String),
    /// From a matrix in memory: a quantised one.
    Whole(FrozenWeight),
    /// From a matrix in memory that the file keeps as [d_in, d_out].
    Turned(Tensor),
}

/// A small tensor, or a matrix.
type Values = (Option<Tensor>, Option<FrozenWeight>);

impl Store {
    /// How the rows of the matrix called `name` are read; None for one that does not come from the files.
    pub(crate) fn reader(&mut self, name: &str) -> Result<Option<Reader>> {
        let Some(request) = self.requests.get(name).cloned() else { return Ok(None) };
        // Which options would change with the rows at hand needs the matrix as a whole.
        let plain = self.options.quantization.is_none();
        Ok(Some(match request {
            Request::Dense(_) if self.source.rows(name, 0..0)?.is_some() => Reader::File(name.to_owned()),
            Request::Dense(shape) => Reader::Whole(FrozenWeight::dense(self.dense(name, &shape)?)?),
            Request::Matrix { d_in, transposed, .. } if plain => match transposed {
                false if self.source.rows(name, 0..0)?.is_some() => Reader::File(name.to_owned()),
                true => match self.source.rows(name, 0..d_in)? {
                    Some(turned) => Reader::Turned(turned),
                    None => Reader::Whole(self.matrix(name, &request, &Device::Cpu)?),
                },
                false => Reader::Whole(self.matrix(name, &request, &Device::Cpu)?),
            },
            Request::Matrix { .. } => Reader::Whole(self.matrix(name, &request, &Device::Cpu)?),
        }))
    }

    /// Rows of a matrix in the model's dtype, or in f32 where it is quantised.
    pub(crate) fn rows(&mut self, reader: &Reader, rows: Range<usize>) -> Result<Tensor> {
        Ok(match reader {
            Reader::File(name) => {
                let gone = || Error::Input(format!("`{name}` can no longer be read by rows"));
                self.source.rows(name, rows)?.ok_or_else(gone)?.to_dtype(self.options.dtype)?
            }
            Reader::Whole(weight) => weight.rows(rows)?,
            Reader::Turned(turned) => {
                turned.narrow(1, rows.start, rows.len())?.t()?.contiguous()?.to_dtype(self.options.dtype)?
            }
        })
    }

    /// A small tensor called `name`, on the CPU; None for one that does not come from the files.
    pub(crate) fn small(&mut self, name: &str) -> Result<Option<Tensor>> {
        match self.requests.get(name).cloned() {
            Some(Request::Dense(shape)) => Ok(Some(self.dense(name, &shape)?)),
            _ => Ok(None),
        }
    }

    fn dense(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let options = LoadOptions { device: Device::Cpu, ..self.options.clone() };
        self.source.dense(name, shape, &options)
    }

    fn matrix(&mut self, name: &str, request: &Request, device: &Device) -> Result<FrozenWeight> {
        let options = LoadOptions { device: device.clone(), ..self.options.clone() };
        match request {
            Request::Dense(shape) => Ok(FrozenWeight::dense(self.source.dense(name, shape, &options)?)?),
            Request::Matrix { d_out, d_in, transposed } => {
                self.source.matrix(name, *d_out, *d_in, *transposed, &options)
            }
        }
    }

    /// Puts the values of the modules whose paths are `wanted` into `model`, on `device`.
    pub(crate) fn fill(&mut self, model: &mut Model, wanted: &dyn Fn(&str) -> bool, device: &Device) -> Result<()> {
        self.change(model, wanted, &mut |store, name, request| match request {
            Request::Dense(shape) if shape.len() != 2 => Ok((Some(store.dense(name, shape)?.to_device(device)?), None)),
            _ => Ok((None, Some(store.matrix(name, request, device)?))),
        })
    }

    /// Takes them out again.
    pub(crate) fn empty(&mut self, model: &mut Model, wanted: &dyn Fn(&str) -> bool) -> Result<()> {
        self.change(model, wanted, &mut |store, _, request| {
            let dtype = store.options.dtype;
            Ok(match request {
                Request::Dense(shape) => match shape.as_slice() {
                    [d_out, d_in] => (None, Some(FrozenWeight::blank(*d_out, *d_in, dtype)?)),
                    _ => (Some(blank(shape, dtype)?), None),
                },
                Request::Matrix { d_out, d_in, .. } => (None, Some(FrozenWeight::blank(*d_out, *d_in, dtype)?)),
            })
        })
    }

    /// Replaces every weight of the `wanted` modules that comes from the files by what `make` gives.
    fn change(
        &mut self,
        model: &mut Model,
        wanted: &dyn Fn(&str) -> bool,
        make: &mut dyn FnMut(&mut Self, &str, &Request) -> Result<Values>,
    ) -> Result<()> {
        let mut failure = None;
        let walked = model.walk(&mut |module| {
            let path = module.path().to_owned();
            if !wanted(&path) {
                return Ok(());
            }
            let mut take = |part: &str| match self.requests.get(&format!("{path}.{part}")).cloned() {
                None => Ok((None, None)),
                Some(request) => make(self, &format!("{path}.{part}"), &request),
            };
            let mut both = || Ok::<_, Error>((take("weight")?, take("bias")?));
            let ((vector, matrix), (bias, _)) = both().map_err(|e| kept(&mut failure, e))?;
            match module {
                ModuleMut::Linear(linear) => {
                    matrix.map(|m| linear.set_base(Arc::new(m))).transpose()?;
                    if let (Some(place), Some(bias)) = (linear.bias_mut(), bias) {
                        place.set_frozen(bias);
                    }
                }
                ModuleMut::Norm(norm) => {
                    if let Some(vector) = vector {
                        norm.weight_mut().set_frozen(vector);
                    }
                    if let (Some(place), Some(bias)) = (norm.bias_mut(), bias) {
                        place.set_frozen(bias);
                    }
                }
                ModuleMut::Embedding(table) => {
                    if let Some(matrix) = matrix {
                        table.set_weight(matrix)?;
                    }
                }
            }
            Ok(())
        });
        match failure {
            Some(e) => Err(e),
            None => Ok(walked?),
        }
    }
}

/// Keeps an error of this crate while one of the walk's stands for it.
pub(crate) fn kept(place: &mut Option<Error>, error: Error) -> espalier_adapters::Error {
    let stand_in = espalier_adapters::Error::config("weights", error.to_string());
    *place = Some(error);
    stand_in
}

/// A model whose weights stay in their files.
#[derive(Debug)]
pub struct Streamed {
    pub(crate) model: Model,
    pub(crate) store: Store,
}

impl Streamed {
    /// Opens a Hugging Face model folder or a `.gguf` file; the weights are not read.
    ///
    /// # Errors
    /// As [`Model::load`], but for what only the values show.
    pub fn open(path: &Path, options: &LoadOptions) -> Result<Self> {
        let (config, mut source, provenance) = open_source(path)?;
        let (model, requests) = {
            let mut outline = OutlineSource { inner: source.as_mut(), requests: BTreeMap::new() };
            let model = Model::build(config, &mut outline, options, provenance)?;
            (model, outline.requests)
        };
        crate::load::check_used(source.as_ref(), &model.config)?;
        Ok(Self { model, store: Store { source, requests, options: options.clone() } })
    }

    /// The architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.model.config
    }

    /// Where the weights are.
    pub fn provenance(&self) -> &Provenance {
        &self.model.provenance
    }

    /// Dtype of activations.
    pub fn dtype(&self) -> DType {
        self.model.dtype
    }

    /// The modules, for adapters to look at: they have shapes, and no values.
    pub fn host(&mut self) -> &mut dyn Host {
        &mut self.model
    }

    /// Hands the whole adapters to `take`, made on this base, with their weights; the base's weights are in memory meanwhile only where
    /// an adapter needs them.
    ///
    /// # Errors
    /// If an adapter does not fit, or `take` fails.
    pub fn attached<T>(
        &mut self,
        adapters: &Piecewise,
        take: impl FnOnce(&mut dyn Host, &[(&Attached, f64)]) -> espalier_adapters::Result<T>,
    ) -> Result<T> {
        let device = self.model.device.clone();
        let all = |_: &str| true;
        if adapters.needs_base() {
            self.store.fill(&mut self.model, &all, &device)?;
        }
        let model = &mut self.model;
        let made = || {
            let attached = adapters.iter().map(|piece| Ok((piece.attach(model, &device)?, piece.weight)));
            let attached = attached.collect::<espalier_adapters::Result<Vec<_>>>()?;
            take(model, &attached.iter().map(|(adapter, weight)| (adapter, *weight)).collect::<Vec<_>>())
        };
        let taken = made();
        self.store.empty(&mut self.model, &all)?;
        Ok(taken?)
    }

    /// Runs through the model part by part: `run` is called for every stage with its weights in memory, once without adapters,
    /// and then once with them where there are some.
    ///
    /// # Errors
    /// If a weight cannot be read, an adapter does not fit, or `run` fails.
    pub fn stages<E: From<Error>>(
        &mut self,
        adapters: &Piecewise,
        run: &mut dyn FnMut(&Model, Stage, bool) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let blocks = self.model.blocks();
        let stages = [Stage::Embed].into_iter().chain((0..blocks).map(Stage::Block)).chain([Stage::Output]);
        let device = self.model.device.clone();
        for stage in stages {
            let mut paths = Vec::new();
            let tied = self.model.tied_table();
            let mut all = Vec::new();
            let walked = self.model.walk(&mut |module| {
                all.push(module.path().to_owned());
                Ok(())
            });
            walked.map_err(Error::from)?;
            for path in all {
                let own = match (self.model.block_of(&path), self.model.is_before_blocks(&path)) {
                    (Some(block), _) => Stage::Block(block),
                    (None, true) => Stage::Embed,
                    (None, false) => Stage::Output,
                };
                // A tied table is the head as well.
                if own == stage || (stage == Stage::Output && tied.as_ref() == Some(&path)) {
                    paths.push(path);
                }
            }
            let wanted = |path: &str| paths.iter().any(|p| p == path);
            self.store.fill(&mut self.model, &wanted, &device)?;
            run(&self.model, stage, false)?;
            if !adapters.is_empty() {
                adapters.act(&mut self.model, &wanted, &device).map_err(Error::from)?;
                run(&self.model, stage, true)?;
                adapters.rest(&mut self.model).map_err(Error::from)?;
            }
            self.store.empty(&mut self.model, &wanted)?;
            give_back();
        }
        Ok(())
    }
}
