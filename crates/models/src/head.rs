//! What comes out of a model: scores of tokens, or of labels.

use std::sync::Arc;

use candle_core::Tensor;
use espalier_adapters::module::Linear;
use espalier_adapters::{Embedding, Flow, FrozenWeight, ModuleMut};

use crate::Result;
use crate::builder::Builder;
use crate::config::HeadSpec;

/// The output head.
#[derive(Debug)]
pub(crate) enum Head {
    /// The token table itself.
    Tied,
    /// A linear map to the vocabulary.
    Untied(Linear),
    /// tanh(first W1 + b1) W2 + b2, first token.
    Classifier { inner: Linear, out: Linear },
}

impl Head {
    pub(crate) fn load(build: &mut Builder<'_>) -> Result<Self> {
        let c = build.config;
        let (hidden, base, head) = (c.hidden, c.names.base, c.names.head);
        let inner_path = |spec| match spec {
            HeadSpec::Pooled { .. } => format!("{base}.pooler.dense"),
            _ => format!("{head}.dense"),
        };
        match c.head {
            HeadSpec::Causal if c.tied => Ok(Self::Tied),
            HeadSpec::Causal => Ok(Self::Untied(build.dense_linear(head, c.vocab, hidden, false)?)),
            HeadSpec::Pooled { labels } | HeadSpec::Dense { labels } => {
                let pooled = matches!(c.head, HeadSpec::Pooled { .. });
                let out_path = if pooled { head.to_owned() } else { format!("{head}.out_proj") };
                let fresh = !build.source.has(&format!("{out_path}.weight"));
                let inner_path = inner_path(c.head);
                let inner = if fresh && !build.source.has(&format!("{inner_path}.weight")) {
                    build.new_linear(&inner_path, hidden, hidden)?
                } else {
                    build.dense_linear(&inner_path, hidden, hidden, true)?
                };
                let out = if fresh || build.options.labels.is_some_and(|n| n != labels) {
                    build.new_linear(&out_path, build.options.labels.unwrap_or(labels), hidden)?
                } else {
                    build.dense_linear(&out_path, labels, hidden, true)?
                };
                Ok(Self::Classifier { inner, out })
            }
        }
    }

    /// Scores of `hidden` [n, width]; of labels, where `hidden` holds the first tokens.
    pub(crate) fn forward(&self, hidden: &Tensor, embed: &Embedding, flow: &Flow) -> Result<Tensor> {
        Ok(match self {
            Self::Tied => embed.scores(hidden, flow)?,
            Self::Untied(linear) => linear.forward(hidden, flow)?,
            Self::Classifier { inner, out } => out.forward(&inner.forward(hidden, flow)?.tanh()?, flow)?,
        })
    }

    /// The frozen map to the vocabulary, where nothing else takes part in the scores.
    pub(crate) fn frozen<'a>(&'a self, embed: &'a Embedding) -> Option<&'a Arc<FrozenWeight>> {
        match self {
            Self::Tied => embed.frozen_scores(),
            Self::Untied(linear) => (linear.adapter().is_none() && linear.bias().is_none()).then(|| linear.base()),
            Self::Classifier { .. } => None,
        }
    }

    pub(crate) fn walk(
        &mut self,
        visit: &mut dyn FnMut(ModuleMut<'_>) -> espalier_adapters::Result<()>,
    ) -> espalier_adapters::Result<()> {
        match self {
            Self::Tied => Ok(()),
            Self::Untied(linear) => visit(ModuleMut::Linear(linear)),
            Self::Classifier { inner, out } => {
                visit(ModuleMut::Linear(inner))?;
                visit(ModuleMut::Linear(out))
            }
        }
    }
}
