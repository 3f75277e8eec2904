//! Prompt tuning: trained vectors stand before those of the tokens, as if they were tokens themselves.
//!
//! Equation: h_0 = [p_1, .., p_n, e(t_1), .., e(t_m)]; the tokens' positions begin at n
//! Shapes:   p [n, width] trained; a sequence of m tokens becomes one of n + m
//! Source:   arXiv 2104.08691; layout and starts are PEFT's
//! Cost:     n more tokens in every sequence; n width parameters

use candle_core::Tensor;
use rand::Rng;
use serde::{Deserialize, Serialize};

use std::sync::Arc;

use crate::adapter::{Init, Method, NoLayer, PromptSite, Property, Reach, Shared};
use crate::formats::peft_config::{PROMPT_EMBEDDINGS, PeftNames};
use crate::prompt::{NO_WEIGHT, Prompt, PromptShape, Prompter, Virtual};
use crate::random::normal;
use crate::{Error, Flow, Result};

/// Where the vectors start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PromptStart {
    /// Drawn from the standard normal distribution.
    #[default]
    Random,
    /// At the vectors of tokens drawn from the vocabulary.
    SampleVocab,
    /// At the vectors of a text's tokens (files of PEFT; here a new prompt does not start so).
    Text,
}

/// How prompt tuning is set up.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PromptTuning {
    /// How many virtual tokens, and the model's sizes.
    #[serde(flatten)]
    pub tokens: Virtual,
    /// Where they start.
    pub start: PromptStart,
}

impl Method for PromptTuning {
    type Layer = NoLayer;

    const PEFT: Option<PeftNames> = Some(PeftNames {
        kind: "PROMPT_TUNING",
        keys: &[("start", "prompt_tuning_init")],
        fixed: &[("num_transformer_submodules", "1")],
    });

    fn reach(&self) -> Reach<'_> {
        Reach::Sequence
    }

    fn prompter(&self, site: &PromptSite<'_>, init: &mut Init<'_>) -> Result<Arc<dyn Prompter>> {
        let shape = (self.tokens.num_virtual_tokens, site.shape.width);
        let table = site.table;
        let vectors = init.shared(PROMPT_EMBEDDINGS, shape, Shared::Trained, |rng, shape, device| match self.start {
            PromptStart::Random => normal(rng, 1.0, shape.dims(), device),
            PromptStart::SampleVocab => {
                let rows = table.dim(0)? as u32;
                let ids: Vec<u32> = (0..shape.dims()[0]).map(|_| rng.random_range(0..rows)).collect();
                Ok(table.index_select(&Tensor::new(ids, table.device())?, 0)?.detach())
            }
            PromptStart::Text => Err(Error::config(
                "start",
                "TEXT: a new prompt starts at RANDOM vectors or those of a SAMPLE_VOCAB; texts are read from files alone",
            )),
        })?;
        Ok(Arc::new(Vectors(vectors)))
    }

    fn fitted(&self, shape: &PromptShape) -> Result<Self> {
        Ok(Self { tokens: self.tokens.fitted(shape, shape.width, shape.heads)?, ..self.clone() })
    }

    fn virtual_tokens(&self) -> usize {
        self.tokens.num_virtual_tokens
    }

    fn prompt_shape(&self) -> Option<PromptShape> {
        Some(self.tokens.shape())
    }

    fn starts_at_base(&self) -> bool {
        false
    }

    fn exceptions() -> &'static [(Property, &'static str)] {
        &[(Property::Merge, NO_WEIGHT)]
    }

    fn examples() -> Vec<(String, Self)> {
        let three = Self { tokens: Virtual::tokens(3), ..Self::default() };
        vec![
            ("as it comes".to_owned(), Self::default()),
            ("of the vocabulary".to_owned(), Self { start: PromptStart::SampleVocab, ..three }),
        ]
    }

    fn to_peft(&self) -> Option<serde_json::Map<String, serde_json::Value>> {
        let mut keys = crate::formats::peft_config::settings_to_keys(self, &Self::PEFT?)?;
        // The text is not kept, and PEFT reads no such start without one.
        if self.start == PromptStart::Text {
            keys.insert("prompt_tuning_init".into(), "RANDOM".into());
        }
        Some(keys)
    }
}

/// The vectors of virtual tokens.
#[derive(Debug)]
pub(crate) struct Vectors(pub(crate) Tensor);

impl Prompter for Vectors {
    fn prompt(&self, _flow: &Flow) -> Result<Prompt> {
        Ok(Prompt::Tokens(self.0.clone()))
    }

    fn virtual_tokens(&self) -> usize {
        self.0.dim(0).unwrap_or(0)
    }
}
