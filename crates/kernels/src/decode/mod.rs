//! One new token a row through a whole transformer: five kernels a block, recorded once as a graph and replayed for each token.
//!
//! Equation: the parts of `crate::part` for t = 1 with earlier keys and values from a cache, then the final norm and the head
//! Shapes:   m <= 32 rows; x [m, h] and all activations bf16; cache [m, capacity, kv, d]; scores [m, vocabulary] bf16
//! Source:   CUDA graphs; kernels that start early and wait themselves (programmatic dependent launch)
//! Cost:     every weight is read once a token. The kernel that makes the input of a low-rank product also makes its A x, added
//!           up in the order in which blocks finish: the last bits of scores may differ from run to run
//!
//! A decoder reads the weights and adapters that were in use when it was made: it is made for one generation, and stale once
//! adapters change, are trained or are exchanged.

#[cfg(feature = "cuda")]
mod attend;
#[cfg(feature = "cuda")]
mod cuda;
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
    /// Places at the start of each row's cache that are padding.
    pub padding: Vec<u32>,
    /// Places of a row's cache, those in use included.
    pub capacity: usize,
}

/// A recorded step.
pub struct Decoder {
    #[cfg(feature = "cuda")]
    inner: cuda::Steps,
    #[cfg(not(feature = "cuda"))]
    never: std::convert::Infallible,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").field("rows", &self.rows()).field("room", &self.room()).finish()
    }
}

impl Decoder {
    /// The decoder of a plan; None where the kernels do not handle it: other than bf16 on a CUDA device of compute capability 9,
    /// more than [`ROWS`] rows, layer norms, ungated feed-forward parts, weights of a group that do not lie one below the other.
    ///
    /// # Errors
    /// If tensors of the plan do not fit each other, or the device is out of memory.
    pub fn new(plan: &DecoderPlan) -> Result<Option<Self>> {
        #[cfg(feature = "cuda")]
        return Ok(cuda::Steps::new(plan)?.map(|inner| Self { inner }));
        #[cfg(not(feature = "cuda"))]
        {
            let _ = plan;
            Ok(None)
        }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        #[cfg(feature = "cuda")]
        return self.inner.rows();
        #[cfg(not(feature = "cuda"))]
        match self.never {}
    }

    /// How many more tokens each row has room for.
    pub fn room(&self) -> usize {
        #[cfg(feature = "cuda")]
        return self.inner.room();
        #[cfg(not(feature = "cuda"))]
        match self.never {}
    }

    /// Appends one token to each row; scores [m, vocabulary] of the next ones.
    ///
    /// # Errors
    /// If the rows are full, or an id is outside the vocabulary.
    pub fn step(&mut self, ids: &[u32]) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        {
            self.inner.step(Some(ids))?;
            self.inner.scores()
        }
        #[cfg(not(feature = "cuda"))]
        {
            let _ = ids;
            match self.never {}
        }
    }

    /// Appends one token to each row, by default those that the last step chose; gives the first of the most likely next ones,
    /// and `u32::MAX` for a row whose scores are not finite.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn step_greedy(&mut self, ids: Option<&[u32]>) -> Result<Vec<u32>> {
        #[cfg(feature = "cuda")]
        {
            self.inner.step(ids)?;
            self.inner.best()
        }
        #[cfg(not(feature = "cuda"))]
        {
            let _ = ids;
            match self.never {}
        }
    }
}
