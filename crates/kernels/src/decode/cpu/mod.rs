//! A whole step on the CPU: activations and cache in f32, weights from whatever they are stored in.

mod product;

use super::{DecoderBlock, DecoderPlan};
use crate::activation::{Activation, cpu as act};
use crate::frozen::FrozenWeight;
use crate::norm::cpu::Normaliser;
use crate::parallel;
use crate::part::{AttentionPart, PartNorm, Projection};
use crate::vector::{axpy, exp_in_place, max, scale};
use candle_core::{DType, Device, Result, Tensor, bail};
use product::Product;
use std::sync::Arc;

/// Rows from which on panels beat dot products.
const ROWS: usize = 32;

/// Keys [rows, kv, d, capacity] and values [rows, kv, capacity, d] of a block.
struct Cache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

struct Block {
    part: Arc<AttentionPart>,
    norms: [Option<Normaliser>; 2],
    residual: [bool; 2],
    qkv: Product,
    o: Product,
    inputs: Product,
    down: Product,
    activation: Activation,
    gated: bool,
    cache: Cache,
}

/// Rows that go on token by token.
pub(super) struct Steps {
    blocks: Vec<Block>,
    table: Tensor,
    norm: Option<Normaliser>,
    head: Product,
    /// Cosines and sines [capacity, half].
    rotary: (Vec<f32>, Vec<f32>),
    half: usize,
    /// Places at the start of each row that are padding, and the set of adapters of each row.
    padding: Vec<usize>,
    sets: Vec<usize>,
    length: usize,
    capacity: usize,
    /// The last step's scores [rows, vocabulary], and what they choose.
    scores: Vec<f32>,
    chosen: Vec<u32>,
}

fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

fn flat(parameters: &Option<Tensor>) -> Result<Vec<f32>> {
    parameters.as_ref().map_or(Ok(Vec::new()), values)
}

impl Block {
    /// None where a set of adapters changes more than the factors beside the weights, or its gains must be computed first.
    fn new(sets: &[&DecoderBlock], (m, capacity): (usize, usize)) -> Result<Option<Self>> {
        let (a, f) = (&sets[0].attention, &sets[0].feed_forward);
        let same = |x: &FrozenWeight, y: &FrozenWeight| std::ptr::eq(x, y);
        let weights = |b: &DecoderBlock| {
            let maps = b.attention.inputs.iter().chain([&b.attention.output]);
            let maps = maps.chain(&b.feed_forward.inputs).chain([&b.feed_forward.output]);
            maps.map(|p| p.weight.clone()).collect::<Vec<_>>()
        };
        let own = weights(sets[0]);
        let over_norms = |b: &&DecoderBlock| {
            let (a, f) = (&b.attention, &b.feed_forward);
            let maps = a.inputs.iter().chain([&a.output]).chain(&f.inputs).chain([&f.output]);
            maps.into_iter().any(Projection::needs_norms)
        };
        if sets.iter().any(over_norms) {
            return Ok(None);
        }
        if !sets.iter().all(|set| weights(set).iter().zip(&own).all(|(x, y)| same(x, y))) || !a.spec.causal {
            return Ok(None);
        }
        let attention = sets.iter().map(|s| flat(&s.attention_parameters)).collect::<Result<Vec<_>>>()?;
        let feed = sets.iter().map(|s| flat(&s.feed_forward_parameters)).collect::<Result<Vec<_>>>()?;
        let (mut qkv, mut o, mut inputs, mut down) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for set in sets {
            let (first, second) = set.attention.groups();
            qkv.push(first);
            o.push(second);
            let (first, second) = set.feed_forward.groups();
            inputs.push(first);
            down.push(second);
        }
        let attention: Vec<&[f32]> = attention.iter().map(Vec::as_slice).collect();
        let feed: Vec<&[f32]> = feed.iter().map(Vec::as_slice).collect();
        let (qkv, o) = (Product::of(&qkv, &attention)?, Product::of(&o, &attention)?);
        let (inputs, down) = (Product::of(&inputs, &feed)?, Product::of(&down, &feed)?);
        let (kv, d, length) = (a.kv_heads, a.head_dim, sets[0].keys.dim(1)?);
        let fits = qkv.d_out() == (a.heads + 2 * kv) * d
            && o.d_in() == a.heads * d
            && inputs.d_out() == if f.gated { 2 } else { 1 } * down.d_in()
            && [o.d_out(), inputs.d_in(), down.d_out()] == [qkv.d_in(); 3]
            && [&sets[0].keys, &sets[0].values].iter().all(|t| t.dims() == [m, length, kv, d]);
        if !fits {
            bail!("decoder: keys {:?} or products that do not follow one another", sets[0].keys.dims())
        }
        let room = || vec![0f32; m * kv * capacity * d];
        let mut cache = Cache { keys: room(), values: room() };
        let (keys, rows) = (values(&sets[0].keys)?, values(&sets[0].values)?);
        for (at, (key, value)) in keys.chunks_exact(d).zip(rows.chunks_exact(d)).enumerate() {
            let (row, place, head) = (at / kv / length, at / kv % length, at % kv);
            cache.put((row * kv + head, place), (key, value), capacity);
        }
        Ok(Some(Self {
            part: a.clone(),
            norms: [PartNorm::normaliser(a.norm.as_ref())?, PartNorm::normaliser(f.norm.as_ref())?],
            residual: [a.residual, f.residual],
            qkv,
            o,
            inputs,
            down,
            activation: f.activation,
            gated: f.gated,
            cache,
        }))
    }
}

impl Cache {
    fn put(&mut self, (at, place): (usize, usize), (key, value): (&[f32], &[f32]), capacity: usize) {
        let d = key.len();
        let keys = &mut self.keys[at * d * capacity..][..d * capacity];
        keys.iter_mut().skip(place).step_by(capacity).zip(key).for_each(|(to, from)| *to = *from);
        self.values[(at * capacity + place) * d..][..d].copy_from_slice(value);
    }
}

/// The rows after the norm.
fn normed(norm: &Option<Normaliser>, x: &[f32]) -> Vec<f32> {
    norm.as_ref().map_or_else(|| x.to_vec(), |norm| norm.forward::<f32>(x))
}

impl Steps {
    pub(super) fn new(plan: &DecoderPlan) -> Result<Option<Self>> {
        let m = plan.padding.len();
        if !plan.table.device().is_cpu() || !(1..=ROWS).contains(&m) || plan.blocks.is_empty() {
            return Ok(None);
        }
        let all: Vec<&[DecoderBlock]> = std::iter::once(&plan.blocks).chain(&plan.others).map(Vec::as_slice).collect();
        let sets = plan.sets.clone().unwrap_or_else(|| vec![0; m]);
        if sets.len() != m
            || sets.iter().any(|set| *set >= all.len())
            || all.iter().any(|s| s.len() != plan.blocks.len())
        {
            bail!("decoder: sets {sets:?} of {} for {m} rows", all.len())
        }
        let mut blocks = Vec::with_capacity(plan.blocks.len());
        for i in 0..plan.blocks.len() {
            let of_sets: Vec<&DecoderBlock> = all.iter().map(|set| &set[i]).collect();
            let Some(block) = Block::new(&of_sets, (m, plan.capacity))? else { return Ok(None) };
            blocks.push(block);
        }
        let length = plan.blocks[0].keys.dim(1)?;
        let (_, h) = plan.table.dims2()?;
        let (rows, half) = plan.rotary.0.dims2()?;
        let head = Product::plain(&plan.head);
        let turned = rows >= plan.capacity
            && plan.rotary.1.dims() == plan.rotary.0.dims()
            && blocks.iter().all(|b| 2 * half <= b.part.head_dim);
        if head.d_in() != h || blocks[0].qkv.d_in() != h || !turned || length > plan.capacity {
            bail!(
                "decoder: a table {:?}, a head of {}, rotations [{rows}, {half}], {length} of {} places",
                plan.table.dims(),
                head.d_in(),
                plan.capacity
            )
        }
        Ok(Some(Self {
            blocks,
            table: plan.table.detach(),
            norm: PartNorm::normaliser(Some(&plan.norm))?,
            head,
            rotary: (values(&plan.rotary.0)?, values(&plan.rotary.1)?),
            half,
            padding: plan.padding.iter().map(|p| *p as usize).collect(),
            sets,
            length,
            capacity: plan.capacity,
            scores: Vec::new(),
            chosen: vec![0; m],
        }))
    }

    pub(super) fn rows(&self) -> usize {
        self.sets.len()
    }

    pub(super) fn room(&self) -> usize {
        self.capacity - self.length
    }

    pub(super) fn step(&mut self, ids: Option<&[u32]>) -> Result<()> {
        let (m, (vocab, h)) = (self.rows(), self.table.dims2()?);
        let ids = ids.unwrap_or(&self.chosen);
        if self.length == self.capacity {
            bail!("decoder: the rows are full")
        }
        if ids.len() != m {
            bail!("decoder: {} tokens for {m} rows", ids.len())
        }
        let mut x = Vec::with_capacity(m * h);
        for id in ids {
            if *id as usize >= vocab {
                bail!("decoder: token id {id} is outside the vocabulary of {vocab}")
            }
            x.extend(values(&self.table.narrow(0, *id as usize, 1)?)?);
        }
        for i in 0..self.blocks.len() {
            let qkv = self.blocks[i].qkv.run(&normed(&self.blocks[i].norms[0], &x), &self.sets)?;
            let attended = self.attend(i, qkv);
            let block = &self.blocks[i];
            add(&mut x, block.o.run(&attended, &self.sets)?, block.residual[0]);
            let rows = normed(&block.norms[1], &x);
            let inner = if block.gated {
                let kind = block.activation;
                block.inputs.run_gated(&rows, &self.sets, |gate, up, y| act::gated_values(kind, gate, up, y))?
            } else {
                act::activated::<f32>(block.activation, &block.inputs.run(&rows, &self.sets)?)
            };
            add(&mut x, block.down.run(&inner, &self.sets)?, block.residual[1]);
        }
        self.scores = self.head.run(&normed(&self.norm, &x), &vec![0; m])?;
        self.chosen = self.scores.chunks_exact(vocab).map(best).collect();
        self.length += 1;
        Ok(())
    }

    /// Appends the new token's keys and values, and gives the attention of its queries [m, heads d].
    fn attend(&mut self, block: usize, mut qkv: Vec<f32>) -> Vec<f32> {
        let (place, capacity, half) = (self.length, self.capacity, self.half);
        let Block { part, cache, .. } = &mut self.blocks[block];
        let (heads, kv, d) = (part.heads, part.kv_heads, part.head_dim);
        let (group, width) = (heads / kv, (heads + 2 * kv) * d);
        for (row, qkv) in qkv.chunks_exact_mut(width).enumerate() {
            let at = (place - self.padding[row]) * half;
            let (cos, sin) = (&self.rotary.0[at..][..half], &self.rotary.1[at..][..half]);
            for head in qkv[..(heads + kv) * d].chunks_exact_mut(d) {
                let (low, high) = head.split_at_mut(half);
                for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                    (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
                }
            }
            for head in 0..kv {
                let from = |first: usize| &qkv[(first + head) * d..][..d];
                cache.put((row * kv + head, place), (from(heads), from(heads + kv)), capacity);
            }
        }
        let mut out = vec![0f32; self.sets.len() * heads * d];
        let (spec, cache, padding) = (&part.spec, &*cache, &self.padding);
        let work = out.len() * (place + 1) / 4;
        parallel::chunks(&mut out, group * d, work, |at, out| {
            let (row, head) = (at / kv, at % kv);
            let seen = spec.window.map_or(0, |w| (place + 1).saturating_sub(w));
            let first = padding[row].max(seen);
            let keys = &cache.keys[at * d * capacity..][..d * capacity];
            let rows = &cache.values[at * d * capacity..][..d * capacity];
            let queries = &qkv[row * width + head * group * d..][..group * d];
            let mut scores = vec![0f32; place + 1 - first];
            for (q, out) in queries.chunks_exact(d).zip(out.chunks_exact_mut(d)) {
                scores.fill(0.0);
                for (q, key) in q.iter().zip(keys.chunks_exact(capacity)) {
                    axpy(q * spec.scale as f32, &key[first..=place], &mut scores);
                }
                if let Some(cap) = spec.softcap {
                    let cap = cap as f32;
                    scores.iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
                }
                let shift = max(&scores);
                let total = exp_in_place(&mut scores, shift);
                for (p, value) in scores.iter().zip(rows[first * d..].chunks_exact(d)) {
                    axpy(*p, value, out);
                }
                scale(1.0 / total, out);
            }
        });
        out
    }

    /// A copy of the last step's scores.
    pub(super) fn scores(&self) -> Result<Tensor> {
        Tensor::from_slice(&self.scores, (self.rows(), self.table.dim(0)?), &Device::Cpu)
    }

    pub(super) fn best(&self) -> Result<Vec<u32>> {
        Ok(self.chosen.clone())
    }

    /// Keeps only the given rows, in their order.
    pub(super) fn keep_rows(&mut self, rows: &[usize]) {
        let keep = |values: &mut Vec<f32>, each: usize| {
            *values = rows.iter().flat_map(|row| values[row * each..][..each].iter().copied()).collect();
        };
        for block in &mut self.blocks {
            let each = block.part.kv_heads * block.part.head_dim * self.capacity;
            keep(&mut block.cache.keys, each);
            keep(&mut block.cache.values, each);
        }
        self.padding = rows.iter().map(|row| self.padding[*row]).collect();
        self.sets = rows.iter().map(|row| self.sets[*row]).collect();
        self.chosen = rows.iter().map(|row| self.chosen[*row]).collect();
    }
}

/// x <- y, or x + y.
fn add(x: &mut Vec<f32>, y: Vec<f32>, residual: bool) {
    if residual { axpy(1.0, &y, x) } else { *x = y }
}

/// The first of the largest scores; `u32::MAX` if one is no number or infinite, or all are minus infinity.
fn best(scores: &[f32]) -> u32 {
    let mut top = (f32::NEG_INFINITY, u32::MAX);
    for (id, score) in scores.iter().enumerate() {
        if score.is_nan() || *score == f32::INFINITY {
            return u32::MAX;
        }
        if *score > top.0 {
            top = (*score, id as u32);
        }
    }
    top.1
}
