//! AdamW with decoupled weight decay.
//!
//! Equation: p <- p (1 - lr wd); m <- m + (1 - b1)(g - m); v <- b2 v + (1 - b2) g^2;
//!           p <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
//! Shapes:   p, g, m, v of one shape; t one count, or one a row or column
//! Source:   arXiv 1711.05101 algorithm 2; order of operations and rounding as torch.optim.AdamW
//! Cost:     about 12 FLOPs and 28 bytes a parameter and step

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use rayon::prelude::*;

use super::{Rule, Steps, Work};
use crate::recipe::Recipe;
use crate::{Error, Result};

/// The rule's settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
}

impl AdamW {
    /// The recipe's settings.
    ///
    /// # Errors
    /// Never; other rules check theirs.
    pub fn of(recipe: &Recipe) -> Result<Self> {
        Ok(Self { beta1: recipe.beta1, beta2: recipe.beta2, eps: recipe.adam_eps })
    }

    fn scalars(&self, work: &Work<'_>, steps: usize) -> Scalars {
        let (t, lr) = (steps as i32, work.at.lr);
        Scalars {
            keep: (1.0 - lr * work.at.decay) as f32,
            lerp: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            square: (1.0 - self.beta2) as f32,
            rate: (lr / (1.0 - self.beta1.powi(t))) as f32,
            root: (1.0 - self.beta2.powi(t)).sqrt() as f32,
            eps: self.eps as f32,
            scale: work.at.scale as f32,
        }
    }

    /// The update where rows or columns have counts of their own.
    fn by_line(&self, work: &Work<'_>, counts: &Tensor) -> Result<(Tensor, Vec<Tensor>)> {
        let (p, m, v) = (work.parameter, &work.slots[0], &work.slots[1]);
        // A line that has not moved yet has no moments: any count gives it no update.
        let counts = counts.to_dtype(DType::F64)?.maximum(1.0)?;
        let power = |beta: f64| -> Result<Tensor> { Ok(((counts.ones_like()? * beta)?.pow(&counts)?.neg()? + 1.0)?) };
        let rate = (power(self.beta1)?.recip()? * work.at.lr)?.to_dtype(DType::F32)?;
        let root = power(self.beta2)?.sqrt()?.to_dtype(DType::F32)?;
        let g = (work.gradient * work.at.scale)?;
        let m = (m + ((&g - m)? * (1.0 - self.beta1))?)?;
        let v = ((v * self.beta2)? + (g.sqr()? * (1.0 - self.beta2))?)?;
        let denominator = (v.sqrt()?.broadcast_div(&root)? + self.eps)?;
        let kept = (p.to_dtype(DType::F32)? * (1.0 - work.at.lr * work.at.decay))?;
        let moved = (kept - (&m / denominator)?.broadcast_mul(&rate)?)?;
        Ok((moved.to_dtype(p.dtype())?, vec![m, v]))
    }
}

impl Rule for AdamW {
    fn slots(&self, _: &[usize]) -> &'static [&'static str] {
        &["m", "v"]
    }

    fn update(&self, work: &Work<'_>) -> Result<(Tensor, Vec<Tensor>)> {
        let (p, m, v) = (work.parameter, &work.slots[0], &work.slots[1]);
        let steps = match work.at.steps {
            Steps::All(steps) => *steps,
            Steps::Each(counts) => return self.by_line(work, counts),
        };
        let scalars = self.scalars(work, steps);
        let (p, m, v) = match p.device() {
            Device::Cpu => scalars.on_host(p, work.gradient, m, v)?,
            _ => scalars.on_device(p, work.gradient, m, v)?,
        };
        Ok((p, vec![m, v]))
    }

    /// Parameters and moments of one count are written where they are by one launch.
    #[cfg(feature = "cuda")]
    fn launch(&self, work: &[Work<'_>]) -> Result<Vec<bool>> {
        use espalier_kernels::cuda::{is_flat, optimizer};
        let count = |w: &Work<'_>| match w.at.steps {
            Steps::All(n) if is_flat(w.parameter) && w.slots.iter().all(is_flat) => Some(*n),
            _ => None,
        };
        let counts: Vec<Option<usize>> = work.iter().map(count).collect();
        let mut different: Vec<usize> = counts.iter().flatten().copied().collect();
        different.sort_unstable();
        different.dedup();
        for steps in different {
            let these: Vec<(&Work<'_>, Scalars)> = (work.iter().zip(&counts))
                .filter(|(_, n)| **n == Some(steps))
                .map(|(w, _)| (w, self.scalars(w, steps)))
                .collect();
            let Some((_, Scalars { lerp, beta2, square, root, eps, scale, .. })) = these.first().copied() else {
                continue;
            };
            let updates: Vec<_> = these
                .iter()
                .map(|(w, scalars)| optimizer::Update {
                    parameter: w.parameter,
                    gradient: w.gradient,
                    first: &w.slots[0],
                    second: &w.slots[1],
                    keep: scalars.keep,
                    rate: scalars.rate,
                })
                .collect();
            optimizer::adamw(&updates, optimizer::Scalars { lerp, beta2, square, root, eps, scale })?;
        }
        Ok(counts.iter().map(Option::is_some).collect())
    }
}

/// The scalars of one parameter's update, rounded as the reference rounds them.
#[derive(Debug, Clone, Copy)]
struct Scalars {
    keep: f32,
    lerp: f32,
    beta2: f32,
    square: f32,
    rate: f32,
    root: f32,
    eps: f32,
    scale: f32,
}

impl Scalars {
    fn on_host(&self, p: &Tensor, g: &Tensor, m: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        const CHUNK: usize = 1 << 14;
        let n = p.elem_count();
        if g.elem_count() != n {
            return Err(Error::recipe("gradient", format!("{} values for {n} parameters", g.elem_count())));
        }
        let flat = |t: &Tensor| t.to_dtype(DType::F32)?.contiguous();
        let (p32, g, m, v) = (flat(p)?, flat(g)?, flat(m)?, flat(v)?);
        let (mut p_new, mut m_new, mut v_new) = (vec![0f32; n], vec![0f32; n], vec![0f32; n]);
        with_values([&p32, &g, &m, &v], |[p, g, m, v]| {
            let moved = p_new.par_chunks_mut(CHUNK).zip(m_new.par_chunks_mut(CHUNK)).zip(v_new.par_chunks_mut(CHUNK));
            moved.enumerate().for_each(|(chunk, ((p_new, m_new), v_new))| {
                let at = chunk * CHUNK..chunk * CHUNK + p_new.len();
                let (p, g, m, v) = (&p[at.clone()], &g[at.clone()], &m[at.clone()], &v[at]);
                for i in 0..p_new.len() {
                    let g = g[i] * self.scale;
                    m_new[i] = m[i] + self.lerp * (g - m[i]);
                    v_new[i] = v[i] * self.beta2 + self.square * g * g;
                    let root = v_new[i].sqrt() / self.root + self.eps;
                    p_new[i] = p[i] * self.keep - self.rate * (m_new[i] / root);
                }
            });
        })?;
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

/// Calls `f` with the values of f32 tensors in the host's memory, each in one piece.
fn with_values<const N: usize>(tensors: [&Tensor; N], f: impl FnOnce([&[f32]; N])) -> Result<()> {
    let stored = tensors.map(Tensor::storage_and_layout);
    let mut values = [&[][..]; N];
    for (slot, (storage, layout)) in values.iter_mut().zip(&stored) {
        match (&**storage, layout.contiguous_offsets()) {
            (Storage::Cpu(CpuStorage::F32(all)), Some((start, end))) => *slot = &all[start..end],
            _ => return Err(Error::run("optimizer", "values that are not f32 in one piece")),
        }
    }
    f(values);
    Ok(())
}
