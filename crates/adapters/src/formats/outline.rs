//! A model of which nothing is known but the shapes in an adapter's file: enough to attach the adapter to it, so that a file can
//! be judged without its base. Weights are zeros that nobody reads.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor};
use espalier_kernels::frozen::FrozenWeight;

use super::peft_config::PROMPT_EMBEDDINGS;
use crate::adapter::Reach;
use crate::config::{AdapterConfig, TokenIndices};
use crate::module::{Embedding, Host, Linear, ModuleMut, Norm, NormKind};
use crate::parametrisation::MethodConfig;
use crate::prompt::PromptSlot;
use crate::{Error, Result};

/// Modules made from the names and shapes of an adapter's tensors.
#[derive(Debug, Default)]
pub(super) struct Outline {
    linears: Vec<Linear>,
    embeddings: Vec<Embedding>,
    norms: Vec<Norm>,
    tied: Option<(String, String)>,
    prompt: Option<PromptSlot>,
}

/// Names of output heads, which a tied model has under its table's name.
const HEADS: [&str; 3] = ["lm_head", "embed_out", "output_projection"];

fn zeros(shape: &[usize]) -> Result<Tensor> {
    Ok(Tensor::zeros(shape, DType::F32, &Device::Cpu)?)
}

impl Outline {
    /// The modules that `tensors`, in the model's naming, belong to.
    ///
    /// # Errors
    /// If a name or shape is of no module that is known here.
    pub(super) fn of(config: &AdapterConfig, tensors: &BTreeMap<String, Tensor>) -> Result<Self> {
        let mut outline = Self::default();
        if let Some(shape) = config.method.prompt_shape() {
            outline.prompt = Some(PromptSlot::new(shape));
            outline.embeddings.push(Embedding::new("a table of the model's", zeros(&[1, shape.width.max(1)])?)?);
        }
        let modules = tensors.keys().filter(|name| *name != PROMPT_EMBEDDINGS);
        let paths: BTreeSet<&str> = modules.map(|name| module_of(name)).collect();
        for path in paths {
            outline.add(path, config, tensors)?;
        }
        if config.tie_weights && matches!(config.method.reach(), Reach::Rows { .. }) {
            let head = outline.embeddings.iter().position(|e| HEADS.contains(&e.path()));
            let head = head.map(|at| outline.embeddings.remove(at).path().to_owned());
            outline.tied = outline.embeddings.first().map(|e| e.path().to_owned()).zip(head);
        } else if config.tie_weights
            && let Some(table) = outline.embeddings.first().map(|e| e.path().to_owned())
            && let Some(at) = outline.linears.iter().position(|l| HEADS.contains(&l.path()))
        {
            outline.tied = Some((table, outline.linears.remove(at).path().to_owned()));
        }
        Ok(outline)
    }

    fn add(&mut self, path: &str, config: &AdapterConfig, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        let part = |name: &str| tensors.get(&format!("{path}.{name}")).map(|t| t.dims());
        let bias = part("bias").map(zeros).transpose()?;
        let table = match (part("lora_embedding_A"), part("lora_embedding_B"), part("trainable_tokens_delta")) {
            (Some([_, tokens]), Some([width, _]), _) => Some([*tokens, *width]),
            (_, _, Some([_, width])) => Some([most_token(config) as usize + 1, *width]),
            _ => None,
        };
        if let Some(shape) = table {
            self.embeddings.push(Embedding::new(path, zeros(&shape)?)?);
            return Ok(());
        }
        let matrix = match (part("lora_A.weight"), part("lora_B.weight"), part("weight")) {
            (Some([_, d_in]), Some([d_out, _]), _) => Some([*d_out, *d_in]),
            (_, _, Some([d_out, d_in])) => Some([*d_out, *d_in]),
            _ => None,
        };
        let last = path.rsplit('.').next().unwrap_or(path);
        match (matrix, part("weight"), &bias) {
            (Some(shape), ..) if last.contains("embed") || ["wte", "wpe"].contains(&last) => {
                self.embeddings.push(Embedding::new(path, zeros(&shape)?)?);
            }
            (Some(shape), ..) => {
                self.linears.push(Linear::new(path, FrozenWeight::dense(zeros(&shape)?)?, bias, false)?);
            }
            (None, Some([width]), _) => {
                let kind = NormKind::Layer { eps: 0.0 };
                self.norms.push(Norm::new(path, kind, zeros(&[*width])?, bias));
            }
            // A bias alone: of a map whose weight is not touched.
            (None, None, Some(bias)) => {
                let weight = FrozenWeight::dense(zeros(&[bias.dim(0)?, 1])?)?;
                self.linears.push(Linear::new(path, weight, Some(bias.clone()), false)?);
            }
            _ => {
                let names: Vec<&str> = tensors.keys().filter(|n| module_of(n) == path).map(String::as_str).collect();
                let what = format!("no module has tensors of these names and shapes: {}", names.join(", "));
                return Err(Error::config(path, what));
            }
        }
        Ok(())
    }
}

fn most_token(config: &AdapterConfig) -> u32 {
    if let Reach::Rows { tokens, .. } = config.method.reach() {
        return tokens.iter().copied().max().unwrap_or(0);
    }
    match &config.trainable_tokens {
        Some(TokenIndices::Input(ids)) => ids.iter().copied().max().unwrap_or(0),
        Some(TokenIndices::ByModule(map)) => map.values().flatten().copied().max().unwrap_or(0),
        None => 0,
    }
}

/// The module that a tensor belongs to.
pub(super) fn module_of(name: &str) -> &str {
    let parts = [
        ".lora_A.weight",
        ".lora_B.weight",
        ".lora_embedding_A",
        ".lora_embedding_B",
        ".lora_magnitude_vector",
        ".trainable_tokens_delta",
        ".weight",
        ".bias",
    ];
    let own = |end: &str| name.strip_suffix(end)?.strip_suffix('.');
    let of_method = MethodConfig::tensor_names().find_map(own);
    of_method.or_else(|| parts.iter().find_map(|end| name.strip_suffix(end))).unwrap_or(name)
}

impl Host for Outline {
    fn walk(&mut self, visit: &mut dyn FnMut(ModuleMut<'_>) -> Result<()>) -> Result<()> {
        self.embeddings.iter_mut().try_for_each(|m| visit(ModuleMut::Embedding(m)))?;
        self.linears.iter_mut().try_for_each(|m| visit(ModuleMut::Linear(m)))?;
        self.norms.iter_mut().try_for_each(|m| visit(ModuleMut::Norm(m)))
    }

    fn head_paths(&self) -> Vec<String> {
        let tied = self.tied.iter().map(|(_, head)| head.clone());
        tied.chain(HEADS.iter().map(|h| (*h).to_owned())).collect()
    }

    fn tied_table(&self) -> Option<String> {
        self.tied.as_ref().map(|(table, _)| table.clone())
    }

    fn prompt_slot(&mut self) -> Option<&mut PromptSlot> {
        self.prompt.as_mut()
    }

    fn base_hash(&self) -> Result<String> {
        Ok(String::new())
    }
}
