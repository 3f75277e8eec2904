//! SwitchLoRA: at every step a few rows of A and columns of B are exchanged with pools of candidates, and the frozen weight
//! takes up the difference, so that the function stays and the sum of all that was trained has full rank.
//!
//! Equation: W <- W + s b_i (a_i - c); a_i <-> c, and b_i, whose gradient was of the old a_i, loses its moments and is held still
//!           for `hold` steps; in the same way for b_k and a_k. Vectors exchanged a step and side: r / (interval / 0.3^((t + 1) / (share T))),
//!           rounded up or down at random
//! Shapes:   W [m, n] in f32; A [r, n], B [m, r]; pools of min(m, n) candidates
//! Source:   arXiv 2406.06564 and the authors' release (exchanged vectors go back to the pool); deviations: vectors held still do
//!           not decay either, and the start is scaled so that s B A has the entries' variance 1 / (3 n) under any alpha
//! Cost:     2 k m n FLOPs a site and step for k exchanged vectors; pools of min(m, n) (m + n) values; what comes out is a model

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use espalier_adapters::random::{stream, uniform};
use rand::Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Dynamics, Example, Fit, Moving, Rates, Settings, Sums, checked_count, checked_positive};
use crate::kept::Line;
use crate::moved_base::MovedBase;
use crate::optimizer::{Hold, Step};
use crate::pairs::{Side, pairs, unfit};
use crate::pool::Pool;
use crate::{Error, Result};

/// Where A, B and the candidates start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Start {
    /// All at random; the frozen weight takes the product off.
    #[default]
    Product,
    /// A and B as the adapter starts; candidates of A at random, of B 0.
    Adapter,
}

/// How SwitchLoRA is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Switchlora {
    /// Steps between two exchanges of one vector, at the beginning.
    pub interval: f64,
    /// Share of all steps after which exchanges are 0.3 times as frequent.
    pub share: f64,
    /// Steps for which the counterpart of an exchanged vector is held still.
    pub hold: u32,
    /// Whether an exchanged vector goes back to the pool as it was trained.
    pub write_back: bool,
    /// Where A, B and the candidates start: product, adapter.
    pub start: Start,
}

impl Default for Switchlora {
    fn default() -> Self {
        Self { interval: 40.0, share: 0.1, hold: 5, write_back: true, start: Start::Product }
    }
}

impl Switchlora {
    /// Vectors exchanged on one side of a product of rank `rank` in the step after `step` of `total` steps, on average.
    pub fn expected(&self, rank: usize, step: usize, total: usize) -> f64 {
        let rate = 0.3f64.powf((step + 1) as f64 / (self.share * total.max(1) as f64)).max(1e-8);
        rank as f64 * rate / self.interval
    }
}

impl Settings for Switchlora {
    type State = State;

    fn fit(&self, fit: &mut Fit<'_>) -> Result<State> {
        checked_positive("interval", self.interval)?;
        checked_positive("share", self.share)?;
        checked_count("hold", self.hold as usize)?;
        if self.interval < 2.0 * f64::from(self.hold) {
            let message = format!("must be at least twice the {} steps of `hold`", self.hold);
            return Err(Error::recipe("dynamics.interval", message));
        }
        let pairs = pairs("switchlora", fit.model, fit.attached)?;
        let base = MovedBase::of("switchlora", &pairs)?;
        let mut sites = Vec::new();
        for pair in pairs {
            let (m, n) = pair.base.dims();
            // Without a candidate beside the live vectors there is nothing to exchange.
            if pair.rank < 2 || m.min(n) <= pair.rank {
                continue;
            }
            let (p, r) = (m.min(n), pair.rank);
            let pools = [Pool::new(vec![0.0; p * n], n, r, 0), Pool::new(vec![0.0; p * m], m, r, r / 2)];
            sites.push(Site { path: pair.path, sides: [pair.down, pair.up], scale: pair.scale, dims: (m, n, r), pools });
        }
        if sites.is_empty() {
            return Err(unfit("switchlora", "no product has a rank of at least 2 and below both sides of its weight"));
        }
        Ok(State { settings: self.clone(), sites, base, switched: 0 })
    }

    fn examples() -> Vec<Example<Self>> {
        let often = Self { interval: 4.0, share: 1.0, hold: 2, ..Self::default() };
        let adapter = "method = 'lora'\nr = 6\nalpha = 2\ndropout = 0.1";
        vec![
            Example { name: "as it comes", settings: Self::default(), adapter },
            Example { name: "often", settings: often.clone(), adapter },
            Example {
                name: "often, from the adapter, nothing goes back",
                settings: Self { start: Start::Adapter, write_back: false, ..often },
                adapter: "method = 'lora'\nr = 4",
            },
        ]
    }
}

/// A and B at one site and their pools, in this order.
#[derive(Debug)]
struct Site {
    path: String,
    sides: [Side; 2],
    scale: f64,
    /// d_out, d_in and the rank.
    dims: (usize, usize, usize),
    pools: [Pool; 2],
}

/// What becomes of A's rows becomes of B's columns.
const LINES: [Line; 2] = [Line::Rows, Line::Columns];

impl Site {
    /// The vectors of a side, one after the other.
    fn live(&self, side: usize) -> Result<Vec<f32>> {
        let t = self.sides[side].tensor.detach();
        let rows = if side == 0 { t } else { t.t()?.contiguous()? };
        Ok(rows.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }

    /// A side whose vectors are these.
    fn side(&self, side: usize, live: Vec<f32>) -> Result<Tensor> {
        let (m, n, r) = self.dims;
        let tensor = &self.sides[side].tensor;
        let rows = Tensor::from_vec(live, (r, if side == 0 { n } else { m }), &Device::Cpu)?;
        let values = if side == 0 { rows } else { rows.t()?.contiguous()? };
        Ok(values.to_device(tensor.device())?.to_dtype(tensor.dtype())?)
    }

    /// s (old - new) at the lines of `slots`: what the weight must take up when side `side` goes from `old` to `new`.
    fn difference(&self, side: usize, old: &Tensor, new: &Tensor, slots: &[usize]) -> Result<Tensor> {
        let slots: Vec<u32> = slots.iter().map(|s| *s as u32).collect();
        let index = Tensor::new(slots.as_slice(), old.device())?;
        let other = self.sides[1 - side].tensor.detach();
        let change = (old - new)?.index_select(&index, side)?;
        let other = other.index_select(&index, 1 - side)?;
        let product = if side == 0 { other.matmul(&change)? } else { change.matmul(&other)? };
        Ok((product * self.scale)?)
    }

    /// Slots that one side's exchange may still take without meeting the other's.
    fn available(&self) -> usize {
        let r = self.dims.2;
        let [a, b] = &self.pools;
        let held = |pool: &Pool| pool.held.iter().filter(|h| **h > 0).count();
        // Rows held were exchanged on the other side: they lie behind that side's next slot.
        let ahead = |from: usize, held: usize, to: usize| (2 * r + from - held.min(r) - to) % r;
        ahead(a.next, held(b), b.next).min(ahead(b.next, held(a), a.next))
    }
}

/// The products of a run, their pools, and the weights that took up the differences.
#[derive(Debug)]
pub struct State {
    settings: Switchlora,
    sites: Vec<Site>,
    base: MovedBase,
    switched: usize,
}

impl State {
    /// Exchanges vectors of one side of a site.
    fn switch(&mut self, moving: &mut Moving<'_>, site: usize, side: usize, count: usize) -> Result<()> {
        let (hold, write_back) = (self.settings.hold, self.settings.write_back);
        let site = &mut self.sites[site];
        let old = site.sides[side].tensor.detach().copy()?;
        let mut live = site.live(side)?;
        let slots = site.pools[side].exchange(&mut live, count, write_back);
        let new = site.side(side, live)?;
        self.base.add(&site.path, &site.difference(side, &old, &new, &slots)?)?;
        Var::from_tensor(&site.sides[side].tensor)?.set(&new)?;
        let other = 1 - side;
        moving.optimizer.reset(&site.sides[other].name, LINES[other], &slots)?;
        for slot in slots {
            site.pools[other].held[slot] = hold;
        }
        Ok(())
    }
}

impl Dynamics for State {
    fn begin(&mut self, moving: &mut Moving<'_>) -> Result<()> {
        for site in &mut self.sites {
            let (m, n, r) = site.dims;
            let (m, n, rank) = (m as f64, n as f64, r as f64);
            let old = [site.live(0)?, site.live(1)?];
            // Leaky ReLU's gain at a slope of sqrt(5), squared; the deviations balance the updates of both sides.
            let square = 1.0 / 3.0f64;
            let any_alpha = (site.scale * rank).powf(-0.5);
            let deviations = match self.settings.start {
                Start::Product => [
                    (m.sqrt() * rank / n.powf(1.5)).powf(0.25) * square.powf(0.25) * any_alpha,
                    (rank / (m * n).sqrt()).powf(0.25) * square.powf(0.25) * any_alpha,
                ],
                Start::Adapter => [(square / n).sqrt(), 0.0],
            };
            for (side, deviation) in deviations.into_iter().enumerate() {
                let pool = &site.pools[side];
                let (count, width) = (pool.count(), pool.vector(0).len());
                let mut rng = stream(moving.seed, &format!("switchlora {} {}", LINES[side].name(), site.path));
                let drawn = uniform(&mut rng, 3f64.sqrt() * deviation, (count, width), &Device::Cpu)?;
                let mut pool = Pool::new(drawn.flatten_all()?.to_vec1()?, width, r, site.pools[side].next);
                match self.settings.start {
                    Start::Adapter => (0..r).for_each(|i| pool.put(i, &old[side][i * width..(i + 1) * width])),
                    Start::Product => {
                        let live: Vec<f32> =
                            (0..r).flat_map(|i| pool.vector(pool.selected[i]).iter().copied()).collect();
                        let all: Vec<usize> = (0..r).collect();
                        let before = site.sides[side].tensor.detach().copy()?;
                        let after = site.side(side, live)?;
                        let change = site.difference(side, &before, &after, &all)?;
                        self.base.add(&site.path, &change)?;
                        Var::from_tensor(&site.sides[side].tensor)?.set(&after)?;
                    }
                }
                site.pools[side] = pool;
            }
        }
        self.base.put(moving.model, |_| true)
    }

    fn gradients(&mut self, moving: &mut Moving<'_>, sums: &mut Sums, _: Rates) -> Result<()> {
        self.switched = 0;
        let mut changed = Vec::new();
        for i in 0..self.sites.len() {
            let site = &self.sites[i];
            let expected = self.settings.expected(site.dims.2, moving.step, moving.total);
            let mut rng = stream(moving.seed, &format!("switchlora {} {}", moving.step, site.path));
            let wanted = expected.floor() as usize + usize::from(rng.random_bool(expected.fract()));
            let count = wanted.min(site.available());
            if count > 0 {
                changed.push(site.path.clone());
                self.switched += 2 * count;
                self.switch(moving, i, 0, count)?;
                self.switch(moving, i, 1, count)?;
            }
        }
        self.base.put(moving.model, |path| changed.iter().any(|p| p == path))?;
        for site in &self.sites {
            for (side, pool) in site.sides.iter().zip(&site.pools) {
                let Some(Some(sum)) = side.index.and_then(|i| sums.get_mut(i)) else { continue };
                if pool.held.iter().any(|h| *h > 0) {
                    let keep = mask(site, side, pool)?.to_dtype(sum.dtype())?;
                    *sum = sum.broadcast_mul(&keep)?;
                }
            }
        }
        Ok(())
    }

    fn update(&mut self, moving: &mut Moving<'_>, sums: &Sums, rates: Rates) -> Result<()> {
        let mut holds = BTreeMap::new();
        for site in &mut self.sites {
            for at in 0..2 {
                let (side, pool) = (&site.sides[at], &site.pools[at]);
                if pool.held.iter().any(|h| *h > 0)
                    && let Some(index) = side.index
                {
                    // Their counts of updates run on, so that the first real one is a small one.
                    holds.insert(index, Hold { moves: mask(site, side, pool)?, kept: false });
                }
                site.pools[at].held.iter_mut().for_each(|h| *h = h.saturating_sub(1));
            }
        }
        moving.optimizer.step(sums, Step { lr: rates.lr, scale: rates.scale, holds: &holds })
    }

    fn metrics(&self) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("switched".into(), self.switched.into());
        map
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state: BTreeMap<String, Tensor> = self.base.state().collect();
        for site in &self.sites {
            for (lines, pool) in LINES.iter().zip(&site.pools) {
                state.extend(pool.state(&format!("{}.{}", site.path, lines.name()))?);
            }
        }
        Ok(state)
    }

    fn restore(&mut self, mut state: BTreeMap<String, Tensor>, moving: &mut Moving<'_>) -> Result<()> {
        self.base.restore(&mut state, moving.model)?;
        for site in &mut self.sites {
            for (lines, pool) in LINES.iter().zip(&mut site.pools) {
                pool.restore(&format!("{}.{}", site.path, lines.name()), &mut state)?;
            }
        }
        match state.into_keys().next() {
            Some(name) => Err(Error::run(name, "belongs to no product of this run")),
            None => Ok(()),
        }
    }

    fn moves_base(&self) -> bool {
        true
    }

    fn bytes(&self, plain: u64) -> u64 {
        let pools = self.sites.iter().flat_map(|s| &s.pools);
        let values: usize = pools.map(|p| p.count() * p.vector(0).len()).sum();
        plain + 4 * values as u64 + self.base.bytes()
    }
}

/// 1 at the vectors of a side that are not held still.
fn mask(site: &Site, side: &Side, pool: &Pool) -> Result<Tensor> {
    let (m, n, r) = site.dims;
    let at = usize::from(side.name == site.sides[1].name);
    let dims = if at == 0 { (r, n) } else { (m, r) };
    LINES[at].mask(dims, side.tensor.device(), |i| pool.held[i] == 0)
}
