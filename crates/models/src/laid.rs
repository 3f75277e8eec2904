//! Where what stands before the sequences has its places in a batch: each sequence of a row gets virtual tokens of its own before
//! its first token, so that packed and padded rows see what they would see alone.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use espalier_adapters::Flow;
use espalier_adapters::prompt::Prompt;
use espalier_kernels::rows::take_rows;

use crate::cache::KvCache;
use crate::context::Context;
use crate::input::{PADDING, TokenBatch};
use crate::transformer::Model;
use crate::{Error, Result};

/// A batch with virtual tokens, and where its own tokens are in it.
#[derive(Debug, Clone)]
pub(crate) struct Laid {
    /// The longer batch. Virtual tokens have id 0, which nothing reads.
    pub(crate) input: TokenBatch,
    /// For each place, its row in [the virtual tokens; the batch's own tokens].
    from: Vec<u32>,
    /// For each of the batch's own tokens, its place.
    places: Vec<u32>,
}

impl Laid {
    /// `n` virtual tokens before each sequence of `input`.
    pub(crate) fn new(input: &TokenBatch, n: usize) -> Result<Self> {
        let t = input.length;
        let segment = |i: usize| input.segments.as_ref().map_or(0, |segments| segments[i]);
        let begins = |i: usize| segment(i) != PADDING && (i.is_multiple_of(t) || segment(i) != segment(i - 1));
        let sequences = |row: usize| (row * t..(row + 1) * t).filter(|i| begins(*i)).count();
        let most = (0..input.batch).map(sequences).max().unwrap_or(0);
        let length = t + n * most;
        let total = input.batch * length;
        let mut laid = TokenBatch {
            batch: input.batch,
            length,
            ids: Vec::with_capacity(total),
            positions: Vec::with_capacity(total),
            segments: None,
            token_types: input.token_types.as_ref().map(|_| Vec::with_capacity(total)),
        };
        let (mut from, mut segments) = (Vec::with_capacity(total), Vec::with_capacity(total));
        let mut places = Vec::with_capacity(input.ids.len());
        let mut put = |id: u32, position: u32, kind: u32, own: u32, source: u32| {
            laid.ids.push(id);
            laid.positions.push(position);
            laid.token_types.iter_mut().for_each(|types| types.push(kind));
            segments.push(own);
            from.push(source);
        };
        let mut at = 0;
        for row in 0..input.batch {
            for i in row * t..(row + 1) * t {
                if begins(i) {
                    for v in 0..n as u32 {
                        put(0, input.positions[i] + v, 0, segment(i), v);
                    }
                    at += n;
                }
                let kind = input.token_types.as_ref().map_or(0, |types| types[i]);
                let shift = if segment(i) == PADDING { 0 } else { n as u32 };
                put(input.ids[i], input.positions[i] + shift, kind, segment(i), (n + i) as u32);
                places.push(at as u32);
                at += 1;
            }
            // Rows of fewer sequences end in padding.
            for _ in 0..n * (most - sequences(row)) {
                put(0, 0, 0, PADDING, 0);
                at += 1;
            }
        }
        laid.segments = (input.segments.is_some() || segments.contains(&PADDING)).then_some(segments);
        laid.check()?;
        Ok(Self { input: laid, from, places })
    }

    /// The places of the batch's own tokens.
    pub(crate) fn places(&self) -> &[u32] {
        &self.places
    }

    fn index(&self, device: &Device) -> Result<Tensor> {
        Ok(Tensor::from_slice(&self.from, self.from.len(), device)?)
    }

    /// Rows [batch, length, width] of `virtual_rows` [n, width] and `own` [batch, t, width], each at its place.
    pub(crate) fn lay(&self, virtual_rows: &Tensor, own: &Tensor) -> Result<Tensor> {
        let width = own.dim(2)?;
        let own = own.reshape((own.dim(0)? * own.dim(1)?, width))?;
        let all = Tensor::cat(&[&virtual_rows.to_dtype(own.dtype())?, &own], 0)?;
        let rows = all.index_select(&self.index(own.device())?, 0)?;
        Ok(rows.reshape((self.input.batch, self.input.length, width))?)
    }

    /// The rows of the batch's own tokens [batch, t, width] of `x` [batch, length, width].
    pub(crate) fn own(&self, x: &Tensor) -> Result<Tensor> {
        let (b, t, width) = x.dims3()?;
        let index = Tensor::from_slice(&self.places, self.places.len(), x.device())?;
        let rows = take_rows(&x.reshape((b * t, width))?, &index)?;
        Ok(rows.reshape((b, self.places.len() / b.max(1), width))?)
    }
}

/// Keys and values that stand at the virtual places of every block.
#[derive(Debug, Clone)]
pub(crate) struct KeysValues {
    values: Tensor,
    /// For each place, its row in [the virtual tokens; all places].
    from: Arc<Vec<u32>>,
}

impl KeysValues {
    /// Of `prompt` at the places of `laid`; None where the prompt is of tokens.
    pub(crate) fn of(prompt: &Prompt, laid: &Laid) -> Result<Option<Self>> {
        let Prompt::KeysValues(values) = prompt else { return Ok(None) };
        let n = values.dim(0)?;
        // What a virtual place holds itself is not used; padding keeps what it has.
        let padding = |at: usize| laid.input.segments.as_ref().is_some_and(|segments| segments[at] == PADDING);
        let source = |(at, from): (usize, &u32)| match (*from as usize) < n && !padding(at) {
            true => *from,
            false => (n + at) as u32,
        };
        let from = laid.from.iter().enumerate().map(source).collect();
        Ok(Some(Self { values: values.clone(), from: Arc::new(from) }))
    }

    /// `own` keys (`part` 0) or values (1) of block `layer` [b, t, heads, width] with those that stand at the virtual places.
    pub(crate) fn put(&self, own: &Tensor, layer: usize, part: usize) -> Result<Tensor> {
        let (b, t, heads, width) = own.dims4()?;
        let keys = heads * width;
        let standing = self.values.narrow(1, (2 * layer + part) * keys, keys)?.to_dtype(own.dtype())?;
        let all = Tensor::cat(&[&standing, &own.reshape((b * t, keys))?], 0)?;
        let index = Tensor::from_slice(&self.from, self.from.len(), own.device())?;
        Ok(all.index_select(&index, 0)?.reshape((b, t, heads, width))?)
    }
}

/// A batch on its way into the first block.
#[derive(Debug)]
pub struct Begun {
    /// Vectors of all places [b, length, hidden].
    pub x: Tensor,
    /// What the blocks share.
    pub context: Context,
    pub(crate) laid: Option<Laid>,
    /// Virtual tokens before the place that a classifier reads.
    pub(crate) read_before: usize,
}

impl Begun {
    /// Where the scores of the input's token at `place` (in the flattened batch) are read in the flattened vectors. A classifier
    /// reads the first place of a row, be it a virtual token's.
    ///
    /// # Errors
    /// If the batch has no such place.
    pub fn place(&self, place: u32) -> Result<u32> {
        let Some(laid) = &self.laid else { return Ok(place) };
        let found = laid.places().get(place as usize).and_then(|at| at.checked_sub(self.read_before as u32));
        found.ok_or_else(|| Error::Input(format!("place {place} of a batch of {} tokens", laid.places().len())))
    }
}

impl Model {
    /// How many virtual tokens stand before each sequence now.
    pub fn virtual_tokens(&self) -> usize {
        self.prompt.get().map_or(0, |prompter| prompter.virtual_tokens())
    }

    /// What the first block takes for `input`, and what all of them share: with what stands before the sequences now.
    ///
    /// # Errors
    /// If the input does not fit the model.
    pub fn begin(&self, input: &TokenBatch, flow: &Flow) -> Result<Begun> {
        input.check()?;
        let Some(prompter) = self.prompt.get() else {
            let context = self.context(input)?;
            return Ok(Begun { x: self.embed(input, None)?, context, laid: None, read_before: 0 });
        };
        let prompt = prompter.prompt(flow)?;
        let laid = Laid::new(input, prompter.virtual_tokens())?;
        let mut context = self.context(&laid.input)?;
        context.standing = KeysValues::of(&prompt, &laid)?;
        let read_before = match &prompt {
            Prompt::Tokens(tokens) if self.config.labels().is_some() => tokens.dim(0)?,
            _ => 0,
        };
        Ok(Begun { x: self.embed(input, Some((&prompt, &laid)))?, context, laid: Some(laid), read_before })
    }

    /// The start of a pass that goes on after `cache`, and its length: the first pass has what stands before the sequences, whose
    /// positions later ones count.
    pub(crate) fn go_on(&self, input: &TokenBatch, cache: &mut KvCache, flow: &Flow) -> Result<(Begun, usize)> {
        if !cache.is_empty() || self.prompt.get().is_none() {
            let shift = cache.virtual_tokens as u32;
            let positions = input.positions.iter().map(|p| p + shift).collect();
            let input = TokenBatch { positions, ..input.clone() };
            let segments = cache.advance(&input)?;
            let context = self.context_over(&input, segments)?;
            let begun = Begun { x: self.embed(&input, None)?, context, laid: None, read_before: 0 };
            return Ok((begun, input.length));
        }
        let Begun { x, context: first, laid, read_before } = self.begin(input, flow)?;
        let (n, begun) = (self.virtual_tokens(), laid.as_ref().map_or(input, |laid| &laid.input));
        let length = begun.length;
        if length != input.length + n {
            return Err(Error::Input("rows of several sequences cannot be continued".into()));
        }
        let segments = cache.advance(begun)?;
        let mut context = self.context_over(begun, segments)?;
        context.standing = first.standing;
        cache.virtual_tokens = n;
        Ok((Begun { x, context, laid, read_before }, length))
    }
}
