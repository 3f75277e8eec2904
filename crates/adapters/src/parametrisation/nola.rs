//! NOLA: A and B of LoRA as combinations of random matrices that a seed gives, of which only the coefficients are trained.
//!
//! Equation: y = W x + s B A x; A = A_0 + sum_i a_i A_i, B = sum_j b_j B_j, with s = alpha / r
//! Shapes:   x [.., d_in] -> y [.., d_out]; A_i [r, d_in], B_j [d_out, r] frozen and never stored; a `[k]`, b `[k]` trained
//! Source:   arXiv 2310.02556 eq. 3; A_0, the entries U(-1, 1) / sqrt(k) and a = b = 0 at start as in its language-model code
//! Cost:     2 k r (d_in + d_out) FLOPs and as many draws a pass, both ways, whatever the number of tokens; LoRA's beside it;
//!           2 k parameters a layer

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Shape, Tensor, bail};
use espalier_kernels::frozen::FrozenWeight;
use rand::Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::adapter::{Adapter, Init, Method, Site, checked_dropout};
use crate::low_rank::LowRankView;
use crate::{Error, Flow, ParameterMap, Result, random};

/// How NOLA is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Nola {
    /// Rank r of A and B, which costs no parameters.
    pub r: usize,
    /// Number k of random matrices of each side.
    pub bases: usize,
    /// Numerator of the scaling alpha / r.
    pub alpha: f64,
    /// Probability of dropping an input of A while training.
    pub dropout: f64,
    /// Seed of the random matrices; part of the file.
    pub basis_seed: u64,
    /// Whether layers of one shape have the same random matrices.
    pub shared: bool,
}

impl Default for Nola {
    fn default() -> Self {
        Self { r: 8, bases: 64, alpha: 16.0, dropout: 0.0, basis_seed: 0, shared: false }
    }
}

impl Method for Nola {
    type Layer = NolaLayer;

    fn attach(&self, site: &Site, init: &mut Init<'_>) -> Result<NolaLayer> {
        site.refuse_lookup("nola")?;
        let r = site.checked_rank()?;
        if self.bases == 0 {
            return Err(Error::config("bases", "at least one random matrix is needed"));
        }
        let place = |side: &str, rows: usize, columns: usize| match self.shared {
            true => format!("{side} {rows}x{columns}"),
            false => format!("{}.{side}", site.path),
        };
        let basis = |name: String, shape: (usize, usize)| Basis { seed: self.basis_seed, name, count: self.bases, shape };
        let bound = 1.0 / (site.d_in as f64).sqrt();
        let mut rng = random::stream(self.basis_seed, &place("nola_A_0", r, site.d_in));
        let start = random::uniform(&mut rng, bound, (r, site.d_in), &init.device)?.to_dtype(init.dtype)?;
        let down = basis(place("nola_A", r, site.d_in), (r, site.d_in));
        let up = basis(place("nola_B", site.d_out, r), (site.d_out, r));
        let check = Tensor::from_vec(down.first_column(), r, &init.device)?.to_dtype(init.dtype)?;
        let kept = init.frozen("nola_check", r, |_, _, _| Ok(check.clone()))?;
        let apart = (&kept - &check)?.abs()?.max_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        if apart > 1e-6 {
            return Err(Error::config(
                "basis_seed",
                format!("{}: the settings give other random matrices than the file was trained with", site.path),
            ));
        }
        Ok(NolaLayer {
            path: site.path.clone(),
            check,
            a: init.zeros("nola_alpha", self.bases)?,
            b: init.zeros("nola_beta", self.bases)?,
            start,
            down,
            up,
            scale: site.alpha / r as f64,
            dropout: checked_dropout(self.dropout)?,
        })
    }

    fn rank_and_alpha(&self) -> (usize, f64) {
        (self.r, self.alpha)
    }

    fn examples() -> Vec<(String, Self)> {
        let small = Self { r: 3, bases: 7, alpha: 4.0, ..Self::default() };
        vec![
            ("as it comes".to_owned(), Self::default()),
            ("shared bases".to_owned(), Self { shared: true, basis_seed: 5, ..small.clone() }),
            ("dropout".to_owned(), Self { dropout: 0.4, ..small }),
        ]
    }
}

/// Random matrices that exist only while they are mixed.
#[derive(Debug, Clone)]
struct Basis {
    seed: u64,
    name: String,
    count: usize,
    shape: (usize, usize),
}

/// Values of a matrix drawn and used at once, so that a mixture needs no more memory than its result.
const PIECE: usize = 1 << 12;
/// 32-bit words of the generator that a value takes.
const WORDS: u128 = 1;

impl Basis {
    fn size(&self) -> usize {
        self.shape.0 * self.shape.1
    }

    /// Calls `take` with values `from ..` of matrix `index`, U(-1, 1) / sqrt(k), as many as `values` holds.
    fn draw(&self, rng: &rand_chacha::ChaCha8Rng, index: usize, from: usize, values: &mut [f32]) {
        let mut rng = rng.clone();
        rng.set_word_pos((index * self.size() + from) as u128 * WORDS);
        let unit = 1.0 / (self.count as f32).sqrt();
        for value in values {
            *value = ((rng.random::<u32>() >> 8) as f32 * (2.0 / 16_777_216.0) - 1.0) * unit;
        }
    }

    /// The first column of the first matrix.
    fn first_column(&self) -> Vec<f32> {
        let rng = random::stream(self.seed, &self.name);
        let mut one = [0f32];
        let mut at = |row: usize| {
            self.draw(&rng, 0, row * self.shape.1, &mut one);
            one[0]
        };
        (0..self.shape.0).map(&mut at).collect()
    }

    /// sum_i c_i M_i.
    fn mixed(&self, coefficients: &[f64]) -> Vec<f64> {
        let rng = random::stream(self.seed, &self.name);
        let mut sum = vec![0f64; self.size()];
        sum.par_chunks_mut(PIECE).enumerate().for_each(|(piece, sum)| {
            let mut values = vec![0f32; sum.len()];
            for (i, c) in coefficients.iter().enumerate().filter(|(_, c)| **c != 0.0) {
                self.draw(&rng, i, piece * PIECE, &mut values);
                sum.iter_mut().zip(&values).for_each(|(s, v)| *s += c * f64::from(*v));
            }
        });
        sum
    }

    /// <M_i, g> for every i.
    fn projected(&self, gradient: &[f64]) -> Vec<f64> {
        let rng = random::stream(self.seed, &self.name);
        (0..self.count)
            .into_par_iter()
            .map(|i| {
                let mut values = [0f32; PIECE];
                let mut sum = 0.0;
                for (piece, gradient) in gradient.chunks(PIECE).enumerate() {
                    let values = &mut values[..gradient.len()];
                    self.draw(&rng, i, piece * PIECE, values);
                    sum += gradient.iter().zip(&*values).map(|(g, v)| g * f64::from(*v)).sum::<f64>();
                }
                sum
            })
            .collect()
    }

    /// The mixture on the tape, in the dtype and on the device of `coefficients`; made on the host.
    fn mix(&self, coefficients: &Tensor) -> Result<Tensor> {
        let host = coefficients.to_device(&candle_core::Device::Cpu)?;
        Ok(host.apply_op1(self.clone())?.to_device(coefficients.device())?)
    }
}

fn as_f64(storage: &CpuStorage, layout: &Layout) -> candle_core::Result<Vec<f64>> {
    let Some((start, end)) = layout.contiguous_offsets() else { bail!("coefficients are not contiguous") };
    match storage {
        CpuStorage::F32(values) => Ok(values[start..end].iter().map(|v| f64::from(*v)).collect()),
        CpuStorage::F64(values) => Ok(values[start..end].to_vec()),
        other => bail!("coefficients of {:?} are not mixed", candle_core::backend::BackendStorage::dtype(other)),
    }
}

impl CustomOp1 for Basis {
    fn name(&self) -> &'static str {
        "random-mixture"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let sum = self.mixed(&as_f64(storage, layout)?);
        let sum = match storage {
            CpuStorage::F64(_) => CpuStorage::F64(sum),
            _ => CpuStorage::F32(sum.into_iter().map(|v| v as f32).collect()),
        };
        Ok((sum, Shape::from(self.shape)))
    }

    fn bwd(&self, coefficients: &Tensor, _: &Tensor, gradient: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let gradient = gradient.detach().flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let own = Tensor::from_vec(self.projected(&gradient), self.count, coefficients.device())?;
        own.to_dtype(coefficients.dtype()).map(Some)
    }
}

/// The coefficients at one site.
#[derive(Debug)]
pub struct NolaLayer {
    path: String,
    a: Tensor,
    b: Tensor,
    /// The first column of A_1, by which a file knows its random matrices.
    check: Tensor,
    /// A_0.
    start: Tensor,
    down: Basis,
    up: Basis,
    scale: f64,
    dropout: f64,
}

impl Adapter for NolaLayer {
    fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, flow: &Flow) -> Result<Tensor> {
        self.view()?.forward(base, x, flow.dropped(x, self.dropout, &self.path)?.as_ref())
    }

    fn parameters(&self) -> ParameterMap {
        let mut map = ParameterMap::new();
        map.push("nola_alpha", &self.a, true);
        map.push("nola_beta", &self.b, true);
        map.push("nola_check", &self.check, false);
        map
    }

    fn low_rank(&self, _base: &Arc<FrozenWeight>) -> Result<Option<LowRankView>> {
        self.view().map(Some)
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }
}

impl NolaLayer {
    fn view(&self) -> Result<LowRankView> {
        let a = (&self.start + self.down.mix(&self.a)?)?;
        Ok(LowRankView::new(&a, &self.up.mix(&self.b)?, self.scale))
    }
}
