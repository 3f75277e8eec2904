//! LoRA: a trained low-rank product beside the frozen weight.
//!
//! Equation: y = W x + s B A x, with s = alpha / r, or alpha / sqrt(r) when rank-stabilised
//! Shapes:   x [.., d_in] -> y [.., d_out]; A [r, d_in], B [d_out, r] trained
//! Source:   arXiv 2106.09685 eq. 3; rank-stabilised scaling arXiv 2312.03732
//! Cost:     2 r (d_in + d_out) FLOPs a token forward, twice that backward; r (d_in + d_out) parameters a layer

use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;
use espalier_kernels::frozen::FrozenWeight;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::adapter::{Adapter, Evidence, Init, Method, Site, Wanted, checked_dropout};
use crate::initialisation::{Factors, Initialisation, Moved, INITIALISATIONS};
use crate::low_rank::LowRankView;
use crate::parameter::Role;
use crate::{Error, Flow, ParameterMap, Result};

/// How LoRA is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lora {
    /// Rank r of the update.
    pub r: usize,
    /// Numerator of the scaling alpha / r.
    pub alpha: f64,
    /// Scale by alpha / sqrt(r) instead of alpha / r.
    pub rslora: bool,
    /// Probability of dropping an input of A while training.
    pub dropout: f64,
    /// Where A and B start.
    pub init: Initialisation,
}

impl Default for Lora {
    fn default() -> Self {
        Self { r: 8, alpha: 16.0, rslora: false, dropout: 0.0, init: Initialisation::default() }
    }
}

impl Lora {
    /// The factor s for a site's rank and alpha.
    pub fn scale(&self, site: &Site) -> f64 {
        let rank = site.rank as f64;
        if self.rslora { site.alpha / rank.sqrt() } else { site.alpha / rank }
    }

    /// Makes A, B and the factor, for this method and those that extend it.
    pub(crate) fn factors(&self, site: &Site, init: &mut Init<'_>) -> Result<LoraLayer> {
        site.checked_rank()?;
        checked_dropout(self.dropout)?;
        let scale = self.scale(site);
        let Factors { a, b, moved } = self.init.factors(site, scale, init)?;
        Ok(LoraLayer { path: site.path.clone(), a, b, scale, dropout: self.dropout, lookup: site.lookup, moved })
    }

    /// This method's settings under PEFT's keys, without `use_dora`.
    pub(crate) fn peft_keys(&self) -> Map<String, Value> {
        let mut keys = Map::new();
        keys.insert("peft_type".into(), "LORA".into());
        keys.insert("r".into(), self.r.into());
        keys.insert("lora_alpha".into(), number(self.alpha));
        keys.insert("use_rslora".into(), self.rslora.into());
        keys.insert("lora_dropout".into(), self.dropout.into());
        keys.insert("init_lora_weights".into(), self.init.to_peft());
        keys
    }

    /// Reads PEFT's keys of a LORA file whose `use_dora` equals `dora`.
    pub(crate) fn from_peft_keys(keys: &mut Map<String, Value>, dora: bool) -> Result<Option<Self>> {
        let is = |key: &str, value: &Value| keys.get(key).unwrap_or(&Value::Null) == value;
        if !is("peft_type", &Value::from("LORA")) {
            return Ok(None);
        }
        let use_dora = match keys.get("use_dora") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(value)) => *value,
            Some(other) => return Err(Error::config("use_dora", format!("{other} is neither true nor false"))),
        };
        if use_dora != dora {
            return Ok(None);
        }
        keys.remove("peft_type");
        keys.remove("use_dora");
        let mut take = |key: &str| keys.remove(key).filter(|v| !v.is_null());
        let wrong = |key: &str, value: &Value| Error::config(key, format!("{value} is not a valid value"));
        let defaults = Self::default();
        let r = match take("r") {
            Some(v) => v.as_u64().ok_or_else(|| wrong("r", &v))? as usize,
            None => defaults.r,
        };
        let alpha = match take("lora_alpha") {
            Some(v) => v.as_f64().ok_or_else(|| wrong("lora_alpha", &v))?,
            None => 8.0,
        };
        let rslora = match take("use_rslora") {
            Some(v) => v.as_bool().ok_or_else(|| wrong("use_rslora", &v))?,
            None => false,
        };
        let dropout = match take("lora_dropout") {
            Some(v) => v.as_f64().ok_or_else(|| wrong("lora_dropout", &v))?,
            None => 0.0,
        };
        let init = match take("init_lora_weights") {
            Some(v) => Initialisation::from_peft(&v)?,
            None => Initialisation::default(),
        };
        Ok(Some(Self { r, alpha, rslora, dropout, init }))
    }
}

/// Writes 16.0 as the integer that PEFT writes.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { Value::from(value as i64) } else { Value::from(value) }
}

impl Method for Lora {
    type Layer = LoraLayer;

    fn attach(&self, site: &Site, init: &mut Init<'_>) -> Result<LoraLayer> {
        self.factors(site, init)
    }

    fn examples() -> Vec<(String, Self)> {
        let small = Self { r: 3, alpha: 4.0, ..Self::default() };
        let mut all = vec![
            ("as it comes".to_owned(), Self::default()),
            ("rslora".to_owned(), Self { rslora: true, ..small.clone() }),
            ("dropout".to_owned(), Self { dropout: 0.4, ..small.clone() }),
        ];
        for name in INITIALISATIONS {
            let start = Initialisation::by_name(name).ok();
            all.extend(start.map(|init| ((*name).to_owned(), Self { init, rslora: true, ..small.clone() })));
        }
        all
    }

    fn wanted(&self) -> Option<Wanted> {
        self.init.wanted()
    }

    fn starts(&self, site: &Site, evidence: &Evidence<'_>) -> Result<Vec<(String, Tensor)>> {
        let (name_a, name_b) = LoraLayer::names(site.lookup);
        let (a, b) = self.init.start_from(site, self.scale(site), evidence)?;
        Ok(vec![(name_a.to_owned(), a), (name_b.to_owned(), b)])
    }

    fn rank_and_alpha(&self) -> (usize, f64) {
        (self.r, self.alpha)
    }

    fn portable(&self) -> Option<(Self, usize, f64)> {
        if !self.init.moves_base() {
            return None;
        }
        let factor = if self.rslora { std::f64::consts::SQRT_2 } else { 2.0 };
        let plain =
            Self { r: 2 * self.r, alpha: factor * self.alpha, init: Initialisation::default(), ..self.clone() };
        Some((plain, 2, factor))
    }

    fn to_peft(&self) -> Option<Map<String, Value>> {
        let mut keys = self.peft_keys();
        keys.insert("use_dora".into(), false.into());
        Some(keys)
    }

    fn from_peft(keys: &mut Map<String, Value>) -> Result<Option<Self>> {
        Self::from_peft_keys(keys, false)
    }
}

/// A and B at one site.
#[derive(Debug)]
pub struct LoraLayer {
    path: String,
    pub(crate) a: Tensor,
    pub(crate) b: Tensor,
    pub(crate) scale: f64,
    pub(crate) dropout: f64,
    lookup: bool,
    /// The part of the base that the initialisation moved into B A.
    moved: Option<Moved>,
}

impl LoraLayer {
    /// Names of A and B on disk: (A, B). Lookups have names of their own there.
    pub(crate) fn names(lookup: bool) -> (&'static str, &'static str) {
        if lookup { ("lora_embedding_A", "lora_embedding_B") } else { ("lora_A.weight", "lora_B.weight") }
    }

    /// The input of A where dropout makes it another than `x`.
    pub(crate) fn dropped(&self, x: &Tensor, flow: &Flow) -> Result<Option<Tensor>> {
        flow.dropped(x, self.dropout, &self.path)
    }

    pub(crate) fn view(&self) -> LowRankView {
        LowRankView::new(&self.a, &self.b, self.scale).residual(self.residual())
    }

    /// A, and the rows `rows` of B and of the residual.
    pub(crate) fn of_rows(&self, rows: &Range<usize>) -> Result<Self> {
        let cut = |t: &Tensor| -> Result<Tensor> { Ok(t.detach().narrow(0, rows.start, rows.len())?.contiguous()?) };
        let moved = match &self.moved {
            None => None,
            Some(moved) => Some(Moved {
                residual: Arc::new(FrozenWeight::dense(moved.residual.rows(rows.clone())?)?),
                a: moved.a.clone(),
                b: cut(&moved.b)?,
            }),
        };
        Ok(Self { path: self.path.clone(), a: self.a.detach(), b: cut(&self.b)?, moved, ..*self })
    }

    /// The frozen weight in place of the base, where the initialisation took a part of it.
    pub(crate) fn residual(&self) -> Option<&Arc<FrozenWeight>> {
        self.moved.as_ref().map(|m| &m.residual)
    }
}

impl Adapter for LoraLayer {
    fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, flow: &Flow) -> Result<Tensor> {
        self.view().forward(base, x, self.dropped(x, flow)?.as_ref())
    }

    fn parameters(&self) -> ParameterMap {
        let (a, b) = Self::names(self.lookup);
        let mut map = ParameterMap::new();
        map.push_as(a, &self.a, true, Role::Down);
        map.push_as(b, &self.b, true, Role::Up);
        map
    }

    /// s (B A - B0 A0) as one product of twice the rank on the base itself: A' = [A; A0], B' = [B, -B0].
    fn portable(&self) -> Result<Option<ParameterMap>> {
        let Some(moved) = &self.moved else { return Ok(None) };
        let (name_a, name_b) = Self::names(self.lookup);
        let a = self.a.detach();
        let b = self.b.detach();
        let mut map = ParameterMap::new();
        map.push_as(name_a, &Tensor::cat(&[&a, &moved.a.to_dtype(a.dtype())?], 0)?, true, Role::Down);
        map.push_as(name_b, &Tensor::cat(&[&b, &moved.b.to_dtype(b.dtype())?.neg()?], 1)?, true, Role::Up);
        Ok(Some(map))
    }

    fn rows(&self, rows: Range<usize>) -> Result<Option<Arc<dyn Adapter>>> {
        Ok(Some(Arc::new(self.of_rows(&rows)?)))
    }

    fn low_rank(&self, _base: &Arc<FrozenWeight>) -> Result<Option<LowRankView>> {
        Ok(Some(self.view()))
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }
}
