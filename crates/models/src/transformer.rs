//! The transformer: token vectors, blocks, final norm and head. One for all families; the switches are in
//! [`ModelConfig`]. It runs whole ([`Model::forward`]) or block by block, which is how training keeps only what it needs.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use espalier_adapters::module::{GgufName, Norm};
use espalier_adapters::prompt::{Prompt, PromptShape, PromptSlot};
use espalier_adapters::{Embedding, Flow, Host, ModuleMut};
use espalier_kernels::attention::Segments;
use espalier_kernels::cross_entropy::{cross_entropy, linear_cross_entropy};

use crate::block::{Block, BlockPass};
use crate::builder::Builder;
use crate::cache::{KvCache, LayerCache};
use crate::config::{HeadSpec, ModelConfig, Positions};
use crate::context::{Context, RotaryTables};
use crate::head::Head;
use crate::input::TokenBatch;
use crate::laid::{Begun, Laid};
use crate::load::Provenance;
use crate::source::gguf_names::gguf_name;
use crate::source::{LoadOptions, WeightSource};
use crate::{Error, Result};

/// A base model with places for adapters.
#[derive(Debug)]
pub struct Model {
    pub(crate) config: ModelConfig,
    pub(crate) embed: Embedding,
    pub(crate) position: Option<Embedding>,
    pub(crate) token_type: Option<Embedding>,
    pub(crate) embed_norm: Option<Norm>,
    pub(crate) blocks: Vec<Block>,
    pub(crate) norm: Option<Norm>,
    pub(crate) head: Head,
    pub(crate) device: Device,
    pub(crate) dtype: DType,
    pub(crate) tables: RotaryTables,
    pub(crate) prompt: PromptSlot,
    pub(crate) provenance: Provenance,
}

impl Model {
    /// Builds the architecture from a source of weights.
    pub(crate) fn build(
        mut config: ModelConfig,
        source: &mut dyn WeightSource,
        options: &LoadOptions,
        provenance: Provenance,
    ) -> Result<Self> {
        let mut build = Builder { source, config: &config, options };
        let names = config.names;
        let at = |name: &str| format!("{}.{name}", names.base);
        let embed = build.embedding(&at(names.embed), config.vocab)?;
        let position = match config.positions {
            Positions::Learned { rows, .. } => Some(build.embedding(&at(names.position), rows)?),
            Positions::Rope(_) => None,
        };
        let token_type = config.token_types.map(|rows| build.embedding(&at(names.token_type), rows)).transpose()?;
        let embed_norm =
            (!names.embed_norm.is_empty()).then(|| build.norm(&at(names.embed_norm), config.hidden)).transpose()?;
        let blocks = (0..config.layers)
            .map(|i| Block::load(&mut build, &format!("{}.{i}", at(names.layers)), i))
            .collect::<Result<_>>()?;
        let norm = config.final_norm.then(|| build.norm(&at(names.norm), config.hidden)).transpose()?;
        let head = Head::load(&mut build)?;
        if let Some(labels) = options.labels {
            config.head = match config.head {
                HeadSpec::Causal => {
                    return Err(Error::Input(format!("`{}` is no classifier: it has no labels", config.family)));
                }
                HeadSpec::Pooled { .. } => HeadSpec::Pooled { labels },
                HeadSpec::Dense { .. } => HeadSpec::Dense { labels },
            };
        }
        let device = options.device.clone();
        let prompt = PromptSlot::new(PromptShape {
            width: config.hidden,
            blocks: config.layers,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_width: config.head_dim,
            causal: config.causal,
        });
        Ok(Self {
            config,
            embed,
            position,
            token_type,
            embed_norm,
            blocks,
            norm,
            head,
            device,
            dtype: options.dtype,
            tables: RotaryTables::default(),
            prompt,
            provenance,
        })
    }

    /// The architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Device of weights and activations.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Dtype of activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// The block that a module path belongs to; None for embeddings, final norm and head.
    pub fn block_of(&self, path: &str) -> Option<usize> {
        let names = self.config.names;
        let rest = path.strip_prefix(names.base)?.strip_prefix('.')?.strip_prefix(names.layers)?.strip_prefix('.')?;
        rest.split('.').next()?.parse().ok()
    }

    /// Whether a module path belongs to the embeddings, which come before all blocks.
    pub fn is_before_blocks(&self, path: &str) -> bool {
        let names = self.config.names;
        let rest = path.strip_prefix(names.base).and_then(|p| p.strip_prefix('.')).unwrap_or(path);
        [names.embed, names.position, names.token_type, names.embed_norm]
            .iter()
            .any(|n| !n.is_empty() && (rest == *n || rest.strip_prefix(n).is_some_and(|r| r.starts_with('.'))))
    }

    /// An empty cache of keys and values.
    pub fn new_cache(&self) -> KvCache {
        KvCache::new(self.blocks.len())
    }

    /// What the blocks share in one pass over `input`, before whose sequences nothing stands.
    ///
    /// # Errors
    /// If the input does not fit the model.
    pub fn context(&self, input: &TokenBatch) -> Result<Context> {
        input.check()?;
        self.context_over(input, input.own_segments())
    }

    pub(crate) fn context_over(&self, input: &TokenBatch, segments: Option<Arc<Segments>>) -> Result<Context> {
        Context::new(&self.config, input, segments, (self.dtype, &self.device), &self.tables)
    }

    /// Vectors of the input's tokens, and of virtual ones where they are [b, t, hidden].
    pub(crate) fn embed(&self, input: &TokenBatch, prompt: Option<(&Prompt, &Laid)>) -> Result<Tensor> {
        if let Some((i, id)) = input.ids.iter().enumerate().find(|(_, id)| **id as usize >= self.config.vocab) {
            return Err(Error::Input(format!(
                "token id {id} (row {}, place {}) is outside the model's vocabulary of {}; the tokenizer is another model's",
                i / input.length.max(1),
                i % input.length.max(1),
                self.config.vocab
            )));
        }
        let mut x = self.embed.forward(&input.ids_on(&self.device)?)?;
        if let Some(scale) = self.config.embed_scale {
            // The factor is rounded to the dtype of the activations first, as in the reference.
            let scale = Tensor::new(scale, &self.device)?.to_dtype(x.dtype())?;
            x = x.broadcast_mul(&scale)?;
        }
        // Virtual tokens are not scaled, as in the reference.
        let input = match prompt {
            None => input,
            Some((Prompt::Tokens(tokens), laid)) => {
                x = laid.lay(tokens, &x)?;
                &laid.input
            }
            Some((Prompt::KeysValues(values), laid)) => {
                let nothing = Tensor::zeros((values.dim(0)?, self.config.hidden), x.dtype(), &self.device)?;
                x = laid.lay(&nothing, &x)?;
                &laid.input
            }
        };
        if let (Some(table), Positions::Learned { rows, offset }) = (&self.position, &self.config.positions) {
            let longest = input.positions.iter().max().map_or(0, |p| *p as usize + 1);
            if longest + offset > *rows {
                return Err(Error::Input(format!(
                    "a sequence of {longest} tokens is longer than the {} positions of the model",
                    rows - offset
                )));
            }
            let places: Vec<u32> = input.positions.iter().map(|p| p + *offset as u32).collect();
            let places = Tensor::from_vec(places, (input.batch, input.length), &self.device)?;
            x = (x + table.forward(&places)?)?;
        }
        if let Some(table) = &self.token_type {
            let types = match &input.token_types {
                Some(types) => types.clone(),
                None => vec![0; input.ids.len()],
            };
            let types = Tensor::from_vec(types, (input.batch, input.length), &self.device)?;
            x = (x + table.forward(&types)?)?;
        }
        match &self.embed_norm {
            Some(norm) => Ok(norm.forward(&x)?),
            None => Ok(x),
        }
    }

    /// Output of block `index` for `x` [b, t, hidden].
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn block(
        &self,
        index: usize,
        x: &Tensor,
        context: &Context,
        flow: &Flow,
        cache: Option<&mut LayerCache>,
    ) -> Result<Tensor> {
        self.blocks[index].forward(x, context, flow, cache)
    }

    /// Output of block `index` for `x` off the tape, and the way back; None where the block is no pair of fused operations.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn block_pass(
        &self,
        index: usize,
        x: &Tensor,
        context: &Context,
        flow: &Flow,
    ) -> Result<Option<(Tensor, BlockPass)>> {
        self.blocks[index].pass(x, context, flow)
    }

    /// Vectors after the blocks, as the head takes them: after the final norm, if there is one.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn finish(&self, x: &Tensor) -> Result<Tensor> {
        match &self.norm {
            Some(norm) => Ok(norm.forward(x)?),
            None => Ok(x.clone()),
        }
    }

    /// Scores of finished vectors [n, hidden]: [n, vocabulary], or [n, labels] for the first tokens of rows.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn scores(&self, hidden: &Tensor, flow: &Flow) -> Result<Tensor> {
        let scores = self.head.forward(hidden, &self.embed, flow)?;
        match self.config.final_softcap {
            Some(cap) => Ok(((scores / cap)?.tanh()? * cap)?),
            None => Ok(scores),
        }
    }

    /// Cross-entropy `[n]` of finished vectors [n, hidden] against `labels`, in f32 (f64 for an f64 model).
    ///
    /// # Errors
    /// If a label is outside the vocabulary or shapes do not fit.
    pub fn losses(&self, hidden: &Tensor, labels: &[u32], flow: &Flow) -> Result<Tensor> {
        match self.head.frozen(&self.embed).filter(|_| self.config.final_softcap.is_none()) {
            Some(weight) => Ok(linear_cross_entropy(hidden, weight, labels)?),
            None => Ok(cross_entropy(&self.scores(hidden, flow)?, labels, None)?),
        }
    }

    /// Finished vectors of all tokens [b, t, hidden]; of a classifier, those of virtual tokens as well.
    ///
    /// # Errors
    /// If the input does not fit the model.
    pub fn hidden(&self, input: &TokenBatch, flow: &Flow) -> Result<Tensor> {
        let begun = self.begin(input, flow)?;
        let mut x = begun.x.clone();
        for i in 0..self.blocks.len() {
            x = self.block(i, &x, &begun.context, flow, None)?;
        }
        let x = match &begun.laid {
            Some(laid) if begun.read_before == 0 => laid.own(&x)?,
            _ => x,
        };
        self.finish(&x)
    }

    /// Scores: [b, t, vocabulary], or [b, labels] for a classifier.
    ///
    /// # Errors
    /// If the input does not fit the model.
    pub fn forward(&self, input: &TokenBatch, flow: &Flow) -> Result<Tensor> {
        self.outputs(&self.hidden(input, flow)?, flow)
    }

    /// Scores of finished vectors [b, t, hidden]: [b, t, vocabulary], or [b, labels] for a classifier.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn outputs(&self, hidden: &Tensor, flow: &Flow) -> Result<Tensor> {
        let (b, t, h) = hidden.dims3()?;
        if self.config.labels().is_some() {
            return self.scores(&hidden.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?, flow);
        }
        let scores = self.scores(&hidden.reshape((b * t, h))?, flow)?;
        let width = scores.dim(1)?;
        Ok(scores.reshape((b, t, width))?)
    }

    /// Appends the tokens of `input` to `cache`; scores [b, vocabulary] after the last token of each row.
    ///
    /// # Errors
    /// If the input does not fit the model or the cache.
    pub fn advance(&self, input: &TokenBatch, cache: &mut KvCache, flow: &Flow) -> Result<Tensor> {
        input.check()?;
        if self.config.labels().is_some() || !self.config.causal {
            return Err(Error::Input(format!(
                "`{}` does not predict tokens, so it cannot generate",
                self.config.family
            )));
        }
        let (begun, length) = self.go_on(input, cache, flow)?;
        let Begun { mut x, context, .. } = begun;
        for i in 0..self.blocks.len() {
            x = self.block(i, &x, &context, flow, Some(&mut cache.layers[i]))?.detach();
        }
        let last = x.narrow(1, length - 1, 1)?.squeeze(1)?.contiguous()?;
        self.scores(&self.finish(&last)?, flow)
    }
}

impl Host for Model {
    fn walk(
        &mut self,
        visit: &mut dyn FnMut(ModuleMut<'_>) -> espalier_adapters::Result<()>,
    ) -> espalier_adapters::Result<()> {
        visit(ModuleMut::Embedding(&mut self.embed))?;
        for table in [&mut self.position, &mut self.token_type].into_iter().flatten() {
            visit(ModuleMut::Embedding(table))?;
        }
        if let Some(norm) = &mut self.embed_norm {
            visit(ModuleMut::Norm(norm))?;
        }
        for block in &mut self.blocks {
            block.walk(visit)?;
        }
        if let Some(norm) = &mut self.norm {
            visit(ModuleMut::Norm(norm))?;
        }
        self.head.walk(visit)
    }

    fn head_paths(&self) -> Vec<String> {
        vec![self.config.names.head.to_owned()]
    }

    fn tied_table(&self) -> Option<String> {
        matches!(self.head, Head::Tied).then(|| self.embed.path().to_owned())
    }

    fn prompt_slot(&mut self) -> Option<&mut PromptSlot> {
        Some(&mut self.prompt)
    }

    fn gguf_name(&self, path: &str) -> Option<GgufName> {
        gguf_name(&self.config, path)
    }

    fn is_rounded(&self) -> bool {
        self.provenance.is_gguf()
    }

    fn settings(&self) -> BTreeMap<String, String> {
        self.config.settings()
    }

    fn base_hash(&self) -> espalier_adapters::Result<String> {
        self.provenance.hash()
    }
}
