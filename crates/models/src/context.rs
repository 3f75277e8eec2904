//! What all blocks of one forward pass share: rotary tables and the shape of attention.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use espalier_kernels::attention::{AttentionSpec, Segments};

use crate::Result;
use crate::config::{ModelConfig, Positions, RopeSpec};
use crate::input::TokenBatch;
use crate::laid::KeysValues;

/// Shared inputs of the blocks.
#[derive(Debug)]
pub struct Context {
    /// cos and sin [b or 1, t, rotated / 2].
    pub(crate) rotary: Option<(Tensor, Tensor)>,
    specs: BTreeMap<Option<usize>, AttentionSpec>,
    windows: Vec<Option<usize>>,
    full: AttentionSpec,
    /// Keys and values that stand before the sequences.
    pub(crate) standing: Option<KeysValues>,
}

impl Context {
    pub(crate) fn new(
        config: &ModelConfig,
        input: &TokenBatch,
        segments: Option<Arc<Segments>>,
        (dtype, device): (DType, &Device),
        tables: &RotaryTables,
    ) -> Result<Self> {
        let rotary = match &config.positions {
            Positions::Rope(spec) => Some(tables.of(spec, input, (dtype, device))?),
            Positions::Learned { .. } => None,
        };
        let full = AttentionSpec {
            scale: config.attention_scale,
            causal: config.causal,
            window: None,
            softcap: config.attention_softcap,
            segments,
        };
        let specs = config.windows.iter().map(|w| (*w, AttentionSpec { window: *w, ..full.clone() })).collect();
        Ok(Self { rotary, specs, windows: config.windows.clone(), full, standing: None })
    }

    pub(crate) fn attention(&self, layer: usize) -> &AttentionSpec {
        self.windows.get(layer).and_then(|w| self.specs.get(w)).unwrap_or(&self.full)
    }
}

/// cos and sin of positions 0 to `capacity` [capacity, rotated / 2] for sequences that grow to that length; None where the
/// frequencies change on the way.
pub(crate) fn table(spec: &RopeSpec, capacity: usize, device: &Device) -> Result<Option<(Tensor, Tensor)>> {
    if spec.frequencies(1) != spec.frequencies(capacity) {
        return Ok(None);
    }
    let input = TokenBatch::new(vec![0; capacity], 1, capacity)?;
    let (cos, sin) = rotary(spec, &input, DType::F32, device)?;
    Ok(Some((cos.squeeze(0)?, sin.squeeze(0)?)))
}

/// The tables of the positions asked for last: most steps of a run ask for the same ones.
#[derive(Debug, Default)]
pub(crate) struct RotaryTables(Mutex<Option<Tables>>);

#[derive(Debug)]
struct Tables {
    positions: Vec<u32>,
    length: usize,
    tables: (Tensor, Tensor),
}

impl RotaryTables {
    fn of(&self, spec: &RopeSpec, input: &TokenBatch, on: (DType, &Device)) -> Result<(Tensor, Tensor)> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = last.as_ref().filter(|l| l.length == input.length && l.positions == input.positions) {
            return Ok(last.tables.clone());
        }
        let tables = rotary(spec, input, on.0, on.1)?;
        *last = Some(Tables { positions: input.positions.clone(), length: input.length, tables: tables.clone() });
        Ok(tables)
    }
}

/// cos and sin of the input's positions; one row serves the whole batch where all rows have the same positions.
fn rotary(spec: &RopeSpec, input: &TokenBatch, dtype: DType, device: &Device) -> Result<(Tensor, Tensor)> {
    let t = input.length;
    let longest = input.positions.iter().max().map_or(0, |p| *p as usize + 1);
    let (frequencies, factor) = spec.frequencies(longest);
    let same = input.positions.chunks(t.max(1)).all(|row| row == &input.positions[..t]);
    let positions = if same { &input.positions[..t.min(input.positions.len())] } else { &input.positions[..] };
    let rows = positions.len() / t.max(1);
    // Angles as transformers computes them: an f32 product of an f32 frequency and the position.
    let angle =
        |p: &u32, f: &f64| if dtype == DType::F64 { f64::from(*p) * f } else { f64::from(*p as f32 * *f as f32) };
    let table = |wave: fn(f64) -> f64| -> Result<Tensor> {
        let values: Vec<f64> =
            positions.iter().flat_map(|p| frequencies.iter().map(move |f| wave(angle(p, f)) * factor)).collect();
        let table = Tensor::from_vec(values, (rows, t, frequencies.len()), &Device::Cpu)?;
        Ok(table.to_dtype(if dtype == DType::F64 { DType::F64 } else { DType::F32 })?.to_device(device)?)
    };
    Ok((table(f64::cos)?, table(f64::sin)?))
}
