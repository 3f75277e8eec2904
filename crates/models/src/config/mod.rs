//! What an architecture is, as switches of one transformer. Families (`families.rs`) only translate a `config.json` into
//! these switches and the names of the tensors.

mod families;
mod json;
pub mod rope;
mod settings;

use std::path::Path;

use espalier_adapters::module::NormKind;
use espalier_kernels::activation::Activation;
use serde_json::Value;

pub use families::SUPPORTED;
pub(crate) use json::Json;
pub use rope::RopeSpec;

use crate::{Error, Result};

/// Where a block normalises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormPlacement {
    /// x + f(norm(x)).
    Pre,
    /// norm(x + f(x)).
    Post,
    /// x + norm(f(norm(x))).
    Sandwich,
}

/// How positions enter.
#[derive(Debug, Clone, PartialEq)]
pub enum Positions {
    /// Rotary embedding of queries and keys.
    Rope(RopeSpec),
    /// A learned table added to the token vectors; position p takes row p + offset.
    Learned {
        /// Rows of the table.
        rows: usize,
        /// Row of position 0.
        offset: usize,
    },
}

/// What comes out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadSpec {
    /// Scores of every token at every position.
    Causal,
    /// Scores of labels, from the first position through a pooler (BERT).
    Pooled {
        /// Number of labels.
        labels: usize,
    },
    /// Scores of labels, from the first position through a dense layer (RoBERTa).
    Dense {
        /// Number of labels.
        labels: usize,
    },
}

/// Names of the tensors in files, relative to the module they are in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Names {
    /// What comes before everything but the head (`model`); absent in some files.
    pub base: &'static str,
    /// Token table.
    pub embed: &'static str,
    /// Position table.
    pub position: &'static str,
    /// Segment table.
    pub token_type: &'static str,
    /// Norm of the embeddings.
    pub embed_norm: &'static str,
    /// List of blocks.
    pub layers: &'static str,
    /// Query, key, value; or one for all three.
    pub qkv: Projections,
    /// Attention output.
    pub o: &'static str,
    /// Gate and up; or one for both; or only up.
    pub gate_up: Projections,
    /// MLP output.
    pub down: &'static str,
    /// Norms of a block in the order they act.
    pub norms: &'static [&'static str],
    /// Final norm.
    pub norm: &'static str,
    /// Output head.
    pub head: &'static str,
}

/// One fused projection or several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Projections {
    /// One matrix whose outputs are split.
    Fused(&'static str),
    /// One matrix each.
    Split(&'static [&'static str]),
}

/// An architecture.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// `model_type` of the file.
    pub family: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Rows of the token table.
    pub vocab: usize,
    /// Longest sequence the model was made for.
    pub max_positions: usize,
    /// Normalisation.
    pub norm: NormKind,
    /// Where it acts.
    pub placement: NormPlacement,
    /// MLP activation.
    pub activation: Activation,
    /// Whether the MLP is act(gate) * up.
    pub gated: bool,
    /// Biases of q, k, v.
    pub qkv_bias: bool,
    /// Bias of the attention output.
    pub o_bias: bool,
    /// Biases of the MLP.
    pub mlp_bias: bool,
    /// Norms over each head of q and k.
    pub qk_norm: bool,
    /// Positions.
    pub positions: Positions,
    /// Attention window of each block; None sees everything.
    pub windows: Vec<Option<usize>>,
    /// Factor on attention scores.
    pub attention_scale: f64,
    /// Soft cap of attention scores.
    pub attention_softcap: Option<f64>,
    /// Soft cap of the output scores.
    pub final_softcap: Option<f64>,
    /// Factor on token vectors.
    pub embed_scale: Option<f64>,
    /// Whether a position sees only earlier ones.
    pub causal: bool,
    /// Whether the output head is the token table.
    pub tied: bool,
    /// Whether files keep weights as [d_in, d_out].
    pub transposed: bool,
    /// Rows of the segment table, where there is one.
    pub token_types: Option<usize>,
    /// Whether a final norm precedes the head.
    pub final_norm: bool,
    /// Output head.
    pub head: HeadSpec,
    /// Names of the tensors.
    pub names: Names,
    /// Token id of padding.
    pub pad_id: Option<u32>,
    /// Token ids that end a text.
    pub eos_ids: Vec<u32>,
    /// Token id that begins a text.
    pub bos_id: Option<u32>,
    /// The file as read, for export.
    pub raw: Value,
}

impl ModelConfig {
    /// Reads `config.json` of a model folder.
    ///
    /// # Errors
    /// If the file is missing or malformed, or the architecture is not supported.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        let raw: Value = serde_json::from_str(&text).map_err(|e| Error::Config {
            path: path.clone(),
            key: "(whole file)".into(),
            message: e.to_string(),
        })?;
        Self::from_json(&path, raw)
    }

    /// Translates the JSON of a `config.json` at `path` (for messages).
    ///
    /// # Errors
    /// If a key is missing or has a value that is not supported.
    pub fn from_json(path: &Path, raw: Value) -> Result<Self> {
        families::translate(&Json::new(path, &raw)?)
    }

    /// Number of labels of a classification head.
    pub fn labels(&self) -> Option<usize> {
        match self.head {
            HeadSpec::Causal => None,
            HeadSpec::Pooled { labels } | HeadSpec::Dense { labels } => Some(labels),
        }
    }

    /// Names of the labels, where the file gives them.
    pub fn label_names(&self) -> Option<Vec<String>> {
        let map = self.raw.get("id2label")?.as_object()?;
        (0..self.labels()?).map(|i| Some(map.get(&i.to_string())?.as_str()?.to_owned())).collect()
    }
}
