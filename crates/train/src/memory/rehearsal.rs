//! The memory of a run told from a rehearsal: each kind of block, the head and the embeddings are gone through with a
//! few rows of the widest batch, the allocations counted, and the steps of the run put together from them.
//!
//! Nothing is assumed of a method or a model but that memory grows linearly with the rows of a batch.

use std::collections::HashMap;

use espalier_adapters::Flow;
use espalier_data::{Batch, Batcher};
use espalier_kernels::part::Upstream;

use super::counting::{Use, counted};
use crate::Result;
use crate::gradients::Gradients;
use crate::objective::Targets;
use crate::tape::{self, Pass, Start};
use crate::trainer::Run;

/// Bytes that the steps of a run take beyond what is in use before them.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Growth {
    /// What the blocks keep for the way back.
    pub(super) kept: f64,
    /// The most at once.
    pub(super) peak: f64,
}

/// What one kind of block takes.
#[derive(Debug, Clone, Copy, Default)]
struct Cost {
    forward: Use,
    back: Use,
}

impl Cost {
    fn extended(a: Self, b: Self, at: (f64, f64), n: f64) -> Self {
        Self { forward: Use::extended(a.forward, b.forward, at, n), back: Use::extended(a.back, b.back, at, n) }
    }
}

/// What the parts of a step take with some rows.
#[derive(Debug, Default)]
struct Costs {
    start: Use,
    blocks: HashMap<String, Cost>,
    end: Use,
}

/// The first `rows` rows of a batch.
fn first_rows(batch: &Batch, rows: usize) -> Batch {
    let places = rows * batch.cols;
    let classes = if batch.classes.len() == batch.rows { rows } else { batch.classes.len() };
    Batch {
        rows,
        ids: batch.ids[..places].to_vec(),
        labels: batch.labels[..places].to_vec(),
        positions: batch.positions[..places].to_vec(),
        segments: batch.segments[..places].to_vec(),
        classes: batch.classes[..classes].to_vec(),
        ..batch.clone()
    }
}

/// What tells blocks apart: whether they are recorded, and what is trained in them.
fn kinds(run: &Run, first: usize) -> Vec<String> {
    let mut kinds: Vec<String> =
        (0..run.model.blocks()).map(|i| if i < first { "-" } else { "+" }.to_owned()).collect();
    for parameter in run.parameters.trainable() {
        if let Some(block) = run.model.block_of(&parameter.name) {
            let (_, inside) = parameter.name.split_once(&format!(".{block}.")).unwrap_or_default();
            kinds[block] += &format!(" {inside} {:?}", parameter.tensor.dims());
        }
    }
    kinds
}

/// Bytes of the gradients of trained tensors, by block; the last one of those outside of all blocks.
fn gradient_bytes(run: &Run) -> Vec<f64> {
    let mut bytes = vec![0.0; run.model.blocks() + 1];
    for parameter in run.parameters.trainable() {
        let block = run.model.block_of(&parameter.name).unwrap_or(run.model.blocks());
        bytes[block] += (parameter.tensor.elem_count() * parameter.tensor.dtype().size_in_bytes()) as f64;
    }
    bytes
}

/// Goes once through each kind of block, forward and, where it is recorded, back.
fn costs(run: &Run, batch: &Batch, flow: &Flow, start: Start, checkpointing: bool) -> Result<Costs> {
    let targets = run.objective.targets(batch)?;
    let (pass, start_use) = counted(|| Pass::new(&run.model, (batch, &targets), flow, start, checkpointing));
    let (pass, x) = pass?;
    let mut costs = Costs { start: start_use, ..Costs::default() };
    for (i, kind) in kinds(run, pass.first()).into_iter().enumerate() {
        if costs.blocks.contains_key(&kind) {
            continue;
        }
        // The next block's input is this one's output; here the input stays for the next kind.
        let (done, forward) = counted(|| pass.forward(i, x.clone()));
        let (y, kept) = done?;
        let mut cost = Cost { forward, back: Use::default() };
        if let Some(kept) = kept {
            let mut gradients = Gradients::new(&run.parameters);
            let upstream = Upstream::from(y.zeros_like()?);
            drop(y);
            let (done, back) = counted(|| pass.back(i, kept, upstream, &mut gradients));
            done?;
            cost.back = back;
        }
        costs.blocks.insert(kind, cost);
    }
    if start == Start::Embeddings {
        let mut gradients = Gradients::new(&run.parameters);
        let upstream = Upstream::from(x.zeros_like()?);
        drop(x);
        let (done, end) = counted(|| pass.end(Some(upstream), &mut gradients));
        done?;
        costs.end = end;
    }
    Ok(costs)
}

/// Places of a batch that are enough to tell how memory grows.
const ENOUGH: usize = 256;

/// The same for a batch of which only a few rows are gone through.
fn costs_of(run: &Run, batch: &Batch, flow: &Flow, start: Start, checkpointing: bool) -> Result<Costs> {
    let few = ENOUGH.div_ceil(batch.cols.max(1)).max(1);
    // Once for what is made at first use and then kept.
    costs(run, &first_rows(batch, batch.rows.min(2 * few)), flow, start, checkpointing)?;
    if batch.rows <= 2 * few {
        return costs(run, batch, flow, start, checkpointing);
    }
    let one = costs(run, &first_rows(batch, few), flow, start, checkpointing)?;
    let two = costs(run, &first_rows(batch, 2 * few), flow, start, checkpointing)?;
    let (at, n) = ((few as f64, 2.0 * few as f64), batch.rows as f64);
    let block = |(kind, a): (String, Cost)| {
        let b = two.blocks.get(&kind).copied().unwrap_or(a);
        (kind, Cost::extended(a, b, at, n))
    };
    Ok(Costs {
        start: Use::extended(one.start, two.start, at, n),
        blocks: one.blocks.into_iter().map(block).collect(),
        end: Use::extended(one.end, two.end, at, n),
    })
}

/// What the head takes on a whole batch, told from shares of the targets that it scores at once.
fn head(run: &Run, targets: &Targets, go: impl Fn(&Targets) -> Result<()>) -> Result<Use> {
    let together = tape::scored_together(&run.model).min(targets.weight());
    let share = |n: usize| Targets {
        places: targets.places[..n].to_vec(),
        labels: targets.labels[..n].to_vec(),
        ..targets.clone()
    };
    let (small, large) = (together.div_ceil(4), together.div_ceil(2));
    let with = |n: usize| -> Result<Use> {
        let targets = share(n);
        let (done, cost) = counted(|| go(&targets));
        done.map(|()| cost)
    };
    if small == large {
        return with(together);
    }
    Ok(Use::extended(with(small)?, with(large)?, (small as f64, large as f64), together as f64))
}

/// The widest batch of the first epoch.
fn widest(batcher: &Batcher) -> Result<Option<Batch>> {
    Ok(batcher.widest(0)?.map(|index| batcher.batch(0, index)).transpose()?)
}

/// What the steps take: accumulation, optimiser and evaluation, where parameters, gradients and all that is kept of them take
/// `moved` bytes. None without a batch.
pub(super) fn growth(run: &Run, moved: u64) -> Result<Option<Growth>> {
    let Some(batch) = widest(&run.data.train)? else { return Ok(None) };
    let trained: f64 = gradient_bytes(run).iter().sum();
    // What the optimiser and the dynamics keep, in f32, is there before the first step.
    let moments = moved.saturating_sub(8 * run.parameters.trainable_count() as u64) as f64;
    let step = step(run, &batch)?;
    let optimise = trained + optimiser(run);
    let evaluate = match &run.data.eval {
        Some(eval) => evaluation(run, eval)?,
        None => 0.0,
    };
    Ok(Some(Growth { kept: step.kept, peak: moments + step.peak.max(optimise).max(evaluate) }))
}

/// One step's gradients.
fn step(run: &Run, batch: &Batch) -> Result<Growth> {
    let recipe = &run.recipe;
    let start = Start::of(&run.model, &run.parameters, |_| true);
    let flow = Flow::train(recipe.seed, 0, 0);
    let costs = costs_of(run, batch, &flow, start, recipe.checkpointing)?;
    let targets = run.objective.targets(batch)?;
    let (pass, x) = Pass::new(&run.model, (batch, &targets), &flow, start, false)?;
    let head = head(run, &targets, |targets| {
        let mut gradients = Gradients::new(&run.parameters);
        pass.head(&x, targets, 1.0, &mut gradients).map(|_| ())
    })?;
    // What the head leaves on its way back: a gradient like its input.
    let upstream = (x.elem_count() * x.dtype().size_in_bytes()) as f64;
    let gradients = gradient_bytes(run);
    // From the second micro-batch on, all sums of gradients are there from the beginning.
    let several = recipe.accumulation > 1;
    let all: f64 = gradients.iter().sum();
    let mut now = if several { all } else { 0.0 };
    let mut growth = Growth::default();
    let mut take = |cost: Use, now: &mut f64| {
        growth.peak = growth.peak.max(*now + cost.peak);
        *now += cost.kept;
    };
    take(costs.start, &mut now);
    let kinds = kinds(run, pass.first());
    let of = |i: usize| costs.blocks.get(&kinds[i]).copied().unwrap_or_default();
    for i in 0..run.model.blocks() {
        let mut cost = of(i).forward;
        if i < pass.first() {
            // The input goes when the output is there.
            cost.kept = if i == 0 { cost.kept } else { 0.0 };
        }
        growth.kept += cost.kept;
        take(cost, &mut now);
    }
    let own = gradients[run.model.blocks()];
    take(Use { kept: upstream + if several { 0.0 } else { own }, peak: head.peak }, &mut now);
    for i in (pass.first()..run.model.blocks()).rev() {
        let mut cost = of(i).back;
        if several {
            cost.kept -= gradients[i];
        }
        take(cost, &mut now);
    }
    take(costs.end, &mut now);
    Ok(growth)
}

/// The optimiser's step beyond gradients and moments: parameter, gradient and both moments of one tensor at a time.
fn optimiser(run: &Run) -> f64 {
    let largest = run.parameters.trainable().map(|p| p.tensor.elem_count()).max().unwrap_or(0);
    16.0 * largest as f64
}

/// An evaluation.
fn evaluation(run: &Run, eval: &Batcher) -> Result<f64> {
    let Some(batch) = widest(eval)? else { return Ok(0.0) };
    let flow = Flow::eval();
    let start = Start::Block(run.model.blocks());
    let costs = costs_of(run, &batch, &flow, start, false)?;
    let targets = run.objective.targets(&batch)?;
    let (_pass, x) = Pass::new(&run.model, (&batch, &targets), &flow, start, false)?;
    let head = head(run, &targets, |targets| tape::score(&run.model, &x, targets, &flow).map(|_| ()))?;
    let width = (x.elem_count() * x.dtype().size_in_bytes()) as f64;
    let blocks = costs.blocks.values().map(|cost| cost.forward.peak).fold(0.0, f64::max);
    Ok(costs.start.peak.max(costs.start.kept + width + blocks.max(head.peak)))
}
