//! The whole-workload benchmarks: a training step and generation on a Llama of any shape with random weights and tokens.
//!
//! Equation: FLOPs a step = 4 P N - 2 N P_qkv(block 0) + 4 h V N_lab + 6 r S N + 7 N T h L, over the measured matrix rate
//! Shapes:   N = rows * columns tokens, P frozen values of the adapted maps, S = sum of their d_in + d_out
//! Source:   forward 2 P N, backward to activations alone 2 P N; the embedding is frozen, so block 0 needs no dx

use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use espalier_adapters::attach::{Attached, Origin, attach};
use espalier_adapters::{AdapterSet, Flow, FrozenWeight, random};
use espalier_data::Batch;
use espalier_models::{LoadOptions, Model, ModelConfig, TokenBatch};
use rand::Rng;
use serde::Serialize;
use serde_json::json;

use crate::dynamics::{Fit, Moving, Rates};
use crate::objective::{Objective, causal::Causal};
use crate::optimizer::Optimizer;
use crate::tape::{self, Gradients, Start};
use crate::{Error, Recipe, Result, memory, setup};

/// The shape of a benchmark.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    /// Width.
    pub hidden: usize,
    /// Blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of the MLP.
    pub ff: usize,
    /// Tokens known.
    pub vocab: usize,
    /// Rank of the adapter; 0: none.
    pub rank: usize,
    /// Method of the adapter.
    pub method: String,
    /// Keys of its `[adapter]` table beside rank and alpha, as TOML.
    pub adapter: String,
    /// Keys of the `[dynamics]` table, as TOML; empty: plain training.
    pub dynamics: String,
    /// Device.
    pub device: String,
    /// Dtype of activations and frozen weights.
    pub dtype: String,
}

/// What a training benchmark found; keys as the reference's.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[allow(missing_docs)]
pub struct TrainReport {
    pub tool: &'static str,
    pub device: String,
    pub dtype: String,
    pub method: String,
    pub dynamics: String,
    pub dora: bool,
    pub checkpointing: bool,
    pub hidden: usize,
    pub layers: usize,
    pub seq: usize,
    pub batch: usize,
    pub tokens_per_s: f64,
    pub step_s: f64,
    pub min_s: f64,
    pub max_s: f64,
    pub peak_mib: u64,
    pub first_step_s: f64,
    pub loss0: f64,
    pub loss_last: f64,
    /// Median time of the first and of the last tenth of the steps.
    pub early_s: f64,
    pub late_s: f64,
    /// Peak memory after the first tenth of the steps.
    pub early_peak_mib: u64,
    /// Measured rate of matrix products in this run, GFLOP/s.
    pub matrix_gflops: f64,
    /// FLOPs that the step needs, in units of 10^9.
    pub step_gflop: f64,
    /// Time of those FLOPs at that rate over the step's time.
    pub share_of_floor: f64,
}

/// What a generation benchmark found, for one batch size.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[allow(missing_docs)]
pub struct GenerateReport {
    pub tool: &'static str,
    pub device: String,
    pub dtype: String,
    pub batch: usize,
    pub adapters: usize,
    pub prompt: usize,
    pub new_tokens: usize,
    pub prefill_tokens_per_s: f64,
    pub decode_tokens_per_s: f64,
    pub peak_mib: u64,
}

struct Setup {
    model: Model,
    set: AdapterSet,
}

fn prepare(shape: &Shape, positions: usize) -> Result<Setup> {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.hidden,
        "intermediate_size": shape.ff, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocab,
        "max_position_embeddings": positions.max(2048), "rms_norm_eps": 1e-6, "tie_word_embeddings": false,
    });
    let device = setup::device(&shape.device)?;
    let dtype = setup::dtype(&shape.dtype, &device)?;
    let options = LoadOptions { dtype, device: device.clone(), ..LoadOptions::cpu() };
    let config = ModelConfig::from_json(std::path::Path::new("bench"), config)?;
    let mut model = Model::random(config, &options)?;
    let mut set = AdapterSet::new();
    if shape.rank > 0 {
        set.add("bench", adapter(&mut model, shape, 0)?)?;
        set.activate(&mut model, &[("bench", 1.0)])?;
    }
    Ok(Setup { model, set })
}

/// The recipe of a benchmark's step.
fn recipe(shape: &Shape) -> Result<Recipe> {
    let table =
        |key: &str, text: &str| text.parse::<toml::Table>().map_err(|e| Error::recipe(key, e.message().to_owned()));
    let mut adapter = table("adapter", &shape.adapter)?;
    adapter.insert("method".into(), shape.method.clone().into());
    let dynamics = table("dynamics", &shape.dynamics)?;
    let base = Recipe { lr: 1e-4, weight_decay: 0.01, ..Recipe::default() };
    let with = |ranked: bool| {
        let mut adapter = adapter.clone();
        if ranked {
            adapter.entry("r").or_insert((shape.rank as i64).into());
            adapter.entry("alpha").or_insert((2.0 * shape.rank as f64).into());
        }
        Recipe { adapter, dynamics: dynamics.clone(), ..base.clone() }
    };
    // Methods without a rank have no such keys.
    let ranked = with(true);
    Ok(if ranked.adapter_config().is_ok() { ranked } else { with(false) })
}

fn adapter(model: &mut Model, shape: &Shape, seed: u64) -> Result<Attached> {
    let config = recipe(shape)?.adapter_config()?;
    let device = model.device().clone();
    Ok(attach(model, &config, Origin::Seed(seed), DType::F32, &device)?)
}

fn tokens(count: usize, vocab: usize) -> Vec<u32> {
    let mut rng = random::stream(0, "bench tokens");
    (0..count).map(|_| rng.random_range(0..vocab as u32)).collect()
}

/// Rate of matrix products of the benchmark's own size with a frozen matrix in the run's dtype, GFLOP/s.
fn matrix_rate(device: &Device, dtype: DType, (m, k, n): (usize, usize, usize)) -> Result<f64> {
    let mut rng = random::stream(1, "bench matrix");
    let a = random::normal(&mut rng, 1.0, (m, k), device)?.to_dtype(dtype)?;
    let b = random::normal(&mut rng, 1.0, (n, k), device)?.to_dtype(dtype)?;
    let b = Arc::new(FrozenWeight::dense(b)?);
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        device.synchronize()?;
        let began = Instant::now();
        for _ in 0..10 {
            b.forward(&a)?;
        }
        device.synchronize()?;
        best = best.min(began.elapsed().as_secs_f64() / 10.0);
    }
    Ok(2.0 * (m * k * n) as f64 / best / 1e9)
}

/// FLOPs that a step needs, by the counting rule.
fn step_flops(s: &Shape, batch: usize, seq: usize) -> f64 {
    let head = s.hidden / s.heads.max(1);
    let (h, f, q, kv) = (s.hidden as f64, s.ff as f64, (s.heads * head) as f64, (s.kv_heads * head) as f64);
    let n = (batch * seq) as f64;
    let layers = s.layers as f64;
    let qkv = h * (q + 2.0 * kv);
    let p = layers * (qkv + q * h + 3.0 * h * f);
    let sides = layers * ((h + q) + 2.0 * (h + kv) + (q + h) + 3.0 * (h + f));
    let labelled = (batch * (seq - 1)) as f64;
    4.0 * p * n - 2.0 * n * qkv
        + 4.0 * h * s.vocab as f64 * labelled
        + 6.0 * s.rank as f64 * sides * n
        + 7.0 * n * seq as f64 * h * layers
}

/// Most memory in use at once: on a device what was allocated there, else the process's.
fn peak_mib(device: &Device) -> Result<u64> {
    Ok(memory::peak_on(device)?.unwrap_or(0) >> 20)
}

/// Times training steps: `warmup` untimed ones, then `steps`.
///
/// # Errors
/// If the shape is not valid or a step fails.
pub fn train(
    shape: &Shape,
    (batch, seq): (usize, usize),
    (warmup, steps): (usize, usize),
    checkpointing: bool,
) -> Result<TrainReport> {
    if shape.rank == 0 || steps == 0 || seq < 2 {
        return Err(Error::recipe("bench", "the rank and the steps must be at least 1, the length at least 2"));
    }
    let recipe = recipe(shape)?;
    let Setup { mut model, mut set } = prepare(shape, seq)?;
    let mut attached = set.remove(&mut model, "bench")?;
    let config = recipe.dynamics_config()?;
    let fitted = config.fit(&mut Fit { recipe: &recipe, model: &mut model, attached: &attached })?;
    attached.parameters.train_only(|p| fitted.trains(p));
    let parameters = attached.parameters.clone();
    set.add("bench", attached)?;
    set.activate(&mut model, &[("bench", 1.0)])?;
    let ids = tokens(batch * seq, shape.vocab);
    let data = Batch {
        rows: batch,
        cols: seq,
        labels: ids.iter().map(|id| *id as i32).collect(),
        ids,
        positions: (0..batch).flat_map(|_| 0..seq as u32).collect(),
        segments: vec![0; batch * seq],
        ..Batch::default()
    };
    let targets = Causal.targets(&data)?;
    let variables = parameters.trainable().map(|p| Ok((p.name.clone(), p.var()?))).collect::<Result<Vec<_>>>()?;
    let attached = set.get("bench")?;
    let mut dynamics = config.fit(&mut Fit { recipe: &recipe, model: &mut model, attached })?;
    let factors = parameters.trainable().map(|p| dynamics.factor(p)).collect();
    let mut optimizer = Optimizer::new(&recipe, variables, factors)?;
    let mut gradients = Gradients::new(&parameters);
    let total = warmup + steps;
    macro_rules! moving {
        ($step:expr) => {
            &mut Moving {
                model: &mut model,
                attached,
                parameters: &parameters,
                optimizer: &mut optimizer,
                step: $step,
                total,
                seed: 0,
            }
        };
    }
    dynamics.begin(moving!(0))?;
    dynamics.enter(moving!(0))?;
    let (mut times, mut losses, mut first, mut early_peak_mib) = (Vec::new(), Vec::new(), 0.0, 0);
    let tenth = (steps - 1) / 10;
    for i in 0..warmup + steps {
        let began = Instant::now();
        gradients.clear();
        dynamics.before(moving!(i))?;
        let start = Start::of(&model, &parameters, |p| dynamics.asleep(p).is_none());
        let scale = 1.0 / targets.weight() as f64;
        let flow = dynamics.flow(Flow::train(0, i as u64, 0), i, 0);
        let loss = tape::accumulate(&model, &data, &targets, &flow, start, (scale, checkpointing), &mut gradients)?;
        let rates = Rates { lr: recipe.lr * dynamics.rate(i), scale: 1.0 };
        dynamics.gradients(moving!(i), gradients.sums_mut(), rates)?;
        dynamics.update(moving!(i), gradients.sums(), rates)?;
        dynamics.after(moving!(i + 1))?;
        losses.push(loss.value()? * scale);
        model.device().synchronize()?;
        if i == 0 {
            first = crate::process_seconds();
        }
        if i >= warmup {
            times.push(began.elapsed().as_secs_f64());
        }
        if i == warmup + tenth {
            early_peak_mib = peak_mib(model.device())?;
        }
    }
    let middle = |times: &[f64]| {
        let mut times = times.to_vec();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let (early_s, late_s) = (middle(&times[..=tenth]), middle(&times[steps - 1 - tenth..]));
    let peak_mib = peak_mib(model.device())?;
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    let rate = matrix_rate(model.device(), model.dtype(), (batch * seq, shape.hidden, shape.ff))?;
    let flops = step_flops(shape, batch, seq);
    Ok(TrainReport {
        tool: "espalier",
        device: shape.device.clone(),
        dtype: shape.dtype.clone(),
        method: shape.method.clone(),
        dynamics: config.name().to_owned(),
        dora: shape.method == "dora",
        checkpointing,
        hidden: shape.hidden,
        layers: shape.layers,
        seq,
        batch,
        tokens_per_s: (batch * seq) as f64 / median,
        step_s: median,
        min_s: times.first().copied().unwrap_or_default(),
        max_s: times.last().copied().unwrap_or_default(),
        peak_mib,
        first_step_s: first,
        loss0: losses.first().copied().unwrap_or_default(),
        loss_last: losses.last().copied().unwrap_or_default(),
        early_s,
        late_s,
        early_peak_mib,
        matrix_gflops: rate,
        step_gflop: flops / 1e9,
        share_of_floor: flops / 1e9 / rate / median,
    })
}

/// Times generation with an adapter beside the base: `prompt` tokens in, `new_tokens` out, greedily, for one batch size, whose rows
/// go through `adapters` adapters in turn. What a generation sets up for its tokens counts as part of its prompt.
///
/// # Errors
/// If the shape is not valid.
pub fn generate(
    shape: &Shape,
    batch: usize,
    (prompt, new_tokens): (usize, usize),
    adapters: usize,
) -> Result<GenerateReport> {
    if batch == 0 || prompt == 0 || new_tokens == 0 || adapters == 0 {
        return Err(Error::recipe("bench", "batch, prompt, new tokens and adapters must be at least 1"));
    }
    let Setup { mut model, mut set, .. } = prepare(shape, prompt + new_tokens)?;
    let mut flow = Flow::eval();
    if adapters > 1 {
        let names: Vec<String> = (0..adapters).map(|i| i.to_string()).collect();
        for (seed, name) in (1..).zip(&names) {
            set.add(name, adapter(&mut model, shape, seed)?)?;
        }
        let wanted: Vec<_> = names.iter().map(|name| Some(name.as_str())).collect();
        set.activate_by_row(&mut model, &wanted)?;
        flow = Flow::by_row((0..batch).map(|row| row % adapters).collect::<Vec<_>>());
    }
    let (mut prefill, mut decode) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..3 {
        let mut cache = model.new_cache();
        let began = Instant::now();
        let input = TokenBatch::new(tokens(batch * prompt, shape.vocab), batch, prompt)?;
        let mut scores = model.advance(&input, &mut cache, &flow)?;
        let decoder = model.decoder(&cache, prompt + new_tokens, &flow)?;
        model.device().synchronize()?;
        prefill = prefill.min(began.elapsed().as_secs_f64());
        let began = Instant::now();
        if let Some(mut decoder) = decoder {
            let mut next = best(&scores)?;
            for _ in 0..new_tokens {
                next = decoder.step_greedy(Some(&next))?;
            }
            decode = decode.min(began.elapsed().as_secs_f64());
            continue;
        }
        for i in 0..new_tokens {
            let next: Vec<u32> = best(&scores)?;
            let input = TokenBatch::starting_at(next, batch, 1, prompt + i)?;
            scores = model.advance(&input, &mut cache, &flow)?;
        }
        model.device().synchronize()?;
        decode = decode.min(began.elapsed().as_secs_f64());
    }
    Ok(GenerateReport {
        tool: "espalier",
        device: shape.device.clone(),
        dtype: shape.dtype.clone(),
        batch,
        adapters,
        prompt,
        new_tokens,
        prefill_tokens_per_s: (batch * prompt) as f64 / prefill,
        decode_tokens_per_s: (batch * new_tokens) as f64 / decode,
        peak_mib: peak_mib(model.device())?,
    })
}

fn best(scores: &Tensor) -> Result<Vec<u32>> {
    Ok(scores.argmax(candle_core::D::Minus1)?.to_vec1::<u32>()?)
}
