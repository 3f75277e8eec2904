//! P-tuning: vectors that a small network makes stand before those of the tokens, as if they were tokens themselves.
//!
//! Equation: p = f(e), f a perceptron of three layers, or a bidirectional LSTM and a perceptron of two; then as prompt tuning
//! Shapes:   e [n, width] and the network trained; p [n, width]
//! Source:   arXiv 2103.10385; the networks are PEFT's, and what is saved is p, whatever made it
//! Cost:     n more tokens in every sequence, and the network once a pass; n width parameters and the network's

use std::sync::Arc;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::adapter::{Init, Method, NoLayer, PromptSite, Property, Reach, Shared, checked_dropout};
use crate::encoder::{Between, Layers, Lstm, part};
use crate::formats::peft_config::{PROMPT_EMBEDDINGS, PeftNames};
use crate::parametrisation::prompt_tuning::Vectors;
use crate::prompt::{NO_WEIGHT, Prompt, PromptShape, Prompter, Virtual};
use crate::random::normal;
use crate::{Error, Flow, ParameterMap, Result};

/// Which network makes the vectors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Network {
    /// Three layers.
    #[default]
    #[serde(rename = "MLP")]
    Perceptron,
    /// A bidirectional LSTM and two layers.
    #[serde(rename = "LSTM")]
    Lstm,
}

/// How P-tuning is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PTuning {
    /// How many virtual tokens, and the model's sizes.
    #[serde(flatten)]
    pub tokens: Virtual,
    /// What makes them.
    pub network: Network,
    /// Width inside the network; 0: that of the tokens' vectors.
    pub encoder_hidden_size: usize,
    /// Layers of the LSTM.
    pub encoder_num_layers: usize,
    /// Dropout between the layers of the LSTM.
    pub dropout: f64,
}

impl Default for PTuning {
    fn default() -> Self {
        Self {
            tokens: Virtual::default(),
            network: Network::default(),
            encoder_hidden_size: 0,
            encoder_num_layers: 2,
            dropout: 0.0,
        }
    }
}

impl Method for PTuning {
    type Layer = NoLayer;

    const PEFT: Option<PeftNames> = Some(PeftNames {
        kind: "P_TUNING",
        keys: &[("network", "encoder_reparameterization_type"), ("dropout", "encoder_dropout")],
        fixed: &[("num_transformer_submodules", "1")],
    });

    fn reach(&self) -> Reach<'_> {
        Reach::Sequence
    }

    fn prompter(&self, site: &PromptSite<'_>, init: &mut Init<'_>) -> Result<Arc<dyn Prompter>> {
        checked_dropout(self.dropout)?;
        let (n, width) = (self.tokens.num_virtual_tokens, site.shape.width);
        if !init.is_fresh() {
            let vectors = init.shared(PROMPT_EMBEDDINGS, (n, width), Shared::Trained, |rng, shape, device| {
                normal(rng, 1.0, shape.dims(), device)
            })?;
            return Ok(Arc::new(Vectors(vectors)));
        }
        if self.network == Network::Lstm && self.encoder_num_layers == 0 {
            return Err(Error::config("encoder_num_layers", "0, expected at least 1"));
        }
        let hidden = self.encoder_hidden_size;
        let vectors =
            part(init, "embedding.weight", (n, width), |rng, shape, device| normal(rng, 1.0, shape.dims(), device))?;
        let (lstm, widths) = match self.network {
            Network::Perceptron => (None, vec![width, hidden, hidden, width]),
            Network::Lstm => {
                let sizes = (width, hidden, self.encoder_num_layers);
                (Some(Lstm::new(init, "lstm_head", sizes, self.dropout)?), vec![2 * hidden, 2 * hidden, width])
            }
        };
        let layers = Layers::new(init, "mlp_head", &widths, Between::Relu, false)?;
        Ok(Arc::new(Encoded { vectors, lstm, layers }))
    }

    fn fitted(&self, shape: &PromptShape) -> Result<Self> {
        let tokens = self.tokens.fitted(shape, shape.width, shape.heads)?;
        let hidden = if self.encoder_hidden_size > 0 { self.encoder_hidden_size } else { shape.width };
        Ok(Self { tokens, encoder_hidden_size: hidden, ..self.clone() })
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

    fn portable(&self) -> Option<(Self, usize, f64)> {
        Some((self.clone(), 1, 1.0))
    }

    fn exceptions() -> &'static [(Property, &'static str)] {
        &[(Property::Merge, NO_WEIGHT)]
    }

    fn examples() -> Vec<(String, Self)> {
        let three = Self { tokens: Virtual::tokens(3), encoder_hidden_size: 5, ..Self::default() };
        vec![
            ("as it comes".to_owned(), Self::default()),
            ("lstm".to_owned(), Self { network: Network::Lstm, ..three.clone() }),
            ("lstm with dropout".to_owned(), Self { network: Network::Lstm, dropout: 0.3, ..three }),
        ]
    }
}

/// The vectors that the network takes, and the network.
#[derive(Debug)]
struct Encoded {
    vectors: Tensor,
    lstm: Option<Lstm>,
    layers: Layers,
}

impl Encoded {
    fn values(&self, flow: &Flow) -> Result<Tensor> {
        match &self.lstm {
            Some(lstm) => self.layers.forward(&lstm.forward(&self.vectors, flow)?),
            None => self.layers.forward(&self.vectors),
        }
    }
}

impl Prompter for Encoded {
    fn prompt(&self, flow: &Flow) -> Result<Prompt> {
        self.values(flow).map(Prompt::Tokens)
    }

    fn virtual_tokens(&self) -> usize {
        self.vectors.dim(0).unwrap_or(0)
    }

    fn portable(&self) -> Result<Option<ParameterMap>> {
        let mut map = ParameterMap::new();
        map.push(PROMPT_EMBEDDINGS, &self.values(&Flow::eval())?.detach(), true);
        Ok(Some(map))
    }
}
