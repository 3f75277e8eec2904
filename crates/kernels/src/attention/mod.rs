//! Scaled dot-product attention with grouped heads, causal and sliding windows, soft caps and packed segments.
//!
//! Equation: s_ij = cap(scale q_i . k_j),  cap(s) = c tanh(s / c);  o_i = sum_j softmax_j(s_ij over visible j) v_j
//! Shapes:   q [b, tq, h, d], k [b, tk, kv, d], v [b, tk, kv, dv] -> [b, tq, h, dv] in q's dtype; head i reads kv head
//!           i / (h / kv)
//! Source:   arXiv 1706.03762; grouped heads arXiv 2305.13245; tiles and recomputation arXiv 2205.14135, 2307.08691;
//!           soft cap as in Gemma 2, arXiv 2408.00118
//! Cost:     4 b h tq tk d FLOPs forward (half if causal), 2.5 times that backward; memory O(tile), plus one number per
//!           query and head kept for the backward pass

mod backward;
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod decode;
mod forward;
mod mask;
pub mod reference;

use crate::fused;
use candle_core::{Result, Tensor, bail};
use std::sync::{Arc, OnceLock};

/// Which query may see which key, and how scores are formed.
#[derive(Debug, Clone, Default)]
pub struct AttentionSpec {
    /// Factor on q . k, usually 1 / sqrt(d).
    pub scale: f64,
    /// Query i sees keys j <= i + (tk - tq) only: the queries are the last tq positions.
    pub causal: bool,
    /// Query i sees keys j > i + (tk - tq) - window only.
    pub window: Option<usize>,
    /// Scores become c tanh(s / c) before the mask.
    pub softcap: Option<f64>,
    /// Packed sequences: a query sees only keys of its own segment.
    pub segments: Option<Arc<Segments>>,
}

/// Segment ids of packed rows: attention stays within equal ids.
#[derive(Debug, Clone)]
pub struct Segments {
    /// Id of each query, [b * tq], row-major.
    pub query: Vec<u32>,
    /// Id of each key, [b * tk], row-major.
    pub key: Vec<u32>,
    /// The batch size b.
    pub batch: usize,
    /// The ids of the queries on a device, once a kernel there asked for them.
    #[cfg(feature = "cuda")]
    uploaded: OnceLock<Tensor>,
}

impl Segments {
    /// Ids of queries [batch * tq] and keys [batch * tk], row-major.
    pub fn new(query: Vec<u32>, key: Vec<u32>, batch: usize) -> Self {
        Self {
            query,
            key,
            batch,
            #[cfg(feature = "cuda")]
            uploaded: OnceLock::new(),
        }
    }

    /// The id of padding, which neither attends nor is attended to.
    pub const PADDING: u32 = u32::MAX;
}

/// Sizes of one attention.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dims {
    pub(crate) b: usize,
    pub(crate) tq: usize,
    pub(crate) tk: usize,
    /// Places that a sequence's keys have in memory, tk of them in use: more in a cache that will grow.
    pub(crate) room: usize,
    pub(crate) h: usize,
    pub(crate) kv: usize,
    pub(crate) d: usize,
    pub(crate) dv: usize,
}

impl Dims {
    /// Query heads per kv head.
    fn group(&self) -> usize {
        self.h / self.kv
    }

    fn of(q: &[usize], k: &[usize], v: &[usize]) -> Option<Self> {
        let (&[b, tq, h, d], &[kb, tk, kv, kd], &[vb, vt, vkv, dv]) = (q, k, v) else { return None };
        let fits =
            kb == b && vb == b && kd == d && vt == tk && vkv == kv && kv > 0 && h > 0 && h % kv == 0 && d > 0 && dv > 0;
        fits.then_some(Self { b, tq, tk, room: tk, h, kv, d, dv })
    }
}

/// Attention of q [b, tq, h, d] over k [b, tk, kv, d] and v [b, tk, kv, dv]: [b, tq, h, dv].
///
/// Queries that see no key give zeros and no gradient. Gradients for q, k and v.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, spec: &AttentionSpec) -> Result<Tensor> {
    let Some(dims) = Dims::of(q.dims(), k.dims(), v.dims()) else {
        bail!(
            "attention: q {:?}, k {:?}, v {:?}: expected q [b, tq, h, d], k [b, tk, kv, d], v [b, tk, kv, dv] with h a \
             multiple of kv and nothing but b, tq, tk zero",
            q.dims(),
            k.dims(),
            v.dims()
        )
    };
    if q.dtype() != k.dtype() || q.dtype() != v.dtype() || !q.dtype().is_float() {
        bail!("attention: q is {:?}, k {:?}, v {:?}: expected one float type", q.dtype(), k.dtype(), v.dtype())
    }
    if let Some(cap) = spec.softcap
        && !(cap > 0.0 && cap.is_finite())
    {
        bail!("attention: soft cap {cap} is not a positive number")
    }
    if let Some(s) = spec.segments.as_deref()
        && (s.batch != dims.b || s.query.len() != dims.b * dims.tq || s.key.len() != dims.b * dims.tk)
    {
        bail!(
            "attention: segments for batch {} with {} query and {} key ids, but q is {:?} and k {:?}",
            s.batch,
            s.query.len(),
            s.key.len(),
            q.dims(),
            k.dims()
        )
    }
    #[cfg(feature = "cuda")]
    if let Some(out) = cuda::attention(q, k, v, &dims, spec)? {
        return Ok(out);
    }
    if fused(q) {
        let op = cpu::Attention { spec: spec.clone(), log_sums: OnceLock::new() };
        // The first places of a cache are read where they are.
        let in_cache = |t: &Tensor| !t.track_op() && cpu::room(t.layout()).is_some();
        if in_cache(k) && in_cache(v) && !q.track_op() {
            return q.contiguous()?.apply_op3_no_bwd(k, v, &op);
        }
        q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
    } else {
        reference::attention(q, k, v, spec)
    }
}
