//! What an optimiser keeps of one tensor, and how often it moved it.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use crate::{Error, Result};

/// Rows or columns of a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Line {
    /// Rows.
    Rows,
    /// Columns.
    Columns,
}

impl Line {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rows => "rows",
            Self::Columns => "columns",
        }
    }

    /// Shape of one value a line of a matrix [m, n].
    pub fn dims(self, (m, n): (usize, usize)) -> (usize, usize) {
        match self {
            Self::Rows => (m, 1),
            Self::Columns => (1, n),
        }
    }

    /// Number of lines of a matrix [m, n].
    pub fn count(self, (m, n): (usize, usize)) -> usize {
        match self {
            Self::Rows => m,
            Self::Columns => n,
        }
    }

    /// A u8 tensor that broadcasts over a matrix [m, n]: 1 at the lines of which `wanted` says so.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn mask(self, dims: (usize, usize), device: &Device, wanted: impl Fn(usize) -> bool) -> Result<Tensor> {
        let values: Vec<u8> = (0..self.count(dims)).map(|i| u8::from(wanted(i))).collect();
        Ok(Tensor::from_vec(values, self.dims(dims), device)?)
    }
}

/// How often a tensor was moved.
#[derive(Debug, Clone)]
pub enum Steps {
    /// All of it as often.
    All(usize),
    /// Counts in f32 that broadcast over it.
    Each(Tensor),
}

impl Steps {
    /// After one more update, of what `moves` (u8, 1 where it moves) says, else of all.
    ///
    /// # Errors
    /// If the shapes do not go together.
    pub fn next(&self, moves: Option<&Tensor>) -> Result<Self> {
        Ok(match (self, moves) {
            (Self::All(n), None) => Self::All(n + 1),
            (Self::Each(counts), None) => Self::Each((counts + 1.0)?),
            (Self::All(n), Some(moves)) => Self::Each((moves.to_dtype(DType::F32)? + *n as f64)?),
            (Self::Each(counts), Some(moves)) => Self::Each((counts + moves.to_dtype(DType::F32)?)?),
        })
    }

    /// As a tensor: a scalar, or the counts.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn tensor(&self) -> Result<Tensor> {
        Ok(match self {
            Self::All(n) => Tensor::new(*n as f32, &Device::Cpu)?,
            Self::Each(counts) => counts.clone(),
        })
    }

    fn of(tensor: &Tensor, device: &Device) -> Result<Self> {
        match tensor.rank() {
            0 => Ok(Self::All(tensor.to_scalar::<f32>()? as usize)),
            _ => Ok(Self::Each(tensor.to_device(device)?)),
        }
    }
}

/// What an optimiser keeps of one tensor.
#[derive(Debug, Clone)]
pub struct Kept {
    /// Names of the tensors.
    pub slots: &'static [&'static str],
    /// The tensors, in f32 and of the shape of what they are kept of.
    pub tensors: Vec<Tensor>,
    /// Updates so far.
    pub steps: Steps,
}

impl Kept {
    /// Nothing yet of a tensor like `like`.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn new(slots: &'static [&'static str], like: &Tensor) -> Result<Self> {
        let zeros = || Ok(Tensor::zeros(like.shape(), DType::F32, like.device())?);
        Ok(Self { slots, tensors: slots.iter().map(|_| zeros()).collect::<Result<_>>()?, steps: Steps::All(0) })
    }

    /// Sets what is kept of some lines of a matrix to 0, their counts of updates included.
    ///
    /// # Errors
    /// If it is no matrix, or a line is outside it.
    pub fn reset(&mut self, lines: Line, indices: &[usize]) -> Result<()> {
        let Some(first) = self.tensors.first() else { return Ok(()) };
        let dims = first.dims2()?;
        if let Some(i) = indices.iter().find(|i| **i >= lines.count(dims)) {
            return Err(Error::run("optimizer", format!("line {i} of a matrix of {dims:?}")));
        }
        let keep = lines.mask(dims, first.device(), |i| !indices.contains(&i))?.to_dtype(DType::F32)?;
        for tensor in &mut self.tensors {
            *tensor = tensor.broadcast_mul(&keep)?;
        }
        self.steps = Steps::Each(match &self.steps {
            Steps::All(n) => (&keep * *n as f64)?,
            Steps::Each(counts) => counts.broadcast_mul(&keep)?,
        });
        Ok(())
    }

    /// Sets the `share` of the entries whose first tensor is smallest to 0, in all tensors.
    ///
    /// # Errors
    /// If values cannot be read.
    pub fn prune(&mut self, share: f64) -> Result<()> {
        let Some(first) = self.tensors.first() else { return Ok(()) };
        let sizes: Vec<f32> = first.abs()?.flatten_all()?.to_vec1()?;
        let cut = (share * sizes.len() as f64) as usize;
        if cut == 0 {
            return Ok(());
        }
        let mut order: Vec<usize> = (0..sizes.len()).collect();
        // Of equal ones the first go, so that their number is what was asked for.
        order.select_nth_unstable_by(cut - 1, |a, b| sizes[*a].total_cmp(&sizes[*b]).then(a.cmp(b)));
        let mut keep = vec![1f32; sizes.len()];
        order[..cut].iter().for_each(|i| keep[*i] = 0.0);
        let keep = Tensor::from_vec(keep, first.shape(), first.device())?;
        for tensor in &mut self.tensors {
            *tensor = (&*tensor * &keep)?;
        }
        Ok(())
    }

    /// Takes what is kept under `name` out of a checkpoint's tensors; None where nothing is. A checkpoint without counts is of
    /// an earlier version, in which all had moved at all of `steps` steps.
    ///
    /// # Errors
    /// If one of its tensors is missing or has another shape.
    pub fn take(
        state: &mut BTreeMap<String, Tensor>,
        name: &str,
        slots: &'static [&'static str],
        dims: &[usize],
        steps: usize,
        device: &Device,
    ) -> Result<Option<Self>> {
        let counts = state.remove(&format!("t.{name}"));
        let found: Vec<(String, Option<Tensor>)> =
            slots.iter().map(|slot| format!("{slot}.{name}")).map(|key| (key.clone(), state.remove(&key))).collect();
        if counts.is_none() && found.iter().all(|(_, t)| t.is_none()) {
            return Ok(None);
        }
        let tensors = found
            .into_iter()
            .map(|(key, tensor)| match tensor {
                // A copy, for a step may write it where it is.
                Some(t) if t.dims() == dims && t.device().same_device(device) => Ok(t.copy()?),
                Some(t) if t.dims() == dims => Ok(t.to_device(device)?),
                Some(t) => Err(Error::run(key, format!("shape {:?}, wanted {dims:?}", t.dims()))),
                None => Err(Error::run(key, "missing in the optimiser's state")),
            })
            .collect::<Result<_>>()?;
        let steps = counts.map_or(Ok(Steps::All(steps)), |counts| Steps::of(&counts, device))?;
        Ok(Some(Self { slots, tensors, steps }))
    }
}
