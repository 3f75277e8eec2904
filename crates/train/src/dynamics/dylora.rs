//! DyLoRA's sampling: at every step a rank is drawn, and the nested products are cut to it, so that any first part of them works.
//!
//! Equation: b drawn evenly from `least` to the rank r; the pass is that of the first b components; with `last_only` the b-th alone
//!           is trained
//! Shapes:   the adapter's
//! Source:   arXiv 2210.07558 algorithm 1 and the authors' release, which draws one b for all layers and steps. There the components
//!           that have no gradient still move by momentum and decay; `strict` holds them, and their moments, still
//! Cost:     none beside the pass, whose products are smaller

use std::collections::BTreeMap;

use espalier_adapters::Flow;
use espalier_adapters::flow::Nested;
use espalier_adapters::random::stream;
use rand::Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Dynamics, Example, Fit, Moving, Rates, Settings, Sums, checked_count};
use crate::kept::Line;
use crate::optimizer::{Hold, Step};
use crate::pairs::{pairs, unfit};
use crate::{Error, Result};

/// How ranks are drawn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dylora {
    /// The least rank that is drawn.
    pub least: usize,
    /// Train the last component of the drawn ones alone.
    pub last_only: bool,
    /// Hold components that are not trained in a step still, their moments as well.
    pub strict: bool,
    /// Draw a rank for every micro-batch instead of one for the whole step.
    pub per_micro_batch: bool,
}

impl Default for Dylora {
    fn default() -> Self {
        Self { least: 1, last_only: true, strict: false, per_micro_batch: false }
    }
}

impl Settings for Dylora {
    type State = State;

    fn fit(&self, fit: &mut Fit<'_>) -> Result<State> {
        checked_count("least", self.least)?;
        let name = fit.attached.config.method.name();
        let nested = fit.attached.layers.values().any(|layer| layer.is_nested());
        if !nested {
            return Err(unfit("dylora", format!("the products of `{name}` are not nested; use the method `dylora`")));
        }
        let mut products = Vec::new();
        for pair in pairs("dylora", fit.model, fit.attached)? {
            let (Some(down), Some(up)) = (pair.down.index, pair.up.index) else { continue };
            products.push(Product { down, up, rank: pair.rank, width: pair.base.dims() });
        }
        let most = products.iter().map(|p| p.rank).max().unwrap_or(0);
        if self.least > most {
            let message = format!("{} is above the adapter's rank {most}", self.least);
            return Err(Error::recipe("dynamics.least", message));
        }
        if self.strict && self.per_micro_batch {
            let message = "components of a step differ between micro-batches, so none can be held still";
            return Err(Error::recipe("dynamics.strict", message));
        }
        let seed = fit.recipe.seed;
        Ok(State { settings: self.clone(), products, most, seed, rank: most })
    }

    fn examples() -> Vec<Example<Self>> {
        let adapter = "method = 'dylora'\nr = 4\ndropout = 0.1";
        let plain = "method = 'dylora'\nr = 4\nscale = 'constant'";
        let all = Self { last_only: false, ..Self::default() };
        vec![
            Example { name: "as it comes", settings: Self::default(), adapter },
            Example { name: "strict", settings: Self { strict: true, ..Self::default() }, adapter },
            Example { name: "all components", settings: Self { least: 2, ..all.clone() }, adapter: plain },
            Example { name: "by micro-batch", settings: Self { per_micro_batch: true, ..all }, adapter: plain },
        ]
    }
}

#[derive(Debug)]
struct Product {
    down: usize,
    up: usize,
    rank: usize,
    /// d_out and d_in.
    width: (usize, usize),
}

/// The products of a run, and the last rank that was drawn.
#[derive(Debug)]
pub struct State {
    settings: Dylora,
    products: Vec<Product>,
    most: usize,
    seed: u64,
    rank: usize,
}

impl State {
    /// The rank of a pass.
    fn drawn(&self, step: usize, part: usize) -> usize {
        let part = if self.settings.per_micro_batch { part } else { 0 };
        stream(self.seed, &format!("dylora {step} {part}")).random_range(self.settings.least..=self.most)
    }
}

impl Dynamics for State {
    fn before(&mut self, moving: &mut Moving<'_>) -> Result<()> {
        self.rank = self.drawn(moving.step, 0);
        Ok(())
    }

    fn flow(&self, flow: Flow, step: usize, part: usize) -> Flow {
        let nested = Nested { rank: self.drawn(step, part), last_only: self.settings.last_only };
        Flow { nested: Some(nested), ..flow }
    }

    fn update(&mut self, moving: &mut Moving<'_>, sums: &Sums, rates: Rates) -> Result<()> {
        let mut holds = BTreeMap::new();
        for product in self.products.iter().filter(|_| self.settings.strict) {
            let rank = self.rank.min(product.rank);
            let moves = |i: usize| i < rank && (!self.settings.last_only || i + 1 == rank);
            let device = moving.model.device();
            let ((out, width), r) = (product.width, product.rank);
            let down = Line::Rows.mask((r, width), device, moves)?;
            let up = Line::Columns.mask((out, r), device, moves)?;
            holds.insert(product.down, Hold { moves: down, kept: true });
            holds.insert(product.up, Hold { moves: up, kept: true });
        }
        moving.optimizer.step(sums, Step { lr: rates.lr, scale: rates.scale, holds: &holds })
    }

    fn metrics(&self) -> Map<String, Value> {
        let mut map = Map::new();
        if !self.settings.per_micro_batch {
            map.insert("nested_rank".into(), self.rank.into());
        }
        map
    }
}
