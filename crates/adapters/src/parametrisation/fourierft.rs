//! FourierFT: a change with few entries in its spectrum, at places drawn once.
//!
//! Equation: y = W x + ΔW x, ΔW[p, q] = s / (m n) sum_k c_k cos(2 pi (u_k p / m + v_k q / n)), the real part of the inverse
//!           transform of a spectrum with c_k at (u_k, v_k). By cos(a + b) = cos a cos b - sin a sin b that is B diag(c, c) A, with
//!           cosines and sines of u in B and of v in A: taken so where that is less work than the dense change
//! Shapes:   x [.., n] -> y [.., m]; c `[n_frequency]` trained; A [2 n_frequency, n], B [m, 2 n_frequency] frozen, one pair for all
//!           layers of a shape
//! Source:   arXiv 2405.03003 eq. 2 to 4; places as PEFT draws them; c starts normal (PEFT), or at 0
//! Cost:     4 n_frequency (m + n) FLOPs a token forward, or 4 n_frequency m n a pass and 2 m n a token; n_frequency parameters a
//!           layer

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Shape, Tensor};
use espalier_kernels::frozen::FrozenWeight;
use serde::{Deserialize, Serialize};

use crate::adapter::{Adapter, Init, Method, Shared, Site};
use crate::formats::peft_config::PeftNames;
use crate::low_rank::LowRankView;
use crate::random::torch::{LONGEST, TorchGenerator};
use crate::target::{near_misses, pattern_key};
use crate::weight_space::product;
use crate::{Error, Flow, ParameterMap, Result, random};

const KEY: &str = "n_frequency";
const PATTERN: &str = "n_frequency_pattern";

/// How FourierFT is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Fourierft {
    /// Number of entries of a layer's spectrum.
    pub n_frequency: usize,
    /// Numbers of single modules: path ending or regular expression -> number.
    pub n_frequency_pattern: BTreeMap<String, usize>,
    /// Factor s.
    pub scaling: f64,
    /// Seed of the places.
    pub random_loc_seed: u64,
    /// Whether the spectrum starts at zero, so that the start is the base.
    pub init_zeros: bool,
}

impl Default for Fourierft {
    fn default() -> Self {
        Self {
            n_frequency: 1000,
            n_frequency_pattern: BTreeMap::new(),
            scaling: 150.0,
            random_loc_seed: 777,
            init_zeros: false,
        }
    }
}

impl Fourierft {
    /// Places (u, v) of the entries of an m x n spectrum.
    fn places(&self, (m, n): (usize, usize), count: usize) -> Vec<(usize, usize)> {
        let drawn = TorchGenerator::new(self.random_loc_seed).permutation(m * n, count);
        drawn.into_iter().map(|place| (place as usize / n, place as usize % n)).collect()
    }

    /// How many entries the spectrum of `site` has.
    fn count(&self, site: &Site) -> Result<usize> {
        let mut count = self.n_frequency;
        for (key, own) in &self.n_frequency_pattern {
            if pattern_key(PATTERN, key)?.is_match(&site.path) {
                count = *own;
                break;
            }
        }
        let all = site.d_out * site.d_in;
        if count == 0 || count > all {
            let message = format!("{}: {count}, of a spectrum of {} x {} = {all} entries", site.path, site.d_out, site.d_in);
            return Err(Error::config(KEY, message));
        }
        if all >= LONGEST {
            let reason = format!("places among {LONGEST} weights and more are drawn another way");
            return Err(Error::unsupported(format!("fourierft on {}", site.path), reason));
        }
        Ok(count)
    }
}

/// cos and `sign` sin of 2 pi f i / length, by whole turns so that large products lose nothing: for frequency f and place i.
fn waves(frequencies: &[usize], length: usize, sign: f64) -> Vec<Vec<f64>> {
    let angle = |f: usize, i: usize| std::f64::consts::TAU * ((f * i) % length) as f64 / length as f64;
    let cosines = frequencies.iter().map(|f| (0..length).map(|i| angle(*f, i).cos()).collect());
    let sines = frequencies.iter().map(|f| (0..length).map(|i| sign * angle(*f, i).sin()).collect());
    cosines.chain(sines).collect()
}

impl Method for Fourierft {
    type Layer = FourierftLayer;

    const PEFT: Option<PeftNames> =
        Some(PeftNames { kind: "FOURIERFT", keys: &[("init_zeros", "init_weights")], fixed: &[] });
    const TENSORS: &'static [&'static str] = &["fourierft_spectrum"];

    fn check_sites(&self, paths: &[&str]) -> Result<()> {
        for key in self.n_frequency_pattern.keys() {
            let pattern = pattern_key(PATTERN, key)?;
            if !paths.iter().any(|path| pattern.is_match(path)) {
                let near_misses = near_misses(key, paths.iter().map(|p| (*p).to_owned()));
                return Err(Error::NoTarget { key: PATTERN, pattern: key.clone(), near_misses });
            }
        }
        Ok(())
    }

    fn attach(&self, site: &Site, init: &mut Init<'_>) -> Result<FourierftLayer> {
        site.refuse_lookup("fourierft")?;
        let count = self.count(site)?;
        let (m, n) = (site.d_out, site.d_in);
        let of_shape = |side: &str| format!("fourierft {side} {m} x {n}, {count}");
        let a = init.shared(&of_shape("A"), (2 * count, n), Shared::Remade, |_, shape, device| {
            let v: Vec<usize> = self.places((m, n), count).into_iter().map(|(_, v)| v).collect();
            matrix(&waves(&v, n, 1.0), shape, device)
        })?;
        let b = init.shared(&of_shape("B"), (m, 2 * count), Shared::Remade, |_, _, device| {
            let u: Vec<usize> = self.places((m, n), count).into_iter().map(|(u, _)| u).collect();
            Ok(matrix(&waves(&u, m, -1.0), &Shape::from((2 * count, m)), device)?.t()?.contiguous()?)
        })?;
        let std = if self.init_zeros { 0.0 } else { 1.0 };
        let spectrum =
            init.trainable("fourierft_spectrum", count, |rng, shape, device| random::normal(rng, std, shape, device))?;
        Ok(FourierftLayer { a, b, spectrum, scale: self.scaling / (m * n) as f64 })
    }

    fn examples() -> Vec<(String, Self)> {
        let small = Self { n_frequency: 1, scaling: 80.0, ..Self::default() };
        vec![
            ("few entries".to_owned(), small.clone()),
            ("from zero".to_owned(), Self { init_zeros: true, ..small.clone() }),
            ("many entries".to_owned(), Self { n_frequency: 40, scaling: 15.0, random_loc_seed: 5, ..small }),
        ]
    }

    fn starts_at_base(&self) -> bool {
        self.init_zeros
    }
}

fn matrix(rows: &[Vec<f64>], shape: &Shape, device: &Device) -> Result<Tensor> {
    Ok(Tensor::from_vec(rows.concat(), shape.clone(), &Device::Cpu)?.to_device(device)?)
}

/// The entries of the spectrum at one site, and the waves of its shape.
#[derive(Debug)]
pub struct FourierftLayer {
    a: Tensor,
    b: Tensor,
    spectrum: Tensor,
    scale: f64,
}

impl FourierftLayer {
    /// Whether the two factors are less work than the dense change.
    fn is_low(&self) -> Result<bool> {
        let ((rank, n), m) = (self.a.dims2()?, self.b.dim(0)?);
        Ok(rank * (m + n) <= m * n)
    }

    fn view(&self) -> Result<LowRankView> {
        let twice = Tensor::cat(&[&self.spectrum, &self.spectrum], 0)?;
        Ok(LowRankView::new(&self.a, &self.b, self.scale).rank_scale(&twice))
    }
}

impl Adapter for FourierftLayer {
    fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, _flow: &Flow) -> Result<Tensor> {
        if self.is_low()? {
            return self.view()?.forward(base, x, None);
        }
        let factors = (Tensor::cat(&[&self.spectrum, &self.spectrum], 0)? * self.scale)?;
        let delta = self.b.broadcast_mul(&factors)?.matmul(&self.a)?;
        let change = product(&x.to_dtype(delta.dtype())?, &delta)?;
        Ok((base.forward(x)?.to_dtype(change.dtype())? + change)?.to_dtype(x.dtype())?)
    }

    fn delta(&self, _base: &Arc<FrozenWeight>) -> Result<Option<Tensor>> {
        self.view()?.dense_product(DType::F32).map(Some)
    }

    fn parameters(&self) -> ParameterMap {
        let mut map = ParameterMap::new();
        map.push("fourierft_spectrum", &self.spectrum, true);
        map
    }

    fn low_rank(&self, _base: &Arc<FrozenWeight>) -> Result<Option<LowRankView>> {
        self.is_low()?.then(|| self.view()).transpose()
    }
}
