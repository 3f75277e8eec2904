//! Gradients block by block.
//!
//! Each block runs on a leaf of its own, so that its part of the tape can be walked, and dropped, by itself; below the
//! lowest trained block nothing is recorded. With checkpointing the block's part is not kept at all but made again when
//! its turn comes. The head runs in chunks of the rows that have a target, so that scores never exist for all of them.

use std::collections::HashMap;

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Shape, Tensor, TensorId, Var};
use espalier_adapters::attach::Attached;
use espalier_adapters::projected::FlatParameters;
use espalier_adapters::{Flow, ParameterMap, auxiliary};
use espalier_data::Batch;
use espalier_kernels::part::Upstream;
use espalier_kernels::rows::{put_rows, take_rows};
use espalier_models::{Begun, BlockPass, Model, TokenBatch};

use crate::Result;
use crate::objective::Targets;

/// Scores in memory at once, in values, on the CPU and on a device.
const HEAD_VALUES: [usize; 2] = [1 << 24, 1 << 26];

/// Sums of gradients, in the order of the trainable parameters.
#[derive(Debug)]
pub struct Gradients {
    order: HashMap<TensorId, usize>,
    tensors: Vec<Tensor>,
    sums: Vec<Option<Tensor>>,
}

impl Gradients {
    /// No gradients yet for the trainable ones among `parameters`.
    pub fn new(parameters: &ParameterMap) -> Self {
        let tensors: Vec<Tensor> = parameters.trainable().map(|p| p.tensor.clone()).collect();
        let order = tensors.iter().enumerate().map(|(i, t)| (t.id(), i)).collect();
        let sums = vec![None; tensors.len()];
        Self { order, tensors, sums }
    }

    /// The sums, in order; None where nothing flowed.
    pub fn sums(&self) -> &[Option<Tensor>] {
        &self.sums
    }

    /// Where nothing flowed to the `index`-th parameter, its sum becomes 0; whether that was so.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn fill(&mut self, index: usize) -> Result<bool> {
        let (Some(sum @ None), Some(tensor)) = (self.sums.get_mut(index), self.tensors.get(index)) else {
            return Ok(false);
        };
        *sum = Some(tensor.detach().zeros_like()?);
        Ok(true)
    }

    /// Forgets all sums.
    pub fn clear(&mut self) {
        self.sums.iter_mut().for_each(|s| *s = None);
    }

    /// Adds the gradients of `loss` (a scalar) and gives that of `leaf`.
    fn add(&mut self, loss: &Tensor, leaf: Option<&Tensor>) -> Result<Option<Tensor>> {
        let mut grads = loss.backward()?;
        for (id, index) in &self.order {
            if let Some(gradient) = grads.get_id(*id) {
                add_to(&mut self.sums[*index], gradient.detach())?;
            }
        }
        debug_assert_eq!(self.order.len(), self.tensors.len());
        Ok(leaf.and_then(|leaf| grads.remove(leaf)).map(|g| g.detach()))
    }

    /// Adds the gradient of a fused operation's parameters: to a trained tensor itself, over the tape to what it was made of.
    fn add_flat(&mut self, flat: &FlatParameters, gradient: &Tensor) -> Result<()> {
        for (part, gradient) in flat.split(gradient)? {
            match self.order.get(&part.id()) {
                Some(index) => add_to(&mut self.sums[*index], gradient)?,
                None if part.track_op() => drop(self.add(&seed(part, gradient)?, None)?),
                None => {}
            }
        }
        Ok(())
    }
}

/// Adds to a sum that may not have begun.
fn add_to(sum: &mut Option<Tensor>, gradient: Tensor) -> Result<()> {
    *sum = Some(match sum.take() {
        Some(sum) => (sum + gradient)?,
        None => gradient,
    });
    Ok(())
}

/// The input of a model for a batch of data. Padding on the right needs no mask where tokens see only what is before them.
/// With a `separator`, tokens after a row's first one have segment type 1.
///
/// # Errors
/// If the batch is not rectangular.
pub fn token_batch(model: &Model, batch: &Batch, separator: Option<u32>) -> Result<TokenBatch> {
    let causal = model.config().causal;
    let plain = batch.segments.iter().all(|s| *s == 0 || (causal && *s == espalier_data::PADDING));
    let token_types = separator.map(|separator| {
        let types = |row: &[u32]| {
            let first = row.iter().position(|id| *id == separator).unwrap_or(row.len());
            (0..row.len()).map(move |i| u32::from(i > first)).collect::<Vec<_>>()
        };
        batch.ids.chunks(batch.cols.max(1)).flat_map(types).collect()
    });
    let input = TokenBatch {
        batch: batch.rows,
        length: batch.cols,
        ids: batch.ids.clone(),
        positions: batch.positions.clone(),
        segments: (!plain).then(|| batch.segments.clone()),
        token_types,
    };
    input.check()?;
    Ok(input)
}

/// Where recording starts: the first stage that holds or follows a trained parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Embeddings are trained.
    Embeddings,
    /// This block is the first trained one; the number of blocks if only the head is.
    Block(usize),
}

impl Start {
    /// The start for a model and the parameters that are trained.
    pub fn of(model: &Model, parameters: &ParameterMap) -> Self {
        // What stands before the sequences reaches the first block.
        if model.virtual_tokens() > 0 {
            return Self::Embeddings;
        }
        let mut first = model.blocks();
        for parameter in parameters.trainable() {
            if model.is_before_blocks(&parameter.name) {
                return Self::Embeddings;
            }
            if let Some(block) = model.block_of(&parameter.name) {
                first = first.min(block);
            }
        }
        Self::Block(first)
    }
}

/// The targets where their scores are read once virtual tokens stand between.
fn placed(targets: &Targets, begun: &Begun) -> Result<Targets> {
    let places = targets.places.iter().map(|place| Ok(begun.place(*place)?)).collect::<Result<_>>()?;
    Ok(Targets { places, ..targets.clone() })
}

/// The way back through one block.
enum Record {
    /// Through fused operations.
    Pass(BlockPass),
    /// Over the tape from the output to the leaf.
    Tape(Var, Tensor),
}

/// What is kept of a block until its turn comes.
enum Kept {
    /// The way back.
    Record(Record),
    /// Its input, to run it again.
    Input(Tensor),
}

/// A summed loss that a device may still be computing.
#[derive(Debug, Clone)]
#[must_use]
pub struct Loss {
    sum: Option<Tensor>,
    /// Blocks gone back through operation by operation, and all.
    pub taped: (usize, usize),
}

impl Loss {
    /// Its value; waits for the device.
    ///
    /// # Errors
    /// If the device failed.
    pub fn value(&self) -> Result<f64> {
        Ok(match &self.sum {
            Some(loss) => loss.to_scalar::<f64>()?,
            None => 0.0,
        })
    }
}

/// One pass over a micro-batch: adds `scale` times the gradient of the summed loss, and gives the summed loss.
///
/// # Errors
/// If the batch does not fit the model.
pub fn accumulate(
    model: &Model,
    batch: &Batch,
    targets: &Targets,
    flow: &Flow,
    start: Start,
    (scale, checkpointing): (f64, bool),
    gradients: &mut Gradients,
) -> Result<Loss> {
    let input = token_batch(model, batch, targets.separator)?;
    let begun = model.begin(&input, flow)?;
    let targets = &placed(targets, &begun)?;
    let Begun { x: embedded, context, .. } = begun;
    let mut x = embedded.detach();
    let first = match start {
        Start::Embeddings => 0,
        Start::Block(first) => first,
    };
    let record = |i: usize, x: &Tensor| -> Result<(Tensor, Record)> {
        if let Some((y, pass)) = model.block_pass(i, x, &context, flow)? {
            return Ok((y, Record::Pass(pass)));
        }
        let leaf = Var::from_tensor(x)?;
        let y = model.block(i, leaf.as_tensor(), &context, flow, None)?;
        Ok((y.detach(), Record::Tape(leaf, y)))
    };
    let pass_by = |i: usize, x: &Tensor| -> Result<Tensor> { Ok(model.block(i, x, &context, flow, None)?.detach()) };
    let mut saved = Vec::with_capacity(model.blocks() - first);
    for i in 0..model.blocks() {
        let (y, kept) = match (i < first, checkpointing) {
            (true, _) => (pass_by(i, &x)?, None),
            (false, true) => (pass_by(i, &x)?, Some(Kept::Input(x))),
            (false, false) => record(i, &x).map(|(y, way)| (y, Some(Kept::Record(way))))?,
        };
        saved.extend(kept);
        x = y;
    }
    let needs_blocks = !saved.is_empty() || start == Start::Embeddings;
    let (loss, dx) = head(model, &x, targets, flow, scale, needs_blocks, gradients)?;
    let mut dx = dx.map(Upstream::from);
    let (mut taped, recorded) = (0, saved.len());
    for (i, kept) in saved.into_iter().enumerate().rev() {
        let Some(upstream) = dx else { break };
        let way = match kept {
            Kept::Record(way) => way,
            Kept::Input(x) => record(first + i, &x)?.1,
        };
        // Below the first recorded block nothing is trained.
        let wanted = i > 0 || start == Start::Embeddings;
        dx = match way {
            Record::Tape(leaf, y) => {
                taped += 1;
                gradients.add(&seed(&y, upstream.into())?, Some(leaf.as_tensor()))?.map(Upstream::from)
            }
            Record::Pass(pass) => {
                let (dx, parameters) = pass.backward(&upstream, wanted)?;
                for (flat, gradient) in parameters {
                    gradients.add_flat(&flat, &gradient)?;
                }
                dx
            }
        };
    }
    if let (Start::Embeddings, Some(upstream)) = (start, dx) {
        gradients.add(&seed(&embedded, upstream.into())?, None)?;
    }
    Ok(Loss { sum: loss, taped: (taped, recorded) })
}

/// Adds the gradients of what the adapter's layers ask of their parameters, each at its weight; the means by name, without it.
///
/// # Errors
/// If terms of one name have different weights.
pub fn penalize(adapter: &Attached, gradients: &mut Gradients) -> Result<Vec<(&'static str, f64)>> {
    let mut found = Vec::new();
    for mean in auxiliary::penalties(adapter)? {
        gradients.add(&mean.weighed()?, None)?;
        found.push((mean.name, mean.number()?));
    }
    Ok(found)
}

/// A scalar whose gradient for `y` is `upstream`; its value means nothing.
fn seed(y: &Tensor, upstream: Tensor) -> Result<Tensor> {
    if y.device().is_cpu() { Ok(y.apply_op1(Seed(upstream))?) } else { Ok((y * upstream)?.sum_all()?) }
}

/// Starts a walk over the tape at a tensor with a known gradient, without the product and the sum that would say the same.
struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

/// The head on the rows with a target, in chunks: summed loss if there are any, and the gradient of `x` [b, t, h] if wanted.
fn head(
    model: &Model,
    x: &Tensor,
    targets: &Targets,
    flow: &Flow,
    scale: f64,
    wants_dx: bool,
    gradients: &mut Gradients,
) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let (b, t, h) = x.dims3()?;
    let flat = x.reshape((b * t, h))?;
    let mut sum = None;
    let mut dx = wants_dx.then(|| flat.zeros_like()).transpose()?;
    for (places, labels) in chunks(model, targets) {
        let index = Tensor::new(places, x.device())?;
        let leaf = Var::from_tensor(&take_rows(&flat, &index)?)?;
        let loss = chunk_loss(model, leaf.as_tensor(), labels, flow)?;
        add_to(&mut sum, loss.detach().to_dtype(DType::F64)?)?;
        let d_rows = gradients.add(&(loss * scale)?, Some(leaf.as_tensor()))?;
        if let (Some(dx), Some(d_rows)) = (&mut dx, d_rows) {
            *dx = put_rows(dx, &index, &d_rows)?;
        }
    }
    Ok((sum, dx.map(|dx| dx.reshape((b, t, h))).transpose()?))
}

/// Targets in chunks whose scores fit the bound.
fn chunks<'a>(model: &Model, targets: &'a Targets) -> impl Iterator<Item = (&'a [u32], &'a [u32])> {
    let width = model.config().labels().unwrap_or(model.config().vocab).max(1);
    let rows = (HEAD_VALUES[usize::from(!model.device().is_cpu())] / width).max(1);
    targets.places.chunks(rows).zip(targets.labels.chunks(rows))
}

/// Summed cross-entropy of rows [n, h] against their labels, a scalar in f32 (f64 for an f64 model).
fn chunk_loss(model: &Model, rows: &Tensor, labels: &[u32], flow: &Flow) -> Result<Tensor> {
    Ok(model.losses(&model.finish(rows)?, labels, flow)?.sum_all()?)
}

/// Summed loss of a batch without gradients.
///
/// # Errors
/// If the batch does not fit the model.
pub fn evaluate(model: &Model, batch: &Batch, targets: &Targets) -> Result<f64> {
    let flow = Flow::eval();
    let input = token_batch(model, batch, targets.separator)?;
    let begun = model.begin(&input, &flow)?;
    let targets = &placed(targets, &begun)?;
    let Begun { x, context, .. } = begun;
    let mut x = x.detach();
    for i in 0..model.blocks() {
        x = model.block(i, &x, &context, &flow, None)?.detach();
    }
    let (b, t, h) = x.dims3()?;
    let flat = x.reshape((b * t, h))?;
    let mut sum = 0.0;
    for (places, labels) in chunks(model, targets) {
        let rows = flat.index_select(&Tensor::new(places, x.device())?, 0)?;
        sum += chunk_loss(model, &rows, labels, &flow)?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
    }
    Ok(sum)
}
