//! AdamW with decoupled weight decay.
//!
//! Equation: p <- p (1 - lr wd); m <- m + (1 - b1)(g - m); v <- b2 v + (1 - b2) g^2;
//!           p <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
//! Shapes:   p, g, m, v of one shape
//! Source:   arXiv 1711.05101 algorithm 2; order of operations and rounding as torch.optim.AdamW
//! Cost:     about 12 FLOPs and 28 bytes a parameter and step

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use rayon::prelude::*;

use crate::{Error, Result};

/// Settings of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// First and second moments of a list of parameters.
#[derive(Debug)]
pub struct AdamW {
    names: Vec<String>,
    parameters: Vec<Var>,
    factors: Vec<f64>,
    first: Vec<Tensor>,
    second: Vec<Tensor>,
    step: usize,
}

impl AdamW {
    /// Moments at zero for `parameters` (name, variable), each with its factor on the learning rate.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn new(parameters: Vec<(String, Var)>, factors: Vec<f64>) -> Result<Self> {
        let zeros = |v: &Var| Ok(Tensor::zeros(v.shape(), DType::F32, v.device())?);
        let first = parameters.iter().map(|(_, v)| zeros(v)).collect::<Result<Vec<_>>>()?;
        let second = parameters.iter().map(|(_, v)| zeros(v)).collect::<Result<Vec<_>>>()?;
        let (names, parameters) = parameters.into_iter().unzip();
        Ok(Self { names, parameters, factors, first, second, step: 0 })
    }

    /// Steps taken.
    pub fn steps(&self) -> usize {
        self.step
    }

    /// The parameters, in order.
    pub fn parameters(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.names.iter().map(String::as_str).zip(&self.parameters)
    }

    /// One update; `scale` multiplies the gradients (clipping). Parameters without a gradient stay as they are.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn step(&mut self, gradients: &[Option<Tensor>], scale: f64, settings: AdamWStep) -> Result<()> {
        self.step += 1;
        let t = self.step as i32;
        let mut together = Vec::new();
        for (i, gradient) in gradients.iter().enumerate().take(self.parameters.len()) {
            let Some(gradient) = gradient else { continue };
            let lr = settings.lr * self.factors[i];
            let update = Update {
                keep: (1.0 - lr * settings.weight_decay) as f32,
                lerp: (1.0 - settings.beta1) as f32,
                beta2: settings.beta2 as f32,
                square: (1.0 - settings.beta2) as f32,
                rate: (lr / (1.0 - settings.beta1.powi(t))) as f32,
                root: (1.0 - settings.beta2.powi(t)).sqrt() as f32,
                eps: settings.eps as f32,
                scale: scale as f32,
            };
            let (p, m, v) = (&self.parameters[i], &self.first[i], &self.second[i]);
            if in_place([p, m, v]) {
                together.push((i, gradient.to_dtype(DType::F32)?.contiguous()?, update));
                continue;
            }
            let (p_new, m_new, v_new) = match p.device() {
                Device::Cpu => update.on_host(p, gradient, m, v)?,
                _ => update.on_device(p, gradient, m, v)?,
            };
            p.set(&p_new)?;
            self.first[i] = m_new;
            self.second[i] = v_new;
        }
        self.step_in_place(&together)
    }

    /// The updates of parameters and moments that one launch writes where they are.
    #[cfg(feature = "cuda")]
    fn step_in_place(&self, together: &[(usize, Tensor, Update)]) -> Result<()> {
        use espalier_kernels::cuda::optimizer;
        let Some(&(_, _, Update { lerp, beta2, square, root, eps, scale, .. })) = together.first() else {
            return Ok(());
        };
        let updates: Vec<_> = together
            .iter()
            .map(|(i, gradient, update)| optimizer::Update {
                parameter: &self.parameters[*i],
                gradient,
                first: &self.first[*i],
                second: &self.second[*i],
                keep: update.keep,
                rate: update.rate,
            })
            .collect();
        Ok(optimizer::adamw(&updates, optimizer::Scalars { lerp, beta2, square, root, eps, scale })?)
    }

    #[cfg(not(feature = "cuda"))]
    fn step_in_place(&self, _: &[(usize, Tensor, Update)]) -> Result<()> {
        Ok(())
    }

    /// Moments by name, for checkpoints: `m.<name>` and `v.<name>`. On a CUDA device they are the moments themselves, which
    /// the next step changes.
    pub fn state(&self) -> BTreeMap<String, Tensor> {
        let moments = |prefix: &str, tensors: &[Tensor]| {
            self.names.iter().zip(tensors).map(|(n, t)| (format!("{prefix}.{n}"), t.clone())).collect::<Vec<_>>()
        };
        moments("m", &self.first).into_iter().chain(moments("v", &self.second)).collect()
    }

    /// Puts back the moments and the number of steps.
    ///
    /// # Errors
    /// If a moment is missing or has another shape.
    pub fn restore(&mut self, mut state: BTreeMap<String, Tensor>, steps: usize) -> Result<()> {
        for (i, name) in self.names.iter().enumerate() {
            let shape = self.parameters[i].shape().clone();
            let device = self.parameters[i].device().clone();
            let mut take = |prefix: &str| match state.remove(&format!("{prefix}.{name}")) {
                // A copy, for a step may write the moments where they are.
                Some(t) if *t.shape() == shape && t.device().same_device(&device) => Ok(t.copy()?),
                Some(t) if *t.shape() == shape => Ok(t.to_device(&device)?),
                Some(t) => {
                    Err(Error::run(format!("{prefix}.{name}"), format!("shape {:?}, wanted {shape:?}", t.shape())))
                }
                None => Err(Error::run(format!("{prefix}.{name}"), "missing in the optimiser's state")),
            };
            self.first[i] = take("m")?;
            self.second[i] = take("v")?;
        }
        match state.into_keys().next() {
            Some(name) => Err(Error::run(name, "belongs to no parameter of this run")),
            None => {
                self.step = steps;
                Ok(())
            }
        }
    }
}

/// Whether a parameter and its moments are updated together with others, where they are.
#[cfg(feature = "cuda")]
fn in_place(tensors: [&Tensor; 3]) -> bool {
    tensors.into_iter().all(espalier_kernels::cuda::is_flat)
}

#[cfg(not(feature = "cuda"))]
fn in_place(_: [&Tensor; 3]) -> bool {
    false
}

/// The scalars of one parameter's update, rounded as the reference rounds them.
#[derive(Debug, Clone, Copy)]
struct Update {
    keep: f32,
    lerp: f32,
    beta2: f32,
    square: f32,
    rate: f32,
    root: f32,
    eps: f32,
    scale: f32,
}

impl Update {
    fn on_host(&self, p: &Tensor, g: &Tensor, m: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let host = |t: &Tensor| t.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>();
        let (mut p_new, g, mut m_new, mut v_new) = (host(p)?, host(g)?, host(m)?, host(v)?);
        if g.len() != p_new.len() {
            return Err(Error::recipe("gradient", format!("{} values for {} parameters", g.len(), p_new.len())));
        }
        const CHUNK: usize = 1 << 14;
        p_new
            .par_chunks_mut(CHUNK)
            .zip(m_new.par_chunks_mut(CHUNK))
            .zip(v_new.par_chunks_mut(CHUNK))
            .zip(g.par_chunks(CHUNK))
            .for_each(|(((p, m), v), g)| {
                for i in 0..p.len() {
                    let g = g[i] * self.scale;
                    m[i] += self.lerp * (g - m[i]);
                    v[i] = v[i] * self.beta2 + self.square * g * g;
                    let root = v[i].sqrt() / self.root + self.eps;
                    p[i] = p[i] * self.keep - self.rate * (m[i] / root);
                }
            });
        let device = |values: Vec<f32>| Tensor::from_vec(values, p.shape(), &Device::Cpu);
        Ok((device(p_new)?.to_dtype(p.dtype())?, device(m_new)?, device(v_new)?))
    }

    fn on_device(&self, p: &Tensor, g: &Tensor, m: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let f = f64::from;
        let g = (g.to_dtype(DType::F32)? * f(self.scale))?;
        let m = (m + ((&g - m)? * f(self.lerp))?)?;
        let v = ((v * f(self.beta2))? + (g.sqr()? * f(self.square))?)?;
        let root = ((v.sqrt()? / f(self.root))? + f(self.eps))?;
        let p_new = ((p.to_dtype(DType::F32)? * f(self.keep))? - ((&m / root)? * f(self.rate))?)?;
        Ok((p_new.detach().to_dtype(p.dtype())?, m.detach(), v.detach()))
    }
}
