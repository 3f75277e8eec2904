//! Where the tensors of layers come from: drawn for a new adapter, taken from a file for a saved one, by one code path.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Shape, Tensor, Var};
use rand_chacha::ChaCha8Rng;

use crate::formats::safetensors::bytes_of;
use crate::parameter::ParameterMap;
use crate::{Error, Result, random};

/// Where the tensors of a layer come from.
#[derive(Debug)]
pub enum Source<'a> {
    /// Drawn, or as they were made from the data.
    Fresh {
        /// The seed of the run.
        seed: u64,
        /// Tensors that were made from the data, by full name; what was taken is removed.
        starts: &'a mut BTreeMap<String, Tensor>,
    },
    /// Taken from a file: tensors by full name; what was taken is removed, what was missed is noted.
    File {
        /// Tensors left in the file.
        tensors: &'a mut BTreeMap<String, Tensor>,
        /// Names asked for but not there.
        missing: &'a mut Vec<String>,
    },
}

/// What a start can be made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EvidenceKind {
    /// The gradient of the mean loss with respect to the frozen weight [d_out, d_in].
    Gradient,
    /// The mean of x x^T over the inputs x of the map [d_in, d_in].
    InputMoment,
}

/// What a method wants to know of the data before it is made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Wanted {
    /// What.
    pub kind: EvidenceKind,
    /// From how many rows of the training data.
    pub rows: usize,
}

/// What is known of the data at one site.
#[derive(Debug)]
pub struct Evidence<'a> {
    /// In the shape that its kind has, f32.
    pub values: &'a Tensor,
    /// Learning rate of the run's first step that moves anything.
    pub first_lr: f64,
    /// Seed of the run.
    pub seed: u64,
}

/// What a tensor that all sites share is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shared {
    /// Trained, and saved.
    Trained,
    /// Frozen, and saved.
    Saved,
    /// Frozen, and made again from the method's settings where a file lacks it.
    Remade,
}

/// `found` if it has the shape asked for.
fn fitting(full: &str, found: Tensor, shape: &Shape) -> Result<Tensor> {
    if found.shape() == shape {
        return Ok(found);
    }
    Err(Error::Shape { tensor: full.to_owned(), expected: shape.dims().to_vec(), found: found.dims().to_vec() })
}

/// Hands out the tensors of layers.
#[derive(Debug)]
pub struct Init<'a> {
    /// Origin of the values.
    pub source: Source<'a>,
    /// Path of the module the next tensors belong to.
    pub path: String,
    /// Dtype of parameters (f32; f64 in gradient checks).
    pub dtype: DType,
    /// Device of parameters.
    pub device: Device,
    /// Greatest output and input width over all sites, (d_out, d_in): what tensors that sites share must cover.
    pub widest: (usize, usize),
    shared: BTreeMap<String, (Tensor, Shared)>,
}

impl<'a> Init<'a> {
    /// Tensors from `source`, for sites that are nowhere wider than `widest` (d_out, d_in).
    pub fn new(source: Source<'a>, dtype: DType, device: &Device, widest: (usize, usize)) -> Self {
        Self { source, path: String::new(), dtype, device: device.clone(), widest, shared: BTreeMap::new() }
    }

    /// Whether values are drawn (a new adapter).
    pub fn is_fresh(&self) -> bool {
        matches!(self.source, Source::Fresh { .. })
    }

    /// Whether a start was made from the data for the tensor `name` of the module.
    pub fn has_start(&self, name: &str) -> bool {
        let full = format!("{}.{name}", self.path);
        matches!(&self.source, Source::Fresh { starts, .. } if starts.contains_key(&full))
    }

    /// Takes the start that was made from the data for the tensor `name` of the module.
    ///
    /// # Errors
    /// If there is none.
    pub fn start(&mut self, name: &str) -> Result<Tensor> {
        let full = format!("{}.{name}", self.path);
        let start = match &mut self.source {
            Source::Fresh { starts, .. } => starts.remove(&full),
            Source::File { .. } => None,
        };
        start.ok_or_else(|| Error::unsupported(full, "no start was made from data"))
    }

    /// The values of `full`: from the file, else `draw` of its stream; None where the file lacks it.
    fn values(
        &mut self,
        full: &str,
        shape: &Shape,
        draw: impl FnOnce(&mut ChaCha8Rng, &Shape, &Device) -> Result<Tensor>,
    ) -> Result<Option<Tensor>> {
        let values = match &mut self.source {
            Source::Fresh { seed, starts } => match starts.remove(full) {
                Some(start) => fitting(full, start, shape)?,
                None => draw(&mut random::stream(*seed, full), shape, &self.device)?,
            },
            Source::File { tensors, .. } => match tensors.remove(full) {
                Some(found) => fitting(full, found, shape)?,
                None => return Ok(None),
            },
        };
        Ok(Some(values.to_dtype(self.dtype)?.to_device(&self.device)?.contiguous()?))
    }

    /// Notes that the file lacks `full`. The file will be refused; until then one zero stands for all values, however many
    /// were asked for.
    fn missed(&mut self, full: &str, shape: &Shape) -> Result<Tensor> {
        if let Source::File { missing, .. } = &mut self.source {
            missing.push(full.to_owned());
        }
        Ok(Tensor::zeros(1, self.dtype, &self.device)?.broadcast_as(shape)?)
    }

    /// The tensor `full`, a variable where it is `trained`; noted as missed where the file lacks it.
    fn given(
        &mut self,
        full: &str,
        shape: &Shape,
        trained: bool,
        draw: impl FnOnce(&mut ChaCha8Rng, &Shape, &Device) -> Result<Tensor>,
    ) -> Result<Tensor> {
        match self.values(full, shape, draw)? {
            Some(values) if trained => Ok(Var::from_tensor(&values)?.as_tensor().clone()),
            Some(values) => Ok(values.detach()),
            None => self.missed(full, shape),
        }
    }

    /// A trainable tensor: from the file, else `draw` of the module's stream.
    ///
    /// # Errors
    /// If the file's tensor has another shape or the draw fails.
    pub fn trainable(
        &mut self,
        name: &str,
        shape: impl Into<Shape>,
        draw: impl FnOnce(&mut ChaCha8Rng, &Shape, &Device) -> Result<Tensor>,
    ) -> Result<Tensor> {
        self.given(&format!("{}.{name}", self.path), &shape.into(), true, draw)
    }

    /// A tensor that is saved but not trained: as [`Self::trainable`].
    ///
    /// # Errors
    /// As [`Self::trainable`].
    pub fn frozen(
        &mut self,
        name: &str,
        shape: impl Into<Shape>,
        draw: impl FnOnce(&mut ChaCha8Rng, &Shape, &Device) -> Result<Tensor>,
    ) -> Result<Tensor> {
        self.given(&format!("{}.{name}", self.path), &shape.into(), false, draw)
    }

    /// A trainable tensor that starts at zero.
    ///
    /// # Errors
    /// As [`Self::trainable`].
    pub fn zeros(&mut self, name: &str, shape: impl Into<Shape>) -> Result<Tensor> {
        self.constant(name, shape, 0.0)
    }

    /// A trainable tensor whose entries all start at `value`.
    ///
    /// # Errors
    /// As [`Self::trainable`].
    pub fn constant(&mut self, name: &str, shape: impl Into<Shape>, value: f64) -> Result<Tensor> {
        self.trainable(name, shape, |_, shape, device| Ok(Tensor::full(value as f32, shape, device)?))
    }

    /// A trainable tensor that starts as a copy of `values`.
    ///
    /// # Errors
    /// As [`Self::trainable`].
    pub fn copy_of(&mut self, name: &str, values: &Tensor) -> Result<Tensor> {
        self.trainable(name, values.shape(), |_, _, _| Ok(values.detach()))
    }

    /// A trainable tensor that starts as what `values` gives, which is not asked where a file has the tensor.
    ///
    /// # Errors
    /// As [`Self::trainable`].
    pub fn copy_with(
        &mut self,
        name: &str,
        shape: impl Into<Shape>,
        values: impl FnOnce() -> Result<Tensor>,
    ) -> Result<Tensor> {
        self.trainable(name, shape, |_, _, _| values())
    }

    /// The tensor called `name` that belongs to no module and that all sites share: made for the first, and given to all.
    ///
    /// # Errors
    /// As [`Self::trainable`]; if sites ask for it with different shapes.
    pub fn shared(
        &mut self,
        name: &str,
        shape: impl Into<Shape>,
        kind: Shared,
        draw: impl FnOnce(&mut ChaCha8Rng, &Shape, &Device) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let shape = shape.into();
        if let Some((tensor, _)) = self.shared.get(name) {
            return match tensor.shape() == &shape {
                true => Ok(tensor.clone()),
                false => Err(Error::Shape {
                    tensor: name.to_owned(),
                    expected: shape.dims().to_vec(),
                    found: tensor.dims().to_vec(),
                }),
            };
        }
        self.gather_copies(name)?;
        let remade = kind == Shared::Remade;
        let there = match &self.source {
            Source::Fresh { .. } => true,
            Source::File { tensors, .. } => tensors.contains_key(name),
        };
        let values = if remade && !there {
            let drawn = draw(&mut random::stream(0, name), &shape, &self.device)?;
            Some(drawn.to_dtype(self.dtype)?.to_device(&self.device)?.contiguous()?)
        } else {
            self.values(name, &shape, draw)?
        };
        let tensor = match values {
            Some(values) if kind == Shared::Trained => Var::from_tensor(&values)?.as_tensor().clone(),
            Some(values) => values.detach(),
            None => self.missed(name, &shape)?,
        };
        self.shared.insert(name.to_owned(), (tensor.clone(), kind));
        Ok(tensor)
    }

    /// Files of some tools hold a shared tensor once for every module: those copies, which must be equal, become the one.
    fn gather_copies(&mut self, name: &str) -> Result<()> {
        let Source::File { tensors, .. } = &mut self.source else { return Ok(()) };
        let ending = format!(".{name}");
        let copies: Vec<String> = tensors.keys().filter(|key| key.ends_with(&ending)).cloned().collect();
        for key in copies {
            let Some(copy) = tensors.remove(&key) else { continue };
            match tensors.get(name) {
                None => drop(tensors.insert(name.to_owned(), copy)),
                Some(one) if one.shape() == copy.shape() && bytes_of(one)? == bytes_of(&copy)? => {}
                Some(_) => {
                    return Err(Error::config(key, format!("differs from the other copies of the shared `{name}`")));
                }
            }
        }
        Ok(())
    }

    /// What is shared and saved, trained or frozen.
    pub(crate) fn shared_parameters(&self) -> ParameterMap {
        let mut map = ParameterMap::new();
        for (name, (tensor, kind)) in &self.shared {
            if *kind != Shared::Remade {
                map.push(name.clone(), tensor, *kind == Shared::Trained);
            }
        }
        map
    }
}
