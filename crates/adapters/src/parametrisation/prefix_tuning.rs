//! Prefix tuning: every block attends to trained keys and values that stand before those of the tokens.
//!
//! Equation: attention of block i over [K_i; k(x)] and [V_i; v(x)]; with projection, all K and V are W2 tanh(W1 e + b1) + b2
//! Shapes:   K, V [blocks, n, keys] trained, or e [n, keys], W1 [hidden, keys], W2 [2 blocks keys, hidden] and biases; a token's
//!           position counts the n before it, and no positions are turned into K
//! Source:   arXiv 2101.00190; the layout is PEFT's, and saved as K and V whatever made them
//! Cost:     n more keys in every block, and their rows in its products; 2 n blocks keys parameters without projection

use std::sync::Arc;

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::adapter::{Init, Method, NoLayer, PromptSite, Property, Reach, Shared};
use crate::encoder::{Between, Layers, part};
use crate::formats::peft_config::{self, PROMPT_EMBEDDINGS, PeftNames};
use crate::prompt::{NO_WEIGHT, Prompt, PromptShape, Prompter, Virtual};
use crate::random::normal;
use crate::{Error, Flow, ParameterMap, Result};

/// How prefix tuning is set up.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PrefixTuning {
    /// How many virtual tokens, and the model's sizes.
    #[serde(flatten)]
    pub tokens: Virtual,
    /// Make keys and values from smaller vectors by two layers while they are trained.
    pub prefix_projection: bool,
    /// Width between the two layers; 0: that of the keys.
    pub encoder_hidden_size: usize,
    /// Keys and values start at 0.
    pub zero: bool,
}

/// PEFT's key of the start.
const START: &str = "init_weights";

/// Why encoders are refused.
const DECODERS: &str = "PEFT has keys and values before the sequences of decoders alone; use prompt_tuning or p_tuning";

impl Method for PrefixTuning {
    type Layer = NoLayer;

    const PEFT: Option<PeftNames> =
        Some(PeftNames { kind: "PREFIX_TUNING", keys: &[], fixed: &[("num_transformer_submodules", "1")] });

    fn reach(&self) -> Reach<'_> {
        Reach::Sequence
    }

    fn prompter(&self, site: &PromptSite<'_>, init: &mut Init<'_>) -> Result<Arc<dyn Prompter>> {
        if !site.shape.causal {
            return Err(Error::unsupported("prefix_tuning on an encoder", DECODERS));
        }
        let (n, keys, blocks) = (self.tokens.num_virtual_tokens, site.shape.keys(), site.shape.blocks);
        let all = 2 * blocks * keys;
        if self.prefix_projection && init.is_fresh() {
            let vectors = part(init, "embedding.weight", (n, keys), |rng, shape, device| {
                normal(rng, 1.0, shape.dims(), device)
            })?;
            let layers = Layers::new(init, "transform", &[keys, self.encoder_hidden_size, all], Between::Tanh, self.zero)?;
            return Ok(Arc::new(Prefix { vectors, layers: Some(layers) }));
        }
        let vectors = init.shared(PROMPT_EMBEDDINGS, (n, all), Shared::Trained, |rng, shape, device| match self.zero {
            true => Ok(Tensor::zeros(shape, DType::F32, device)?),
            false => normal(rng, 1.0, shape.dims(), device),
        })?;
        Ok(Arc::new(Prefix { vectors, layers: None }))
    }

    fn fitted(&self, shape: &PromptShape) -> Result<Self> {
        let tokens = self.tokens.fitted(shape, shape.keys(), shape.kv_heads)?;
        let hidden = if self.encoder_hidden_size > 0 { self.encoder_hidden_size } else { shape.keys() };
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
        self.prefix_projection.then(|| (self.clone(), 1, 1.0))
    }

    fn exceptions() -> &'static [(Property, &'static str)] {
        &[(Property::Merge, NO_WEIGHT), (Property::Encoders, DECODERS)]
    }

    fn examples() -> Vec<(String, Self)> {
        let three = Self { tokens: Virtual::tokens(3), ..Self::default() };
        vec![
            ("as it comes".to_owned(), Self::default()),
            ("projected".to_owned(), Self { prefix_projection: true, encoder_hidden_size: 5, ..three }),
        ]
    }

    fn to_peft(&self) -> Option<Map<String, Value>> {
        let mut keys = peft_config::settings_to_keys(self, &Self::PEFT?)?;
        keys.remove("zero");
        keys.insert(START.into(), if self.zero { "zero".into() } else { Value::Null });
        Some(keys)
    }

    fn from_peft(keys: &mut Map<String, Value>) -> Result<Option<Self>> {
        let Some(names) = Self::PEFT.filter(|names| keys.get("peft_type").is_some_and(|kind| kind == names.kind)) else {
            return Ok(None);
        };
        let zero = match keys.remove(START) {
            None | Some(Value::Null) => false,
            Some(Value::String(start)) if start == "zero" => true,
            Some(other) => return Err(Error::config(START, format!("{other} is neither null nor \"zero\""))),
        };
        let method = peft_config::settings_from_keys::<Self>(keys, &names)?;
        Ok(method.map(|method| Self { zero, ..method }))
    }
}

/// Keys and values, or what they are made of.
#[derive(Debug)]
struct Prefix {
    vectors: Tensor,
    layers: Option<Layers>,
}

impl Prefix {
    fn values(&self) -> Result<Tensor> {
        self.layers.as_ref().map_or_else(|| Ok(self.vectors.clone()), |layers| layers.forward(&self.vectors))
    }
}

impl Prompter for Prefix {
    fn prompt(&self, _flow: &Flow) -> Result<Prompt> {
        self.values().map(Prompt::KeysValues)
    }

    fn virtual_tokens(&self) -> usize {
        self.vectors.dim(0).unwrap_or(0)
    }

    fn portable(&self) -> Result<Option<ParameterMap>> {
        if self.layers.is_none() {
            return Ok(None);
        }
        let mut map = ParameterMap::new();
        map.push(PROMPT_EMBEDDINGS, &self.values()?.detach(), true);
        Ok(Some(map))
    }
}
