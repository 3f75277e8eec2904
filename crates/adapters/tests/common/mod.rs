//! A toy model with every kind of module, and what tests do with the adapters on it.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use espalier_adapters::adapter::EvidenceKind;
use espalier_adapters::attach::{Attached, attach_from_data};
use espalier_adapters::formats::hash::of_parts;
use espalier_adapters::formats::safetensors::{TensorFile, bytes_of};
use espalier_adapters::module::NormKind;
use espalier_adapters::prompt::{Prompt, PromptShape, PromptSlot};
use espalier_adapters::random::{normal, stream};
use espalier_adapters::{
    AdapterConfig, AdapterSet, Embedding, Flow, FrozenWeight, Host, Linear, ModuleMut, Norm, Result, Site,
};

pub(crate) const VOCAB: usize = 11;
pub(crate) const WIDTH: usize = 8;
pub(crate) const INNER: usize = 16;
pub(crate) const OUT: usize = 5;
pub(crate) const IDS: [u32; 7] = [3, 0, 10, 3, 7, 1, 5];

pub(crate) const EMBED: &str = "model.embed_tokens";
pub(crate) const UP: &str = "model.layers.0.up_proj";
pub(crate) const DOWN: &str = "model.layers.1.down_proj";
pub(crate) const NORM: &str = "model.layers.0.norm";

/// Sizes of the toy, as far as something may stand before its sequences.
const PROMPT: PromptShape =
    PromptShape { width: WIDTH, blocks: 2, heads: 3, kv_heads: 1, head_width: WIDTH, causal: true };

/// down(norm(up(embed(ids)))): a table, a map with a bias, a layer norm, and a map that files keep transposed.
pub(crate) struct Toy {
    pub(crate) embed: Embedding,
    pub(crate) up: Linear,
    pub(crate) norm: Norm,
    pub(crate) down: Linear,
    slot: PromptSlot,
    hash: String,
}

fn draw(name: &str, std: f64, shape: &[usize], dtype: DType) -> Tensor {
    normal(&mut stream(5, name), std, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

impl Toy {
    pub(crate) fn new(dtype: DType) -> Self {
        let table = draw("table", 1.0, &[VOCAB, WIDTH], dtype);
        let up = draw("up", 0.4, &[INNER, WIDTH], dtype);
        let down = draw("down", 0.3, &[OUT, INNER], dtype);
        let bias = draw("bias", 0.1, &[INNER], dtype);
        let (gain, shift) = ((draw("gain", 0.2, &[INNER], dtype) + 1.0).unwrap(), draw("shift", 0.1, &[INNER], dtype));
        let parts: Vec<Vec<u8>> = [&table, &up, &down, &bias].iter().map(|t| bytes_of(t).unwrap()).collect();
        Self {
            embed: Embedding::new(EMBED, table).unwrap(),
            up: Linear::new(UP, FrozenWeight::dense(up).unwrap(), Some(bias), false).unwrap(),
            norm: Norm::new(NORM, NormKind::Layer { eps: 1e-5 }, gain, Some(shift)),
            down: Linear::new(DOWN, FrozenWeight::dense(down).unwrap(), None, true).unwrap(),
            slot: PromptSlot::new(PROMPT),
            hash: of_parts(parts.iter().map(Vec::as_slice)),
        }
    }

    pub(crate) fn forward(&self, ids: &[u32], flow: &Flow) -> Result<Tensor> {
        let mut x = self.embed.forward(&Tensor::new(ids, &Device::Cpu)?)?;
        // Every token sees all that stands before the sequence alike.
        if let Some(prompter) = self.slot.get() {
            let (Prompt::Tokens(before) | Prompt::KeysValues(before)) = prompter.prompt(flow)?;
            let weights =
                Tensor::arange(0f32, before.elem_count() as f32, &Device::Cpu)?.cos()?.reshape(before.shape())?;
            let seen = (before.tanh()? * weights.to_dtype(before.dtype())?)?.sum(0)?;
            let seen = seen.reshape((seen.elem_count() / WIDTH, WIDTH))?.sum(0)?;
            x = x.to_dtype(seen.dtype())?.broadcast_add(&seen)?.to_dtype(x.dtype())?;
        }
        self.down.forward(&self.norm.forward(&self.up.forward(&x, flow)?)?, flow)
    }

    pub(crate) fn out(&self) -> Tensor {
        self.forward(&IDS, &Flow::eval()).unwrap().detach()
    }
}

impl Host for Toy {
    fn walk(&mut self, visit: &mut dyn FnMut(ModuleMut<'_>) -> Result<()>) -> Result<()> {
        visit(ModuleMut::Embedding(&mut self.embed))?;
        visit(ModuleMut::Linear(&mut self.up))?;
        visit(ModuleMut::Norm(&mut self.norm))?;
        visit(ModuleMut::Linear(&mut self.down))
    }

    fn head_paths(&self) -> Vec<String> {
        vec!["lm_head".into()]
    }

    fn prompt_slot(&mut self) -> Option<&mut PromptSlot> {
        Some(&mut self.slot)
    }

    fn base_hash(&self) -> Result<String> {
        Ok(self.hash.clone())
    }
}

/// What the data of no task says at a site, for methods that start from data: of full rank, and not even.
pub(crate) fn evidence(config: &AdapterConfig) -> impl FnMut(&Site) -> Result<Tensor> {
    let kind = config.method.wanted().map(|wanted| wanted.kind);
    move |site| {
        let draw = |shape| normal(&mut stream(11, &site.path), 0.3, shape, &Device::Cpu);
        match kind {
            Some(EvidenceKind::Gradient) => draw((site.d_out, site.d_in)),
            _ => draw((site.d_in, site.d_in)).and_then(|x| Ok(x.matmul(&x.t()?)?)),
        }
    }
}

/// A new adapter for `host`.
pub(crate) fn fresh(host: &mut dyn Host, config: &AdapterConfig, seed: u64, dtype: DType) -> Attached {
    try_fresh(host, config, seed, dtype).unwrap()
}

/// A new adapter for `host`, or why there is none.
pub(crate) fn try_fresh(host: &mut dyn Host, config: &AdapterConfig, seed: u64, dtype: DType) -> Result<Attached> {
    attach_from_data(host, config, (seed, 1e-3), dtype, &Device::Cpu, &mut evidence(config))
}

/// Moves every trainable tensor off its start.
pub(crate) fn perturb(adapter: &Attached, seed: u64) {
    for p in adapter.parameters.trainable() {
        let noise = normal(&mut stream(seed, &p.name), 0.2, p.tensor.shape(), &Device::Cpu).unwrap();
        p.var().unwrap().set(&(&p.tensor.detach() + noise.to_dtype(p.tensor.dtype()).unwrap()).unwrap()).unwrap();
    }
}

/// A set with `adapter` in it as `a`, acting.
pub(crate) fn acting(host: &mut dyn Host, adapter: Attached) -> AdapterSet {
    let mut set = AdapterSet::new();
    set.add("a", adapter).unwrap();
    set.activate(host, &[("a", 1.0)]).unwrap();
    set
}

/// Greatest absolute difference, in f64; NaN counts as infinite.
pub(crate) fn difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    values(a)
        .iter()
        .zip(values(b))
        .map(|(x, y)| (x - y).abs())
        .fold(0.0, |m, d| if d >= 0.0 { d.max(m) } else { f64::INFINITY })
}

pub(crate) fn values(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap()
}

pub(crate) fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../parity/golden")
}

/// The modules of a golden base model by what its weight file holds, without an architecture around them.
pub(crate) struct Skeleton {
    linears: Vec<Linear>,
    embeddings: Vec<Embedding>,
    norms: Vec<Norm>,
    head: &'static str,
    hash: String,
}

impl Skeleton {
    pub(crate) fn of(family: &str) -> Self {
        let file = TensorFile::open(&golden().join("families").join(family).join("model.safetensors")).unwrap();
        let tensors: BTreeMap<String, Tensor> = file.load_all(&Device::Cpu).unwrap();
        let turned = family == "gpt2";
        let mut made = Self {
            linears: Vec::new(),
            embeddings: Vec::new(),
            norms: Vec::new(),
            head: "lm_head",
            hash: espalier_adapters::formats::hash::of_files(&[file]).unwrap(),
        };
        for (name, tensor) in &tensors {
            let Some(path) = name.strip_suffix(".weight") else { continue };
            let bias = tensors.get(&format!("{path}.bias")).cloned();
            if tensor.rank() == 1 {
                made.norms.push(Norm::new(path, NormKind::Layer { eps: 1e-5 }, tensor.clone(), bias));
            } else if ["embed_tokens", "wte", "wpe"].iter().any(|end| path.ends_with(end)) {
                made.embeddings.push(Embedding::new(path, tensor.clone()).unwrap());
            } else {
                let weight = if turned { tensor.t().unwrap().contiguous().unwrap() } else { tensor.clone() };
                let weight = FrozenWeight::dense(weight).unwrap();
                made.linears.push(Linear::new(path, weight, bias, turned).unwrap());
            }
        }
        // The token table comes before the position table.
        made.embeddings.reverse();
        made
    }
}

impl Host for Skeleton {
    fn walk(&mut self, visit: &mut dyn FnMut(ModuleMut<'_>) -> Result<()>) -> Result<()> {
        self.embeddings.iter_mut().try_for_each(|m| visit(ModuleMut::Embedding(m)))?;
        self.linears.iter_mut().try_for_each(|m| visit(ModuleMut::Linear(m)))?;
        self.norms.iter_mut().try_for_each(|m| visit(ModuleMut::Norm(m)))
    }

    fn head_paths(&self) -> Vec<String> {
        vec![self.head.into()]
    }

    fn tied_table(&self) -> Option<String> {
        let apart = self.linears.iter().any(|l| l.path() == self.head);
        self.embeddings.first().filter(|_| !apart).map(|e| e.path().to_owned())
    }

    fn base_hash(&self) -> Result<String> {
        Ok(self.hash.clone())
    }
}
