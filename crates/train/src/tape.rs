//! Gradients block by block.
//!
//! Each block runs on a leaf of its own, so that its part of the tape can be walked, and dropped, by itself; below the
//! lowest trained block nothing is recorded. With checkpointing the block's part is not kept at all but made again when
//! its turn comes. The head runs in chunks of the rows that have a target, so that scores never exist for all of them.

use candle_core::{DType, Tensor, Var};
use espalier_adapters::{Flow, ParameterMap};
use espalier_data::Batch;
use espalier_kernels::part::Upstream;
use espalier_kernels::rows::{put_rows, take_rows};
use espalier_models::{Begun, BlockPass, Model, TokenBatch};

use crate::Result;
pub use crate::gradients::Gradients;
use crate::gradients::{add_to, seed};
use crate::objective::Targets;

/// Scores in memory at once, in values, on the CPU and on a device.
const HEAD_VALUES: [usize; 2] = [1 << 24, 1 << 26];

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
    /// The start for a model and those of the trainable parameters, by their place among them, that are `awake`.
    pub fn of(model: &Model, parameters: &ParameterMap, awake: impl Fn(usize) -> bool) -> Self {
        // What stands before the sequences reaches the first block.
        if model.virtual_tokens() > 0 {
            return Self::Embeddings;
        }
        let mut first = model.blocks();
        for (_, parameter) in parameters.trainable().enumerate().filter(|(i, _)| awake(*i)) {
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
pub(crate) enum Record {
    /// Through fused operations.
    Pass(BlockPass),
    /// Over the tape from the output to the leaf.
    Tape(Var, Tensor),
}

/// What is kept of a block until its turn comes.
pub(crate) enum Kept {
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

/// One pass over a micro-batch, taken block by block.
pub(crate) struct Pass<'a> {
    model: &'a Model,
    begun: Begun,
    flow: &'a Flow,
    start: Start,
    checkpointing: bool,
}

impl<'a> Pass<'a> {
    /// Begins with the vectors of the batch's tokens, and of what stands before them, off the tape.
    pub(crate) fn new(
        model: &'a Model,
        (batch, targets): (&Batch, &Targets),
        flow: &'a Flow,
        start: Start,
        checkpointing: bool,
    ) -> Result<(Self, Tensor)> {
        let input = token_batch(model, batch, targets.separator)?;
        let begun = model.begin(&input, flow)?;
        let x = begun.x.detach();
        Ok((Self { model, begun, flow, start, checkpointing }, x))
    }

    /// The first block that is recorded.
    pub(crate) fn first(&self) -> usize {
        match self.start {
            Start::Embeddings => 0,
            Start::Block(first) => first,
        }
    }

    fn record(&self, i: usize, x: &Tensor) -> Result<(Tensor, Record)> {
        if let Some((y, pass)) = self.model.block_pass(i, x, &self.begun.context, self.flow)? {
            return Ok((y, Record::Pass(pass)));
        }
        let leaf = Var::from_tensor(x)?;
        let y = self.model.block(i, leaf.as_tensor(), &self.begun.context, self.flow, None)?;
        Ok((y.detach(), Record::Tape(leaf, y)))
    }

    /// The output of block `i` for `x`, and what is kept of it: nothing below the first recorded block.
    pub(crate) fn forward(&self, i: usize, x: Tensor) -> Result<(Tensor, Option<Kept>)> {
        let pass_by = |x: &Tensor| -> Result<Tensor> {
            Ok(self.model.block(i, x, &self.begun.context, self.flow, None)?.detach())
        };
        Ok(match (i < self.first(), self.checkpointing) {
            (true, _) => (pass_by(&x)?, None),
            (false, true) => (pass_by(&x)?, Some(Kept::Input(x))),
            (false, false) => self.record(i, &x).map(|(y, way)| (y, Some(Kept::Record(way))))?,
        })
    }

    /// The head on the output of the last block: summed loss if there are targets, and the gradient of `x` where one is wanted.
    pub(crate) fn head(
        &self,
        x: &Tensor,
        targets: &Targets,
        scale: f64,
        gradients: &mut Gradients,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let needs_blocks = self.first() < self.model.blocks() || self.start == Start::Embeddings;
        head(self.model, x, &placed(targets, &self.begun)?, self.flow, scale, needs_blocks, gradients)
    }

    /// Goes back through block `i`: adds the gradients of its parameters, and gives that of its input where something below is
    /// trained; and whether the block was gone through operation by operation.
    pub(crate) fn back(
        &self,
        i: usize,
        kept: Kept,
        upstream: Upstream,
        gradients: &mut Gradients,
    ) -> Result<(Option<Upstream>, bool)> {
        let way = match kept {
            Kept::Record(way) => way,
            Kept::Input(x) => self.record(i, &x)?.1,
        };
        // Below the first recorded block nothing is trained.
        let wanted = i > self.first() || self.start == Start::Embeddings;
        Ok(match way {
            Record::Tape(leaf, y) => {
                let dx = gradients.add(&seed(&y, upstream.into())?, Some(leaf.as_tensor()))?;
                (dx.map(Upstream::from), true)
            }
            Record::Pass(pass) => {
                let (dx, parameters) = pass.backward(&upstream, wanted)?;
                for (flat, gradient) in parameters {
                    gradients.add_flat(&flat, &gradient)?;
                }
                (dx, false)
            }
        })
    }

    /// Goes back through the embeddings, where they are trained.
    pub(crate) fn end(self, upstream: Option<Upstream>, gradients: &mut Gradients) -> Result<()> {
        if let (Start::Embeddings, Some(upstream)) = (self.start, upstream) {
            gradients.add(&seed(&self.begun.x, upstream.into())?, None)?;
        }
        Ok(())
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
    let (pass, mut x) = Pass::new(model, (batch, targets), flow, start, checkpointing)?;
    let mut saved = Vec::with_capacity(model.blocks() - pass.first());
    for i in 0..model.blocks() {
        let (y, kept) = pass.forward(i, x)?;
        saved.extend(kept);
        x = y;
    }
    let (loss, dx) = pass.head(&x, targets, scale, gradients)?;
    drop(x);
    let mut dx = dx.map(Upstream::from);
    let (mut taped, recorded) = (0, saved.len());
    for (i, kept) in saved.into_iter().enumerate().rev() {
        let Some(upstream) = dx else { break };
        let (below, by_operation) = pass.back(pass.first() + i, kept, upstream, gradients)?;
        taped += usize::from(by_operation);
        dx = below;
    }
    pass.end(dx, gradients)?;
    Ok(Loss { sum: loss, taped: (taped, recorded) })
}

/// The head on the rows with a target, in chunks: summed loss if there are any, and the gradient of `x` [b, t, h] if wanted.
pub(crate) fn head(
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

/// Targets whose scores fit the bound.
pub(crate) fn scored_together(model: &Model) -> usize {
    let width = model.config().labels().unwrap_or(model.config().vocab).max(1);
    (HEAD_VALUES[usize::from(!model.device().is_cpu())] / width).max(1)
}

/// Targets in chunks whose scores fit the bound.
fn chunks<'a>(model: &Model, targets: &'a Targets) -> impl Iterator<Item = (&'a [u32], &'a [u32])> {
    let rows = scored_together(model);
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
    score(model, &x, targets, &flow)
}

/// Summed loss of the output `x` [b, t, h] of the last block, without gradients.
pub(crate) fn score(model: &Model, x: &Tensor, targets: &Targets, flow: &Flow) -> Result<f64> {
    let (b, t, h) = x.dims3()?;
    let flat = x.reshape((b * t, h))?;
    let mut sum = 0.0;
    for (places, labels) in chunks(model, targets) {
        let rows = flat.index_select(&Tensor::new(places, x.device())?, 0)?;
        sum += chunk_loss(model, &rows, labels, flow)?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
    }
    Ok(sum)
}
