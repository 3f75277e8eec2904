//! A whole step: its phases, and the graph that launches it.

use super::attend::Heads;
use super::phase::{Phase, Rows, Step, Work, in_tiles};
use super::product::{Product, RowNorm, Use};
use super::{DecoderBlock, DecoderPlan, ROWS};
use crate::activation::Activation;
use crate::cuda::graph::Graph;
use crate::cuda::{Gpu, View, address};
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{DType, Result, Tensor, bail};
use half::bf16;
use std::sync::Arc;

/// The products of a block, and its cache.
struct Block {
    qkv: Product,
    o: Product,
    gate_up: Product,
    down: Product,
    heads: Heads,
    activation: Activation,
    keys: Tensor,
    values: Tensor,
}

impl Block {
    fn new(block: &DecoderBlock, (m, capacity): (usize, usize)) -> Result<Option<Self>> {
        let (a, f) = (&block.attention, &block.feed_forward);
        let heads = Heads {
            heads: a.heads,
            kv_heads: a.kv_heads,
            head_dim: a.head_dim,
            scale: a.spec.scale,
            window: a.spec.window,
        };
        let ordinary = a.residual && f.residual && f.gated && a.spec.causal && a.spec.softcap.is_none() && heads.fit();
        let (Some(before_attention), Some(before_mlp), true) = (&a.norm, &f.norm, ordinary) else { return Ok(None) };
        let (Some(n1), Some(n2)) = (RowNorm::of(before_attention)?, RowNorm::of(before_mlp)?) else { return Ok(None) };
        let ((qkv, o), (gate_up, down)) = (a.groups(), f.groups());
        let (pa, pf) = (block.attention_parameters.as_ref(), block.feed_forward_parameters.as_ref());
        let (Some(qkv), Some(o)) = (Product::of(&qkv, pa, Some(n1))?, Product::of(&o, pa, None)?) else {
            return Ok(None);
        };
        let (Some(gate_up), Some(down)) = (Product::of(&gate_up, pf, Some(n2))?, Product::of(&down, pf, None)?) else {
            return Ok(None);
        };
        let length = block.keys.dim(1)?;
        let fits = qkv.d_out() == (a.heads + 2 * a.kv_heads) * a.head_dim
            && o.d_in() == a.heads * a.head_dim
            && gate_up.d_out() == 2 * down.d_in()
            && [o.d_out(), gate_up.d_in(), down.d_out()] == [qkv.d_in(); 3]
            && [&block.keys, &block.values].iter().all(|t| t.dims() == [m, length, a.kv_heads, a.head_dim]);
        if !fits {
            bail!("decoder: keys {:?} or products that do not follow one another", block.keys.dims())
        }
        let room = |old: &Tensor| {
            let room = Tensor::zeros((m, capacity, a.kv_heads, a.head_dim), DType::BF16, old.device())?;
            room.slice_set(&old.detach().contiguous()?, 1, 0)?;
            Ok::<_, candle_core::Error>(room)
        };
        let (keys, values, activation) = (room(&block.keys)?, room(&block.values)?, f.activation);
        Ok(Some(Self { qkv, o, gate_up, down, heads, activation, keys, values }))
    }
}

/// Memory that the phases of a step leave their results in.
struct Space {
    ids: CudaSlice<u32>,
    places: CudaSlice<u32>,
    firsts: CudaSlice<u32>,
    x: CudaSlice<bf16>,
    /// x times the gain of the next norm; this and what else products read is in tiles.
    scaled: CudaSlice<bf16>,
    qkv: CudaSlice<bf16>,
    attended: CudaSlice<bf16>,
    inner: CudaSlice<bf16>,
    scores: Tensor,
}

/// A recorded step and all that it reads and writes.
pub(super) struct Steps {
    // Dropped first: the rest is what it reads.
    graph: Graph,
    _step: Step,
    gpu: Arc<Gpu>,
    space: Space,
    _beside: Vec<Tensor>,
    _blocks: Vec<Block>,
    _head: Product,
    _held: (Tensor, Tensor, Tensor),
    vocab: usize,
    rows: usize,
    room: usize,
}

impl Steps {
    pub(super) fn new(plan: &DecoderPlan) -> Result<Option<Self>> {
        let (m, table) = (plan.padding.len(), &plan.table);
        if !table.device().is_cuda() || table.dtype() != DType::BF16 || !(1..=ROWS).contains(&m) {
            return Ok(None);
        }
        let gpu = Gpu::of(table.device())?;
        let Some(norm) = RowNorm::of(&plan.norm)?.filter(|_| gpu.capability == 90) else { return Ok(None) };
        let Some(head) = Product::plain(&plan.head, Some(norm))? else { return Ok(None) };
        let mut blocks = Vec::with_capacity(plan.blocks.len());
        for block in &plan.blocks {
            let Some(block) = Block::new(block, (m, plan.capacity))? else { return Ok(None) };
            blocks.push(block);
        }
        let Some(first) = blocks.first() else { return Ok(None) };
        let length = plan.blocks.first().map_or(Ok(0), |b| b.keys.dim(1))?;
        let (vocab, h) = table.dims2()?;
        let rotated = plan.rotary.0.dims();
        let turned = rotated.len() == 2 && rotated[0] >= plan.capacity && 2 * rotated[1] <= first.heads.head_dim;
        if (head.d_out(), head.d_in()) != (vocab, h)
            || first.qkv.d_in() != h
            || !turned
            || plan.rotary.1.dims() != rotated
            || length > plan.capacity
        {
            bail!(
                "decoder: a table {:?}, a head [{}, {}], cosines {rotated:?} and sines {:?} for {length} of {} places",
                table.dims(),
                head.d_out(),
                head.d_in(),
                plan.rotary.1.dims(),
                plan.capacity
            )
        }
        let table = table.detach().contiguous()?;
        let (cos, sin) = (plan.rotary.0.contiguous()?, plan.rotary.1.contiguous()?);
        let widest = |width: fn(&Block) -> usize| blocks.iter().map(width).max().unwrap_or(0);
        let upload = |values: &[u32]| gpu.stream.clone_htod(values).w();
        let space = Space {
            ids: upload(&vec![0; m])?,
            places: upload(&vec![length as u32; m])?,
            firsts: upload(&plan.padding)?,
            x: gpu.alloc(m * h)?,
            scaled: gpu.alloc(in_tiles(m, h))?,
            qkv: gpu.alloc(m * widest(|b| b.qkv.d_out()))?,
            attended: gpu.alloc(in_tiles(m, widest(|b| b.o.d_in())))?,
            inner: gpu.alloc(in_tiles(m, widest(|b| b.down.d_in())))?,
            scores: gpu.tensor(gpu.alloc::<bf16>(m * vocab)?, &[m, vocab]),
        };
        let (phases, _beside) = phases(&gpu, &blocks, &head, &space, (&table, cos.dim(1)?), m)?;
        let by_row = Rows {
            ids: gpu.address(&space.ids),
            places: gpu.address(&space.places),
            firsts: gpu.address(&space.firsts),
            rotary: (address::<f32>(&cos)?, address::<f32>(&sin)?),
        };
        let Some(step) = Step::new(&gpu, m, &phases, &by_row)? else { return Ok(None) };
        let graph = Graph::record(&gpu, |on| step.launch(on))?;
        let (rows, room, _held) = (m, plan.capacity - length, (table, cos, sin));
        Ok(Some(Self {
            graph,
            _step: step,
            gpu,
            space,
            _beside,
            _blocks: blocks,
            _head: head,
            _held,
            vocab,
            rows,
            room,
        }))
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn room(&self) -> usize {
        self.room
    }

    pub(super) fn step(&mut self, ids: Option<&[u32]>) -> Result<()> {
        if self.room == 0 {
            bail!("decoder: the rows are full")
        }
        if let Some(ids) = ids {
            if ids.len() != self.rows {
                bail!("decoder: {} tokens for {} rows", ids.len(), self.rows)
            }
            if let Some(id) = ids.iter().find(|id| **id as usize >= self.vocab) {
                bail!("decoder: token id {id} is outside the vocabulary of {}", self.vocab)
            }
            self.gpu.stream.memcpy_htod(ids, &mut self.space.ids).w()?;
        }
        self.graph.launch()?;
        self.room -= 1;
        Ok(())
    }

    /// A copy of the last step's scores.
    pub(super) fn scores(&self) -> Result<Tensor> {
        self.space.scores.copy()
    }

    pub(super) fn best(&self) -> Result<Vec<u32>> {
        self.gpu.stream.clone_dtoh(&self.space.ids).w()
    }
}

/// The phases of a step, and what goes with the weights.
fn phases(
    gpu: &Gpu,
    blocks: &[Block],
    head: &Product,
    space: &Space,
    (table, half): (&Tensor, usize),
    m: usize,
) -> Result<(Vec<Phase>, Vec<Tensor>)> {
    let ((vocab, h), processors) = (table.dims2()?, gpu.processors as usize);
    let (x, scaled) = (View::new(gpu.address(&space.x), h), gpu.address(&space.scaled));
    let (attended, inner) = (gpu.address(&space.attended), gpu.address(&space.inner));
    let (mut all, mut held) = (Vec::with_capacity(5 * blocks.len() + 3), Vec::new());
    let table = View::new(address::<bf16>(table)?, h);
    all.push(blocks.first().map_or(head, |b| &b.qkv).enter((table, vocab), x, scaled)?);
    let sum = Use { residual: x.at, scaled, ..Use::default() };
    for (i, block) in blocks.iter().enumerate() {
        let qkv = View::new(gpu.address(&space.qkv), block.qkv.d_out());
        let gated = Use { gated: Some(block.activation), ..Use::default() };
        let following = blocks.get(i + 1).map_or(head, |b| &b.qkv);
        let mut add = |(phase, beside): (Phase, Tensor)| {
            held.push(beside);
            phase
        };
        all.push(add(block.qkv.phase(scaled, qkv, Use::default(), None)?));
        let cache = (&block.keys, &block.values);
        all.push(block.heads.phase((m, processors), (qkv, View::new(attended, 0)), cache, half, Some(&block.o))?);
        all.push(add(block.o.phase(attended, x, sum, Some(&block.gate_up))?));
        all.push(add(block.gate_up.phase(scaled, View::new(inner, 0), gated, Some(&block.down))?));
        all.push(add(block.down.phase(inner, x, sum, Some(following))?));
    }
    let scores = address::<bf16>(&space.scores)?;
    let (phase, beside) = head.phase(scaled, View::new(scores, vocab), Use::default(), None)?;
    all.push(phase);
    held.push(beside);
    all.push(Phase { work: Work::Best, x: scores, x_stride: vocab, d_in: vocab, ..Phase::default() });
    Ok((all, held))
}
