//! One new token a row through a whole transformer: on a CUDA device recorded once and replayed for each token, on the CPU one pass
//! over weights and factors, where rows may have different adapters.
//!
//! Equation: the parts of `crate::part` for t = 1 with earlier keys and values from a cache, then the final norm and the head
//! Shapes:   m <= 32 rows; x [m, h] and all activations bf16; cache [m, capacity, kv, d]; scores [m, vocabulary] bf16
//! Source:   a persistent kernel whose blocks meet between phases while the weights of later ones are on their way
//! Cost:     every weight is read once a token. The phase that makes the input of a low-rank product also makes its A x, added
//!           up in the order in which blocks finish: the last bits of scores may differ from run to run
//!
//! A decoder reads the weights and adapters that were in use when it was made: it is made for one generation, and stale once
//! adapters change, are trained or are exchanged.

#[cfg(feature = "cuda")]
mod attend;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod phase;
#[cfg(feature = "cuda")]
mod product;
#[cfg(feature = "cuda")]
pub mod single;

use crate::frozen::FrozenWeight;
use crate::part::{AttentionPart, FeedForwardPart, PartNorm};
use candle_core::{Result, Tensor};
use std::sync::Arc;

/// Most rows of a decoder.
pub const ROWS: usize = 32;

/// One block, and what it has seen.
#[derive(Debug, Clone)]
pub struct DecoderBlock {
    /// Attention; its rotary tables and segments are not used.
    pub attention: Arc<AttentionPart>,
    /// Its flat parameters.
    pub attention_parameters: Option<Tensor>,
    /// The feed-forward part.
    pub feed_forward: Arc<FeedForwardPart>,
    /// Its flat parameters.
    pub feed_forward_parameters: Option<Tensor>,
    /// Keys so far [m, length, kv, d], turned by their positions.
    pub keys: Tensor,
    /// Values so far [m, length, kv, d].
    pub values: Tensor,
}

/// What a decoder is made of.
#[derive(Debug, Clone)]
pub struct DecoderPlan {
    /// Token vectors [vocabulary, h].
    pub table: Tensor,
    /// The blocks.
    pub blocks: Vec<DecoderBlock>,
    /// The norm before the head.
    pub norm: PartNorm,
    /// The head [vocabulary, h].
    pub head: Arc<FrozenWeight>,
    /// Cosines and sines of all positions [capacity, r / 2], f32; a row's first token that is no padding has position 0.
    pub rotary: (Tensor, Tensor),
    /// The same blocks with other sets of adapters in their slots.
    pub others: Vec<Vec<DecoderBlock>>,
    /// The set that each row goes through: 0 is `blocks`, n the n-th of `others`. None: all go through `blocks`.
    pub sets: Option<Vec<usize>>,
    /// Places at the start of each row's cache that are padding.
    pub padding: Vec<u32>,
    /// Places of a row's cache, those in use included.
    pub capacity: usize,
}

/// A step that is repeated.
pub struct Decoder {
    inner: Inner,
}

enum Inner {
    Cpu(Box<cpu::Steps>),
    #[cfg(feature = "cuda")]
    Cuda(Box<cuda::Steps>),
}

/// Calls a method of the steps on whatever device.
macro_rules! on {
    ($inner:expr, $steps:ident => $call:expr) => {
        match $inner {
            Inner::Cpu($steps) => $call,
            #[cfg(feature = "cuda")]
            Inner::Cuda($steps) => $call,
        }
    };
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").field("rows", &self.rows()).field("room", &self.room()).finish()
    }
}

impl Decoder {
    /// The decoder of a plan; None where there is none for it. On the CPU: more than 32 rows, or sets of adapters that change more
    /// than the factors beside the weights. On CUDA devices: other than bf16 at compute capability 9, more than [`ROWS`] rows,
    /// several sets of adapters, layer norms, ungated feed-forward parts, weights of a group that do not lie one below the other.
    ///
    /// # Errors
    /// If tensors of the plan do not fit each other, or the device is out of memory.
    pub fn new(plan: &DecoderPlan) -> Result<Option<Self>> {
        #[cfg(feature = "cuda")]
        if plan.others.is_empty()
            && let Some(steps) = cuda::Steps::new(plan)?
        {
            return Ok(Some(Self { inner: Inner::Cuda(Box::new(steps)) }));
        }
        Ok(cpu::Steps::new(plan)?.map(|steps| Self { inner: Inner::Cpu(Box::new(steps)) }))
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        on!(&self.inner, steps => steps.rows())
    }

    /// How many more tokens each row has room for.
    pub fn room(&self) -> usize {
        on!(&self.inner, steps => steps.room())
    }

    /// Appends one token to each row; scores [m, vocabulary] of the next ones.
    ///
    /// # Errors
    /// If the rows are full, or an id is outside the vocabulary.
    pub fn step(&mut self, ids: &[u32]) -> Result<Tensor> {
        on!(&mut self.inner, steps => {
            steps.step(Some(ids))?;
            steps.scores()
        })
    }

    /// Appends one token to each row, by default those that the last step chose; gives the first of the most likely next ones,
    /// and `u32::MAX` for a row whose scores are not finite.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn step_greedy(&mut self, ids: Option<&[u32]>) -> Result<Vec<u32>> {
        on!(&mut self.inner, steps => {
            steps.step(ids)?;
            steps.best()
        })
    }

    /// Keeps only the given rows, in their order, where that saves work: not in a recorded step, which gives false.
    ///
    /// # Errors
    /// If a row is out of range.
    pub fn keep_rows(&mut self, rows: &[usize]) -> Result<bool> {
        if let Some(row) = rows.iter().find(|row| **row >= self.rows()) {
            candle_core::bail!("decoder: row {row} of {}", self.rows())
        }
        match &mut self.inner {
            Inner::Cpu(steps) => {
                steps.keep_rows(rows);
                Ok(true)
            }
            #[cfg(feature = "cuda")]
            Inner::Cuda(_) => Ok(false),
        }
    }
}
