//! GaLore: dense weights whose gradients the optimiser sees in a subspace of low rank, found anew every so many steps.
//!
//! Equation: R = P^T G, P the leading r left singular vectors of G at every `gap`-th step; W <- W - lr scale P u(R), with u the
//!           optimiser's direction; where d_out >= d_in, R = G Q with the right singular vectors
//! Shapes:   G, W [d_out, d_in]; P [d_out, r], R [r, d_in]; Q [d_in, r], R [d_out, r]
//! Source:   arXiv 2403.03507 algorithm 2; sides and the moments' survival of a new subspace as in the authors' release
//! Cost:     4 r d_in d_out FLOPs a matrix and step, a singular value decomposition every `gap` steps; moments of R alone

use std::collections::BTreeMap;

use candle_core::Tensor;
use espalier_adapters::decomposition::svd;
use serde::{Deserialize, Serialize};

use super::{Dynamics, Example, Fit, Moving, Rates, Settings, Sums, checked_count, checked_positive};
use crate::optimizer::{NO_HOLDS, Step, rule};
use crate::pairs::unfit;
use crate::{Error, Result};

/// How GaLore is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Galore {
    /// Rank r of the subspace.
    pub rank: usize,
    /// Steps between subspaces.
    pub gap: usize,
    /// Factor on the update.
    pub scale: f64,
}

impl Default for Galore {
    fn default() -> Self {
        Self { rank: 128, gap: 200, scale: 0.25 }
    }
}

impl Settings for Galore {
    type State = State;

    fn fit(&self, fit: &mut Fit<'_>) -> Result<State> {
        checked_count("rank", self.rank)?;
        checked_count("gap", self.gap)?;
        checked_positive("scale", self.scale)?;
        let attached = fit.attached;
        let mut matrices = Vec::new();
        let mut whole = 0;
        for (index, p) in attached.parameters.trainable().enumerate() {
            let Some(path) = p.name.strip_suffix(".weight").filter(|path| attached.layers.contains_key(*path)) else {
                continue;
            };
            let &[m, n] = p.tensor.dims() else { continue };
            if fit.model.block_of(path).is_none() {
                continue;
            }
            whole += 1;
            if m.min(n) > self.rank {
                matrices.push(Matrix { name: p.name.clone(), index, dims: (m, n), basis: None });
            }
        }
        if matrices.is_empty() {
            let name = attached.config.method.name();
            return Err(unfit(
                "galore",
                format!(
                    "of the {whole} dense weights of blocks that `{name}` trains none has both sides above the rank of {}",
                    self.rank
                ),
            ));
        }
        let rule = rule(fit.recipe)?;
        let slots = |dims: &[usize]| 4 * (rule.slots(dims).len() * dims.iter().product::<usize>()) as u64;
        let (mut less, mut more) = (0, 0);
        for matrix in &matrices {
            less += slots(&[matrix.dims.0, matrix.dims.1]);
            more += slots(&matrix.seen(self.rank)) + 4 * (matrix.dims.0.min(matrix.dims.1) * self.rank) as u64;
        }
        Ok(State { settings: self.clone(), matrices, bytes: (less, more) })
    }

    fn examples() -> Vec<Example<Self>> {
        let adapter = "method = 'full'";
        let some = "method = 'full'\nbias = 'all'\nexclude_modules = ['v_proj']";
        vec![
            Example { name: "rank 4", settings: Self { rank: 4, ..Self::default() }, adapter },
            Example { name: "two steps", settings: Self { rank: 3, gap: 2, scale: 0.5 }, adapter: some },
        ]
    }
}

/// A dense weight.
#[derive(Debug)]
struct Matrix {
    name: String,
    index: usize,
    dims: (usize, usize),
    /// P or Q.
    basis: Option<Tensor>,
}

impl Matrix {
    /// Whether the subspace is one of outputs (P).
    fn is_left(&self) -> bool {
        self.dims.0 < self.dims.1
    }

    /// Shape of R.
    fn seen(&self, rank: usize) -> [usize; 2] {
        if self.is_left() { [rank, self.dims.1] } else { [self.dims.0, rank] }
    }

    /// Shape of P or Q.
    fn basis_dims(&self, rank: usize) -> [usize; 2] {
        [if self.is_left() { self.dims.0 } else { self.dims.1 }, rank]
    }

    /// Name under which the optimiser keeps the moments of R.
    fn projected(&self) -> String {
        format!("{}.projected", self.name)
    }
}

/// The leading `rank` singular vectors of `g` [m, n] as columns: the left ones, or the right ones.
///
/// # Errors
/// If `g` is not finite.
pub fn basis(g: &Tensor, rank: usize, left: bool) -> Result<Tensor> {
    let (u, _, vt) = svd(g)?;
    let all = if left { u } else { vt.t()? };
    Ok(all.narrow(1, 0, rank)?.contiguous()?)
}

/// The weights of a run and their subspaces.
#[derive(Debug)]
pub struct State {
    settings: Galore,
    matrices: Vec<Matrix>,
    /// Bytes saved and added.
    bytes: (u64, u64),
}

impl Dynamics for State {
    fn update(&mut self, moving: &mut Moving<'_>, sums: &Sums, rates: Rates) -> Result<()> {
        let Galore { rank, gap, scale } = self.settings;
        let mut rest = sums.to_vec();
        for matrix in &mut self.matrices {
            let left = matrix.is_left();
            let Some(g) = rest.get_mut(matrix.index).and_then(Option::take) else { continue };
            let new = moving.step.is_multiple_of(gap) || matrix.basis.is_none();
            let p = match (&matrix.basis, new) {
                (Some(p), false) => p.clone(),
                _ => basis(&g, rank, left)?,
            };
            let seen = if left { p.t()?.matmul(&g)? } else { g.matmul(&p)? };
            let direction = moving.optimizer.direction(&matrix.projected(), &seen, rates.scale)?;
            let whole = if left { p.matmul(&direction)? } else { direction.matmul(&p.t()?)? };
            moving.optimizer.advance(matrix.index, &(whole * scale)?, rates.lr)?;
            matrix.basis = Some(p);
        }
        moving.optimizer.step(&rest, Step { lr: rates.lr, scale: rates.scale, holds: &NO_HOLDS })
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let known = self.matrices.iter().filter_map(|m| Some((format!("{}.basis", m.name), m.basis.clone()?)));
        Ok(known.collect())
    }

    fn restore(&mut self, mut state: BTreeMap<String, Tensor>, moving: &mut Moving<'_>) -> Result<()> {
        let rank = self.settings.rank;
        for matrix in &mut self.matrices {
            let name = format!("{}.basis", matrix.name);
            let basis = crate::moved_base::taken(&mut state, &name, &matrix.basis_dims(rank))?;
            matrix.basis = Some(basis.to_device(moving.model.device())?);
        }
        match state.into_keys().next() {
            Some(name) => Err(Error::run(name, "belongs to no weight of this run")),
            None => Ok(()),
        }
    }

    fn own(&self) -> Vec<(String, Vec<usize>)> {
        self.matrices.iter().map(|m| (m.projected(), m.seen(self.settings.rank).to_vec())).collect()
    }

    fn bytes(&self, plain: u64) -> u64 {
        plain.saturating_sub(self.bytes.0) + self.bytes.1
    }
}
