//! The configuration of an adapter: method, placement and what is trained beside it. Recipes (TOML) and PEFT's
//! `adapter_config.json` are two views of it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::parametrisation::MethodConfig;
use crate::target::TargetSpec;

/// Which biases are trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BiasMode {
    /// No bias.
    #[default]
    None,
    /// All biases of the model.
    All,
    /// The biases of adapted modules.
    LoraOnly,
}

/// Which token rows are trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TokenIndices {
    /// Rows of the input embedding.
    Input(Vec<u32>),
    /// Rows by embedding module.
    ByModule(BTreeMap<String, Vec<u32>>),
}

/// What a model is for, under PEFT's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum TaskType {
    /// Next-token prediction.
    #[serde(rename = "CAUSAL_LM")]
    CausalLm,
    /// Sequence classification.
    #[serde(rename = "SEQ_CLS")]
    SequenceClassification,
}

/// An adapter: what, where, and what else is trained with it.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// The method and its settings.
    pub method: MethodConfig,
    /// Where it sits.
    pub targets: TargetSpec,
    /// Which biases are trained beside it.
    pub bias: BiasMode,
    /// Modules trained and saved whole beside it (path endings).
    pub modules_to_save: Vec<String>,
    /// Token rows trained and saved beside it.
    pub trainable_tokens: Option<TokenIndices>,
    /// Whether what is trained of the input embedding also acts on the output head where the two are tied.
    pub tie_weights: bool,
    /// What the model is for.
    pub task: Option<TaskType>,
    /// Name or path of the base, as recorded in files.
    pub base: Option<String>,
    /// Revision of the base at its hub, as recorded in files.
    pub revision: Option<String>,
    /// Content hash of the base.
    pub base_hash: Option<String>,
    /// Settings of the base that change what it computes, by name.
    pub base_settings: Option<BTreeMap<String, String>>,
}

impl AdapterConfig {
    /// `method` on its default targets, nothing else trained.
    pub fn new(method: MethodConfig) -> Self {
        Self {
            targets: TargetSpec::of(method.reach()),
            method,
            bias: BiasMode::None,
            modules_to_save: Vec::new(),
            trainable_tokens: None,
            tie_weights: true,
            task: None,
            base: None,
            revision: None,
            base_hash: None,
            base_settings: None,
        }
    }
}

/// "`x` is not known; nearest: ..." for a value out of a list.
pub fn unknown_value(found: &str, known: &[&str]) -> String {
    let nearest = known
        .iter()
        .map(|k| (strsim::jaro_winkler(&found.to_lowercase(), k), *k))
        .max_by(|x, y| x.0.total_cmp(&y.0))
        .filter(|(score, _)| *score > 0.7);
    match nearest {
        Some((_, name)) => format!("`{found}` is not known; did you mean `{name}`? (known: {})", known.join(", ")),
        None => format!("`{found}` is not known (known: {})", known.join(", ")),
    }
}
