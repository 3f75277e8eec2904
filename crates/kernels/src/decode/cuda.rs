//! A whole step as one graph.

use super::attend::{Cache, Heads};
use super::product::{Next, Product, RowNorm, Use};
use super::{DecoderBlock, DecoderPlan, ROWS};
use crate::activation::Activation;
use crate::cuda::graph::{Graph, Launches};
use crate::cuda::{Arg, Gpu, View, address};
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

/// Memory that the kernels of a step leave their results in.
struct Space {
    ids: CudaSlice<u32>,
    places: CudaSlice<u32>,
    firsts: CudaSlice<u32>,
    x: CudaSlice<bf16>,
    qkv: CudaSlice<bf16>,
    attended: CudaSlice<bf16>,
    inner: CudaSlice<bf16>,
    /// A x of all products, one after the other.
    u: CudaSlice<f32>,
    u_len: usize,
    scores: Tensor,
}

/// A recorded step and all that it reads and writes.
pub(super) struct Steps {
    // Dropped first: the rest is what it reads.
    graph: Graph,
    gpu: Arc<Gpu>,
    space: Space,
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
        let u_len =
            m * blocks.iter().flat_map(|b| [&b.qkv, &b.o, &b.gate_up, &b.down]).map(Product::ranks).sum::<usize>();
        let upload = |values: &[u32]| gpu.stream.clone_htod(values).w();
        let space = Space {
            ids: upload(&vec![0; m])?,
            places: upload(&vec![length as u32; m])?,
            firsts: upload(&plan.padding)?,
            x: gpu.alloc(m * h)?,
            qkv: gpu.alloc(m * widest(|b| b.qkv.d_out()))?,
            attended: gpu.alloc(m * widest(|b| b.o.d_in()))?,
            inner: gpu.alloc(m * widest(|b| b.down.d_in()))?,
            u: gpu.alloc(u_len)?,
            u_len,
            scores: gpu.tensor(gpu.alloc::<bf16>(m * vocab)?, &[m, vocab]),
        };
        let graph = Graph::record(&gpu, |on| record(on, &blocks, &head, &space, (&table, &cos, &sin), m))?;
        let (rows, room, _held) = (m, plan.capacity - length, (table, cos, sin));
        Ok(Some(Self { graph, gpu, space, _blocks: blocks, _head: head, _held, vocab, rows, room }))
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

/// Launches a step.
fn record(
    on: &Launches<'_>,
    blocks: &[Block],
    head: &Product,
    space: &Space,
    (table, cos, sin): (&Tensor, &Tensor, &Tensor),
    m: usize,
) -> Result<()> {
    let gpu = on.gpu;
    let (vocab, h) = table.dims2()?;
    let (x, residual) = (View::new(gpu.address(&space.x), h), Some(gpu.address(&space.x)));
    let (ids, places) = (gpu.address(&space.ids), gpu.address(&space.places));
    let mut free = gpu.address(&space.u);
    on.zero(free, space.u_len.max(1) * size_of::<f32>())?;
    let mut take = |product| {
        let next = Next { product, u: free };
        free += (m * Product::ranks(product) * size_of::<f32>()) as u64;
        next
    };
    let Some(first) = blocks.first() else { return Ok(()) };
    let mut next = take(&first.qkv);
    let (a, u, ranks) = Next::parts(Some(&next))?;
    let table = address::<bf16>(table)?;
    let args = [ids.into(), table.into(), vocab.into(), x.at.into(), h.into(), a.into(), u.into(), Arg::from(ranks)];
    // The one before it is no kernel of ours.
    on.launch("attend_embed", ((h.div_ceil(128), m, 1), 128, 0), false, &args)?;
    for (i, block) in blocks.iter().enumerate() {
        let (qkv, attended) = (View::new(gpu.address(&space.qkv), block.qkv.d_out()), block.o.d_in());
        let attended = View::new(gpu.address(&space.attended), attended);
        let inner = View::new(gpu.address(&space.inner), block.down.d_in());
        block.qkv.launch(on, m, (x, next.u), qkv, Use::default(), None)?;
        next = take(&block.o);
        let cache = Cache {
            keys: &block.keys,
            values: &block.values,
            places,
            firsts: gpu.address(&space.firsts),
            rotary: (cos, sin),
        };
        block.heads.launch(on, m, (qkv, attended), &cache, Some(&next))?;
        let (u, sum) = (next.u, Use { residual, ..Use::default() });
        next = take(&block.gate_up);
        block.o.launch(on, m, (attended, u), x, sum, Some(&next))?;
        let (u, gated) = (next.u, Use { gated: Some(block.activation), ..Use::default() });
        next = take(&block.down);
        block.gate_up.launch(on, m, (x, u), inner, gated, Some(&next))?;
        let u = next.u;
        let following = blocks.get(i + 1).map(|b| take(&b.qkv));
        block.down.launch(on, m, (inner, u), x, sum, following.as_ref())?;
        if let Some(following) = following {
            next = following;
        }
    }
    let scores = address::<bf16>(&space.scores)?;
    head.launch(on, m, (x, 0), View::new(scores, vocab), Use::default(), None)?;
    let args = [scores.into(), vocab.into(), ids.into(), Arg::from(places)];
    on.launch("attend_best", ((m, 1, 1), 1024, 0), true, &args)
}
