//! Products of a few rows on the CPU, each row with an adapter of its own.
//!
//! Equation: y_j = g_v (W x_j + B_v u_j) + bias, u_j = s A_v x_j, where v is the set of adapters that row j goes through
//! Shapes:   x [m, d_in], W of all maps one below the other [d_out, d_in], A_v [ranks, d_in], B_v [d_out, rank] of each map
//! Cost:     every weight and factor is read once; B u is a term of the same sums as W x

use crate::frozen::{Dots, FrozenWeight, with_dots};
use crate::parallel;
use crate::part::group::Group;
use crate::product::{Beside, dots};
use candle_core::{DType, Result, Tensor};
use std::sync::Arc;

/// Rows of a weight that a task takes, and rows of A.
const ROWS: usize = 32;
const RANKS: usize = 16;

/// The factors of one map.
struct Map {
    /// First column within u, and the rank.
    row: usize,
    rank: usize,
    b: Vec<f32>,
    gain: Option<Vec<f32>>,
}

/// One set of adapters on the maps of a product.
struct Side {
    /// s A of all maps, one below the other.
    a: Vec<f32>,
    ranks: usize,
    maps: Vec<Map>,
}

/// Maps of one input.
pub(super) struct Product {
    weights: Vec<Arc<FrozenWeight>>,
    biases: Vec<Option<Vec<f32>>>,
    sides: Vec<Side>,
    d_in: usize,
}

fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

impl Side {
    fn new(group: &Group<'_>, flat: &[f32]) -> Self {
        let mut a = flat.get(group.a.clone()).unwrap_or_default().to_vec();
        let mut maps = Vec::with_capacity(group.members.len());
        for (member, place) in group.members.iter().zip(&group.places) {
            let rows = &mut a[place.row * group.d_in..][..place.rank * group.d_in];
            crate::vector::scale(member.scale(), rows);
            let of = |range: &std::ops::Range<usize>| flat.get(range.clone()).unwrap_or_default().to_vec();
            maps.push(Map { row: place.row, rank: place.rank, b: of(&place.b), gain: place.gain.as_ref().map(of) });
        }
        Self { a, ranks: group.ranks, maps }
    }
}

impl Product {
    /// A map with nothing beside it.
    pub(super) fn plain(weight: &Arc<FrozenWeight>) -> Self {
        let map = Map { row: 0, rank: 0, b: Vec::new(), gain: None };
        let side = Side { a: Vec::new(), ranks: 0, maps: vec![map] };
        Self { weights: vec![weight.clone()], biases: vec![None], sides: vec![side], d_in: weight.d_in() }
    }

    /// The maps of a group under each set of adapters, with its flat parameters.
    pub(super) fn of(groups: &[Group<'_>], flats: &[&[f32]]) -> Result<Self> {
        let first = &groups[0];
        let biases = first.members.iter().map(|m| m.bias.as_ref().map(values).transpose()).collect::<Result<_>>()?;
        Ok(Self {
            weights: first.members.iter().map(|m| m.weight.clone()).collect(),
            biases,
            sides: groups.iter().zip(flats).map(|(group, flat)| Side::new(group, flat)).collect(),
            d_in: first.d_in,
        })
    }

    pub(super) fn d_out(&self) -> usize {
        self.weights.iter().map(|w| w.d_out()).sum()
    }

    pub(super) fn d_in(&self) -> usize {
        self.d_in
    }

    /// u of each row [m, most ranks].
    fn inner(&self, x: &[f32], sets: &[usize]) -> (Vec<f32>, usize) {
        let (m, width) = (sets.len(), self.sides.iter().map(|s| s.ranks).max().unwrap_or(0));
        let row = |j: &usize| &x[j * self.d_in..][..self.d_in];
        // The rows of each set, and u of them by rank.
        let of_sets: Vec<(Vec<usize>, Vec<f32>)> = (0..self.sides.len())
            .map(|v| {
                let rows: Vec<usize> = (0..m).filter(|j| sets[*j] == v).collect();
                let x = if rows.len() == m { Vec::new() } else { rows.iter().flat_map(row).copied().collect() };
                (rows, x)
            })
            .collect();
        let mut by_rank: Vec<Vec<f32>> =
            self.sides.iter().zip(&of_sets).map(|(side, (rows, _))| vec![0f32; side.ranks * rows.len()]).collect();
        let mut tasks = Vec::new();
        for ((side, (rows, own)), values) in self.sides.iter().zip(&of_sets).zip(&mut by_rank) {
            let own = if rows.len() == m { x } else { own };
            let a = side.a.chunks((RANKS * self.d_in).max(1));
            tasks.extend(a.zip(values.chunks_mut((RANKS * rows.len()).max(1))).map(|(a, values)| (a, own, values)));
        }
        let work: usize = tasks.iter().map(|(a, _, values)| a.len() / RANKS * values.len() / 16).sum();
        parallel::tasks(tasks, work, |(a, x, values)| dots(a, x, self.d_in, values));
        let mut u = vec![0f32; m * width];
        for ((rows, _), values) in of_sets.iter().zip(&by_rank) {
            for (q, values) in values.chunks_exact(rows.len().max(1)).enumerate() {
                rows.iter().zip(values).for_each(|(j, value)| u[j * width + q] = *value);
            }
        }
        (u, width)
    }

    /// What is beside rows `first..first + rows` of a map, for each input row.
    fn beside<'a>(
        &'a self,
        (map, first, rows): (usize, usize, usize),
        (u, width): (&'a [f32], usize),
        sets: &'a [usize],
    ) -> Vec<Beside<'a>> {
        let side = |(j, v): (usize, &usize)| {
            let map = &self.sides[*v].maps[map];
            Beside { b: &map.b[first * map.rank..(first + rows) * map.rank], u: &u[j * width + map.row..][..map.rank] }
        };
        sets.iter().enumerate().map(side).collect()
    }

    /// Rows `first..` of a map for all input rows, y [rows, m].
    fn rows(
        &self,
        dots: &Dots<'_>,
        (map, first): (usize, usize),
        x: &[f32],
        u: (&[f32], usize),
        sets: &[usize],
        y: &mut [f32],
    ) {
        let m = sets.len();
        let rows = y.len() / m;
        dots(first, x, &self.beside((map, first, rows), u, sets), y);
        let gained = self.sides.iter().any(|s| s.maps[map].gain.is_some());
        for (r, y) in y.chunks_exact_mut(m).enumerate() {
            for (y, v) in y.iter_mut().zip(sets).filter(|_| gained) {
                *y *= self.sides[*v].maps[map].gain.as_ref().map_or(1.0, |g| g[first + r]);
            }
            if let Some(bias) = &self.biases[map] {
                y.iter_mut().for_each(|y| *y += bias[first + r]);
            }
        }
    }

    /// The outputs [m, d_out] of all maps for rows x [m, d_in], row j under the adapters sets`[j]`.
    pub(super) fn run(&self, x: &[f32], sets: &[usize]) -> Result<Vec<f32>> {
        let (m, d_out) = (sets.len(), self.d_out());
        let (u, width) = self.inner(x, sets);
        let mut by_output = vec![0f32; d_out * m];
        let mut tasks = Vec::new();
        let mut rest = &mut by_output[..];
        for (map, weight) in self.weights.iter().enumerate() {
            for first in (0..weight.d_out()).step_by(ROWS) {
                let (piece, after) = rest.split_at_mut(ROWS.min(weight.d_out() - first) * m);
                rest = after;
                tasks.push((map, first, piece));
            }
        }
        let weights: Vec<&FrozenWeight> = self.weights.iter().map(|w| &**w).collect();
        let mut tasks = Some(tasks);
        with_dots(&weights, &[], &mut |all| {
            parallel::tasks(tasks.take().unwrap_or_default(), d_out * self.d_in, |(map, first, y)| {
                self.rows(all[map], (map, first), x, (&u, width), sets, y);
            });
        })?;
        Ok(by_rows(by_output, m))
    }

    /// act(gate) up [m, d_out / 2], for maps whose outputs are gate and up, row j under the adapters sets`[j]`.
    pub(super) fn run_gated(
        &self,
        x: &[f32],
        sets: &[usize],
        act: impl Fn(&[f32], &[f32], &mut [f32]) + Sync,
    ) -> Result<Vec<f32>> {
        let (m, half) = (sets.len(), self.d_out() / 2);
        let (u, width) = self.inner(x, sets);
        let mut by_output = vec![0f32; half * m];
        let weights: Vec<&FrozenWeight> = self.weights.iter().map(|w| &**w).collect();
        // Up is a map of its own, or the second half of the only one.
        let up = if weights.len() == 2 { (1, 0) } else { (0, half) };
        with_dots(&weights, &[], &mut |all| {
            parallel::chunks(&mut by_output, ROWS * m, 2 * half * self.d_in, |i, y| {
                let mut both = [vec![0f32; y.len()], vec![0f32; y.len()]];
                let places = [(0, i * ROWS), (up.0, up.1 + i * ROWS)];
                for (place, sums) in places.into_iter().zip(&mut both) {
                    self.rows(all[place.0], place, x, (&u, width), sets, sums);
                }
                act(&both[0], &both[1], y);
            });
        })?;
        Ok(by_rows(by_output, m))
    }
}

/// [outputs, m] as [m, outputs].
fn by_rows(by_output: Vec<f32>, m: usize) -> Vec<f32> {
    if m == 1 {
        return by_output;
    }
    let outputs = by_output.len() / m;
    let mut rows = vec![0f32; by_output.len()];
    for (i, values) in by_output.chunks_exact(m).enumerate() {
        values.iter().enumerate().for_each(|(j, value)| rows[j * outputs + i] = *value);
    }
    rows
}
