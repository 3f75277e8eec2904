//! What stands before every sequence of a model: virtual tokens, or keys and values that its blocks attend to.
//!
//! A model has one place for it ([`PromptSlot`]) and knows no method; a method fills the place with a [`Prompter`].

use std::sync::Arc;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::adapter::{Init, PromptSite, Reach};
use crate::module::{Host, ModuleMut};
use crate::{AdapterConfig, Error, Flow, ParameterMap, Result};

/// Sizes of a model that what stands before its sequences must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PromptShape {
    /// Width of a token's vector.
    pub width: usize,
    /// Blocks.
    pub blocks: usize,
    /// Heads of the queries.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_width: usize,
    /// Whether tokens see only what is before them.
    pub causal: bool,
}

impl PromptShape {
    /// Width of a token's keys in one block, over all heads.
    pub fn keys(&self) -> usize {
        self.kv_heads * self.head_width
    }
}

/// What stands before each sequence in one pass.
#[derive(Debug, Clone)]
pub enum Prompt {
    /// Vectors [n, width] of virtual tokens.
    Tokens(Tensor),
    /// Keys and values [n, blocks * 2 * keys] of n virtual tokens: those of block i from 2 i keys on, first the keys. They are
    /// used as they are: no positions are turned into them.
    KeysValues(Tensor),
}

/// Makes what stands before the sequences.
pub trait Prompter: Send + Sync + std::fmt::Debug {
    /// What stands before each sequence of this pass.
    ///
    /// # Errors
    /// If shapes do not fit.
    fn prompt(&self, flow: &Flow) -> Result<Prompt>;

    /// Number of virtual tokens, at least 1.
    fn virtual_tokens(&self) -> usize;

    /// The parameters as files hold them, where that is another form than they are trained in.
    ///
    /// # Errors
    /// If shapes do not fit.
    fn portable(&self) -> Result<Option<ParameterMap>> {
        Ok(None)
    }
}

/// A model's place for what stands before its sequences.
#[derive(Debug, Clone)]
pub struct PromptSlot {
    shape: PromptShape,
    filled: Option<Arc<dyn Prompter>>,
}

/// Why what stands before a sequence cannot be merged.
pub const NO_WEIGHT: &str = "what stands before the sequences is computed with by no weight, so none can take it in; keep the adapter beside the base";

impl PromptSlot {
    /// The empty place of a model of these sizes.
    pub fn new(shape: PromptShape) -> Self {
        Self { shape, filled: None }
    }

    /// The model's sizes.
    pub fn shape(&self) -> &PromptShape {
        &self.shape
    }

    /// What stands there now.
    pub fn get(&self) -> Option<&Arc<dyn Prompter>> {
        self.filled.as_ref()
    }

    /// Puts something there, or empties the place.
    pub fn set(&mut self, prompter: Option<Arc<dyn Prompter>>) {
        self.filled = prompter;
    }
}

/// How many virtual tokens, and the sizes of the model they are for, under PEFT's names; 0: the model's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Virtual {
    /// Virtual tokens before each sequence.
    pub num_virtual_tokens: usize,
    /// Width of a virtual token's vector, or of its keys in one block.
    pub token_dim: usize,
    /// Blocks of the model.
    pub num_layers: usize,
    /// Heads of the model, or those of its keys.
    pub num_attention_heads: usize,
}

impl Default for Virtual {
    fn default() -> Self {
        Self { num_virtual_tokens: 20, token_dim: 0, num_layers: 0, num_attention_heads: 0 }
    }
}

/// More virtual tokens than this are a typing error.
const MOST: usize = 1 << 16;

impl Virtual {
    /// `n` virtual tokens for any model.
    pub fn tokens(n: usize) -> Self {
        Self { num_virtual_tokens: n, ..Self::default() }
    }

    /// A model of these sizes, as far as they say what it is.
    pub fn shape(&self) -> PromptShape {
        let heads = self.num_attention_heads;
        PromptShape {
            width: self.token_dim,
            blocks: self.num_layers,
            heads,
            kv_heads: heads,
            head_width: self.token_dim / heads.max(1),
            causal: true,
        }
    }

    /// The sizes filled in: those of `width` and `heads` in a model of `shape`.
    ///
    /// # Errors
    /// If there is no virtual token, or a size was given that is not the model's.
    pub fn fitted(&self, shape: &PromptShape, width: usize, heads: usize) -> Result<Self> {
        if !(1..=MOST).contains(&self.num_virtual_tokens) {
            let found = format!("{}, expected 1 to {MOST}", self.num_virtual_tokens);
            return Err(Error::config("num_virtual_tokens", found));
        }
        let sizes = [
            ("token_dim", self.token_dim, width),
            ("num_layers", self.num_layers, shape.blocks),
            ("num_attention_heads", self.num_attention_heads, heads),
        ];
        if let Some((key, said, own)) = sizes.iter().find(|(_, said, own)| *said != 0 && said != own) {
            return Err(Error::config(*key, format!("{said}, but the model has {own}")));
        }
        let n = self.num_virtual_tokens;
        Ok(Self { num_virtual_tokens: n, token_dim: width, num_layers: shape.blocks, num_attention_heads: heads })
    }
}

/// Makes what stands before the sequences, where the method is of that kind, and fills the model's sizes into `config`.
pub(crate) fn make(
    host: &mut dyn Host,
    config: &mut AdapterConfig,
    init: &mut Init<'_>,
) -> Result<Option<Arc<dyn Prompter>>> {
    if config.method.reach() != Reach::Sequence {
        return Ok(None);
    }
    let Some(shape) = host.prompt_slot().map(|slot| *slot.shape()) else {
        return Err(Error::unsupported(config.method.name(), "this model has no place before its sequences"));
    };
    let mut table = None;
    host.walk(&mut |module| {
        if let (ModuleMut::Embedding(embedding), None) = (module, &table) {
            table = Some(embedding.weight().frozen().clone());
        }
        Ok(())
    })?;
    let Some(table) = table else {
        return Err(Error::unsupported(config.method.name(), "this model has no token table"));
    };
    config.method = config.method.fitted(&shape)?;
    config.method.prompter(&PromptSite { shape: &shape, table: &table }, init).map(Some)
}
