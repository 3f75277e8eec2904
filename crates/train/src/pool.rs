//! Pools of candidate vectors for the components of low-rank products, and which of them are live.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};

use crate::moved_base::taken;
use crate::{Error, Result};

/// The candidates of one side of a product: `count` vectors of `width` values, of which those of `selected` are live.
#[derive(Debug, Clone, PartialEq)]
pub struct Pool {
    width: usize,
    vectors: Vec<f32>,
    /// Which candidate each slot's vector came from.
    pub selected: Vec<usize>,
    /// The next slot to be exchanged.
    pub next: usize,
    /// Steps for which each slot's vector is still held where it is.
    pub held: Vec<u32>,
}

impl Pool {
    /// `vectors` in rows of `width`; slot `first` is the first of the last `rank` candidates, and the first to be exchanged.
    pub fn new(vectors: Vec<f32>, width: usize, rank: usize, first: usize) -> Self {
        let count = vectors.len() / width.max(1);
        let mut selected = vec![0; rank];
        for i in 0..rank {
            selected[(first + i) % rank] = count - rank + i;
        }
        Self { width, vectors, selected, next: first % rank, held: vec![0; rank] }
    }

    /// Number of candidates.
    pub fn count(&self) -> usize {
        self.vectors.len() / self.width.max(1)
    }

    /// The candidate at `index`.
    pub fn vector(&self, index: usize) -> &[f32] {
        &self.vectors[index * self.width..(index + 1) * self.width]
    }

    /// Writes `values` to the candidate that the vector of `slot` came from.
    pub fn put(&mut self, slot: usize, values: &[f32]) {
        let at = self.selected[slot] * self.width;
        self.vectors[at..at + self.width].copy_from_slice(values);
    }

    /// Exchanges the vectors of the next `count` slots of `live` (rows of `width`) for the candidates after the one of the slot
    /// before; live ones go back to where they came from if `write_back`. Gives the slots.
    pub fn exchange(&mut self, live: &mut [f32], count: usize, write_back: bool) -> Vec<usize> {
        let rank = self.selected.len();
        let mut slots = Vec::with_capacity(count);
        for _ in 0..count {
            let slot = self.next;
            let before = (slot + rank - 1) % rank;
            let candidate = (self.selected[before] + 1) % self.count();
            let row = slot * self.width..(slot + 1) * self.width;
            if write_back {
                self.put(slot, &live[row.clone()]);
            }
            live[row].copy_from_slice(&self.vectors[candidate * self.width..(candidate + 1) * self.width]);
            self.selected[slot] = candidate;
            self.next = (slot + 1) % rank;
            slots.push(slot);
        }
        slots
    }

    /// The pool as tensors, by name after `prefix`.
    ///
    /// # Errors
    /// If a tensor cannot be made.
    pub fn state(&self, prefix: &str) -> Result<Vec<(String, Tensor)>> {
        let numbers = |v: &[usize]| v.iter().map(|i| *i as u32).collect::<Vec<u32>>();
        let vectors = Tensor::from_slice(&self.vectors, (self.count(), self.width), &Device::Cpu)?;
        let rank = self.selected.len();
        Ok(vec![
            (format!("{prefix}.candidates"), vectors),
            (format!("{prefix}.selected"), Tensor::from_vec(numbers(&self.selected), rank, &Device::Cpu)?),
            (format!("{prefix}.held"), Tensor::from_slice(&self.held, rank, &Device::Cpu)?),
            (format!("{prefix}.next"), Tensor::from_vec(numbers(&[self.next]), 1, &Device::Cpu)?),
        ])
    }

    /// Puts back what [`Self::state`] gave.
    ///
    /// # Errors
    /// If a tensor is missing or does not fit.
    pub fn restore(&mut self, prefix: &str, state: &mut BTreeMap<String, Tensor>) -> Result<()> {
        let (rank, count) = (self.selected.len(), self.count());
        let mut take = |name: &str, dims: &[usize]| taken(state, &format!("{prefix}.{name}"), dims);
        let vectors = take("candidates", &[count, self.width])?.flatten_all()?.to_vec1::<f32>()?;
        let selected = take("selected", &[rank])?.to_vec1::<u32>()?;
        let held = take("held", &[rank])?.to_vec1::<u32>()?;
        let next = take("next", &[1])?.to_vec1::<u32>()?;
        let numbers = |v: Vec<u32>| v.into_iter().map(|i| i as usize).collect::<Vec<usize>>();
        let (selected, next) = (numbers(selected), numbers(next)[0]);
        if selected.iter().any(|i| *i >= count) || next >= rank {
            return Err(Error::run(prefix, "selects a candidate that does not exist"));
        }
        (self.vectors, self.selected, self.held, self.next) = (vectors, selected, held, next);
        Ok(())
    }
}
