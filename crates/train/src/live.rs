//! Whether training reaches every trainable tensor: after the first steps of a start each must be finite, have had a gradient
//! and have other values than before, or stand still for a reason that is known; anything else ends the run.

use std::hash::Hasher;

use candle_core::{DType, Tensor};
use espalier_adapters::ParameterMap;
use espalier_adapters::attach::Attached;
use espalier_adapters::parameter::Role;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Steps that are watched: at the first, tensors behind a factor that starts at 0 have no gradient, and a warm-up may begin
/// at a learning rate of 0.
pub const WATCHED: usize = 3;

/// What the watch over the first steps found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Liveness {
    /// Steps watched.
    pub steps: usize,
    /// Trainable tensors.
    pub tensors: usize,
    /// Those of them that had a gradient and moved; all are finite.
    pub moved: usize,
    /// The others, each with the reason why it stands still.
    pub still: Vec<Still>,
}

/// Trainable tensors that stand still for one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Still {
    /// Why.
    pub reason: String,
    /// Their names.
    pub tensors: Vec<String>,
}

impl std::fmt::Display for Liveness {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {} trainable tensors moved in {} steps", self.moved, self.tensors, self.steps)?;
        for Still { reason, tensors } in &self.still {
            let shown = tensors.iter().take(3).cloned().collect::<Vec<_>>().join(", ");
            let more = if tensors.len() > 3 { ", ..." } else { "" };
            write!(f, "; {} stand still, as expected: {reason} ({shown}{more})", tensors.len())?;
        }
        Ok(())
    }
}

/// One trainable tensor under watch.
#[derive(Debug)]
struct Entry {
    name: String,
    tensor: Tensor,
    role: Role,
    /// Factor on the learning rate.
    factor: f64,
    /// Whether it holds rows of tokens, which have a gradient only where one of them takes part in a loss.
    rows: bool,
    start: Look,
    /// Largest gradient so far, after clipping.
    gradient: f64,
}

/// Values read from a tensor at once.
const PIECE: usize = 1 << 20;

/// What is kept of a tensor's values.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Look {
    bits: u64,
    largest: f64,
    finite: bool,
}

impl Look {
    /// Of each of `tensors`; side by side where they are in the host's memory.
    fn at_all(tensors: &[&Tensor]) -> Result<Vec<Self>> {
        match tensors.iter().all(|t| t.device().is_cpu()) {
            true => tensors.par_iter().map(|t| Self::at(t)).collect(),
            false => tensors.iter().map(|t| Self::at(t)).collect(),
        }
    }

    fn at(tensor: &Tensor) -> Result<Self> {
        let mut hash = std::hash::DefaultHasher::new();
        let (mut largest, mut finite) = (0f64, true);
        let mut take = |value: f64| {
            finite &= value.is_finite();
            largest = largest.max(value.abs());
        };
        let flat = tensor.detach().flatten_all()?;
        // In pieces, so that large tensors are not copied whole.
        for at in (0..flat.elem_count()).step_by(PIECE) {
            let piece = flat.narrow(0, at, PIECE.min(flat.elem_count() - at))?;
            if piece.dtype() == DType::F64 {
                for value in piece.to_vec1::<f64>()? {
                    hash.write_u64(value.to_bits());
                    take(value);
                }
            } else {
                for value in piece.to_dtype(DType::F32)?.to_vec1::<f32>()? {
                    hash.write_u32(value.to_bits());
                    take(f64::from(value));
                }
            }
        }
        Ok(Self { bits: hash.finish(), largest, finite })
    }
}

/// Watches the first steps of a start.
#[derive(Debug)]
pub(crate) struct Watch {
    entries: Vec<Entry>,
    steps: usize,
    /// Largest learning rate of the steps watched.
    rate: f64,
    /// Steps of a learning rate above 0 before the last one: whether the last gradients are of moved values.
    effective: usize,
    last_effective: bool,
    eps: f64,
    done: bool,
}

impl Watch {
    /// Begins with the values of the trainable ones among `parameters`, each with its factor on the learning rate; `eps` is
    /// the optimiser's.
    ///
    /// # Errors
    /// If a tensor cannot be read.
    pub(crate) fn new(parameters: &ParameterMap, factors: &[f64], attached: &Attached, eps: f64) -> Result<Self> {
        let is_rows = |tensor: &Tensor| attached.rows.iter().any(|(_, rows)| rows.values.id() == tensor.id());
        let tensors: Vec<&Tensor> = parameters.trainable().map(|p| &p.tensor).collect();
        let looks = Look::at_all(&tensors)?;
        let entries = parameters
            .trainable()
            .zip(factors)
            .zip(looks)
            .map(|((p, factor), start)| Entry {
                name: p.name.clone(),
                tensor: p.tensor.clone(),
                role: p.role,
                factor: *factor,
                rows: is_rows(&p.tensor),
                start,
                gradient: 0.0,
            })
            .collect();
        Ok(Self { entries, steps: 0, rate: 0.0, effective: 0, last_effective: false, eps, done: false })
    }

    /// Whether a missing gradient of the `i`-th tensor is one of 0.
    pub(crate) fn may_be_absent(&self, i: usize) -> bool {
        self.entries.get(i).is_some_and(|e| e.rows)
    }

    /// The name of the `i`-th tensor.
    pub(crate) fn name(&self, i: usize) -> &str {
        self.entries.get(i).map_or("", |e| e.name.as_str())
    }

    /// Takes note of a step about to be taken: of its gradients, which the optimiser multiplies by `scale`, and of its learning rate.
    ///
    /// # Errors
    /// If a gradient cannot be read.
    pub(crate) fn gradients(&mut self, sums: &[Option<Tensor>], scale: f64, rate: f64) -> Result<()> {
        if self.done {
            return Ok(());
        }
        self.steps += 1;
        for (entry, sum) in self.entries.iter_mut().zip(sums) {
            let Some(sum) = sum else { continue };
            let largest = sum.abs()?.max_all()?.to_dtype(DType::F32)?.to_scalar::<f32>()?;
            entry.gradient = entry.gradient.max(f64::from(largest) * scale);
        }
        self.effective += usize::from(self.last_effective);
        self.last_effective = rate > 0.0;
        self.rate = self.rate.max(rate);
        Ok(())
    }

    /// What was found, once: when the steps watched are taken, or at the `end` of fewer; None before, after, and without a step.
    /// `still` says why the `i`-th tensor may stand still, beside the reasons known here.
    ///
    /// # Errors
    /// [`Error::NotTrained`] if a tensor stands still without a reason, or is not finite.
    pub(crate) fn found(&mut self, end: bool, still: &dyn Fn(usize) -> Option<String>) -> Result<Option<Liveness>> {
        if self.done || self.steps == 0 || (self.steps < WATCHED && !end) {
            return Ok(None);
        }
        self.done = true;
        self.check(still).map(Some)
    }

    fn check(&self, still: &dyn Fn(usize) -> Option<String>) -> Result<Liveness> {
        let looks = Look::at_all(&self.entries.iter().map(|e| &e.tensor).collect::<Vec<_>>())?;
        let mut found = Liveness { steps: self.steps, tensors: self.entries.len(), moved: 0, still: Vec::new() };
        let mut faults = Vec::new();
        for (i, (entry, look)) in self.entries.iter().zip(&looks).enumerate() {
            if !look.finite {
                faults.push(format!("  {}: holds NaN or infinity", entry.name));
            } else if entry.gradient > 0.0 && look.bits != entry.start.bits {
                found.moved += 1;
            } else if let Some(reason) = still(i).or_else(|| self.reason(i, look)) {
                match found.still.iter_mut().find(|s| s.reason == reason) {
                    Some(still) => still.tensors.push(entry.name.clone()),
                    None => found.still.push(Still { reason, tensors: vec![entry.name.clone()] }),
                }
            } else if entry.gradient > 0.0 {
                faults.push(format!("  {}: has a gradient, but its values did not move", entry.name));
            } else {
                faults.push(format!("  {}: had a gradient of 0 at every step", entry.name));
            }
        }
        match faults.is_empty() {
            true => Ok(found),
            false => Err(Error::NotTrained { steps: self.steps, tensors: faults }),
        }
    }

    /// Why the `i`-th tensor may stand still.
    fn reason(&self, i: usize, look: &Look) -> Option<String> {
        let entry = &self.entries[i];
        let rate = self.rate * entry.factor;
        if rate == 0.0 {
            return Some("the learning rate was 0".into());
        }
        if entry.gradient > 0.0 {
            let update = rate * entry.gradient / (entry.gradient + self.eps);
            // Values of 24 bits, with room for the largest gradient meeting a smaller value.
            let small = update <= look.largest * 2f64.powi(-22);
            return small.then(|| format!("updates of about {update:.0e} are below the rounding of its values"));
        }
        if entry.rows {
            return Some("none of its tokens took part in a loss yet".into());
        }
        let partner = match entry.role {
            Role::Down => self.entries.get(i + 1).filter(|e| e.role == Role::Up),
            Role::Up => i.checked_sub(1).and_then(|i| self.entries.get(i)).filter(|e| e.role == Role::Down),
            Role::Gate | Role::Other => None,
        };
        let behind_zero = self.effective == 0 && partner.is_some_and(|p| p.start.largest == 0.0);
        behind_zero.then(|| "the other factor of its product was 0 until the last step".into())
    }
}
