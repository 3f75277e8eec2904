//! LoRA-Pro: A and B move so that the change of the whole weight is as close to full fine-tuning's as it can be.
//!
//! Equation: dA = (B^T B)^-1 g(A) / s^2 + X A; dB = (I - P_B) g(B) (A A^T)^-1 / s^2 - B X; G = s B dA + s dB A, which is the
//!           nearest to dL/dW under any X; B^T B X + X A A^T = -(B^T B)^-1 g(A) A^T / s^2 brings dA, dB nearest to g(A), g(B)
//! Shapes:   A, dA [r, d_in]; B, dB [d_out, r]; X [r, r]; G [d_out, d_in]
//! Source:   arXiv 2407.18242 theorems 2.1 to 2.3 and appendix C; `full` keeps the optimiser's moments of G, adjusts the direction
//!           they give, and is the authors' release (but for its count of steps, which is one ahead, and for directions of A and B within
//!           rounding of 0, which it inverts); `efficient` keeps
//!           those of dA and dB
//! Cost:     8 r d_in d_out FLOPs and moments of d_in d_out values a site with `full`; 8 r^2 (d_in + d_out) FLOPs with
//!           `efficient`

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Dynamics, Example, Fit, Moving, Rates, Settings, Sums};
use crate::optimizer::{NO_HOLDS, Step, rule};
use crate::pairs::{Pair, pairs};
use crate::small::Eigen;
use crate::{Error, Result};

/// What the optimiser's moments are of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Moments {
    /// The equivalent gradient of the whole weight.
    #[default]
    Full,
    /// The adjusted gradients of A and B.
    Efficient,
}

/// The one freedom that is left, X.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Freedom {
    /// The solution of the Sylvester equation.
    #[default]
    Sylvester,
    /// X = 0.
    Zero,
    /// What both sides have in common is shared evenly: X = -(B^T B)^-1 B^T g(B) (A A^T)^-1 / (2 s^2).
    Symmetric,
}

/// What keeps B^T B and A A^T apart from singular ones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Damping {
    /// 1e-8 I, as the release adds.
    #[default]
    Absolute,
    /// 1e-6 of the mean eigenvalue.
    Relative,
}

/// How LoRA-Pro is set up.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraPro {
    /// What the optimiser's moments are of: full, efficient.
    pub moments: Moments,
    /// The freedom X: sylvester, zero, symmetric.
    pub freedom: Freedom,
    /// What keeps inverses finite: absolute, relative.
    pub damping: Damping,
}

impl Settings for LoraPro {
    type State = State;

    fn fit(&self, fit: &mut Fit<'_>) -> Result<State> {
        let pairs = pairs("lora-pro", fit.model, fit.attached)?;
        let rule = rule(fit.recipe)?;
        // Without moments both forms are one.
        let full = self.moments == Moments::Full && !rule.slots(&[1, 1]).is_empty();
        let mut more = 0i64;
        for pair in pairs.iter().filter(|_| full) {
            let bytes = |dims: &[usize]| 4 * (rule.slots(dims).len() * dims.iter().product::<usize>()) as i64;
            more += bytes(&whole(pair)) - bytes(pair.down.tensor.dims()) - bytes(pair.up.tensor.dims());
        }
        Ok(State { settings: self.clone(), full, pairs, more, square: 0.0 })
    }

    fn examples() -> Vec<Example<Self>> {
        let adapter = "method = 'lora'\nr = 3\ndropout = 0.1";
        let efficient = Self { moments: Moments::Efficient, ..Self::default() };
        vec![
            Example { name: "as it comes", settings: Self::default(), adapter },
            Example { name: "efficient", settings: efficient.clone(), adapter },
            Example { name: "symmetric", settings: Self { freedom: Freedom::Symmetric, ..efficient.clone() }, adapter },
            Example {
                name: "relative damping, X = 0",
                settings: Self { freedom: Freedom::Zero, damping: Damping::Relative, ..efficient },
                adapter: "method = 'lora'\nr = 3\ninit = 'pissa'",
            },
        ]
    }
}

/// Shape of the whole weight of a pair.
fn whole(pair: &Pair) -> [usize; 2] {
    [pair.base.d_out(), pair.base.d_in()]
}

/// What the adjustment of the gradients of one product needs of A and B.
#[derive(Debug)]
pub struct Frame {
    a: Tensor,
    b: Tensor,
    scale: f64,
    gram_a: Eigen,
    gram_b: Eigen,
    inverse_a: Tensor,
    inverse_b: Tensor,
}

impl Frame {
    /// Of the product `scale` B A.
    ///
    /// # Errors
    /// If values are not finite or shapes do not fit.
    pub fn new(a: &Tensor, b: &Tensor, scale: f64, damping: Damping) -> Result<Self> {
        let (a, b) = (a.detach(), b.detach());
        let gram = |rows: Tensor| -> Result<(Eigen, Tensor)> {
            let eigen = Eigen::of_rows(&rows)?;
            let damping = match damping {
                Damping::Absolute => 1e-8,
                Damping::Relative if eigen.sum() > 0.0 => 1e-6 * eigen.sum() / rows.dim(0)? as f64,
                // Of nothing but 0 any inverse will do, for the gradient on the other side is 0 as well.
                Damping::Relative => 1.0,
            };
            let inverse = eigen.inverse(damping, &rows)?;
            Ok((eigen, inverse))
        };
        let (gram_a, inverse_a) = gram(a.clone())?;
        let (gram_b, inverse_b) = gram(b.t()?.contiguous()?)?;
        Ok(Self { a, b, scale, gram_a, gram_b, inverse_a, inverse_b })
    }

    /// dA and dB under X = 0, from the gradients of A and B.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn nearest(&self, ga: &Tensor, gb: &Tensor) -> Result<(Tensor, Tensor)> {
        let square = self.scale * self.scale;
        let da = (self.inverse_b.matmul(ga)? / square)?;
        let inside = self.b.matmul(&self.inverse_b.matmul(&self.b.t()?.matmul(gb)?)?)?;
        let db = ((gb - inside)?.matmul(&self.inverse_a)? / square)?;
        Ok((da, db))
    }

    /// The freedom X.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn freedom(&self, ga: &Tensor, gb: &Tensor, freedom: Freedom) -> Result<Option<Tensor>> {
        let square = self.scale * self.scale;
        Ok(match freedom {
            Freedom::Zero => None,
            Freedom::Sylvester => {
                let c = (self.inverse_b.matmul(&ga.matmul(&self.a.t()?)?)? / -square)?;
                Some(self.gram_b.sylvester(&self.gram_a, &c)?)
            }
            Freedom::Symmetric => {
                let inner = self.inverse_b.matmul(&self.b.t()?.matmul(gb)?)?;
                Some((inner.matmul(&self.inverse_a)? / (-2.0 * square))?)
            }
        })
    }

    /// dA and dB from the gradients of A and B.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn adjusted(&self, ga: &Tensor, gb: &Tensor, freedom: Freedom) -> Result<(Tensor, Tensor)> {
        let (da, db) = self.nearest(ga, gb)?;
        match self.freedom(ga, gb, freedom)? {
            Some(x) => Ok(((da + x.matmul(&self.a)?)?, (db - self.b.matmul(&x)?)?)),
            None => Ok((da, db)),
        }
    }

    /// The equivalent gradient s B dA + s dB A of the whole weight [d_out, d_in].
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn equivalent(&self, da: &Tensor, db: &Tensor) -> Result<Tensor> {
        let left = Tensor::cat(&[&self.b, db], 1)?;
        let right = Tensor::cat(&[da, &self.a], 0)?;
        Ok((left.matmul(&right)? * self.scale)?)
    }

    /// The gradients of A and B that a gradient `g` of the whole weight gives: s B^T g and s g A^T.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn gradients(&self, g: &Tensor) -> Result<(Tensor, Tensor)> {
        let ga = (self.b.t()?.matmul(g)? * self.scale)?;
        let gb = (g.matmul(&self.a.t()?)? * self.scale)?;
        Ok((ga, gb))
    }
}

/// The products of a run.
#[derive(Debug)]
pub struct State {
    settings: LoraPro,
    full: bool,
    pairs: Vec<Pair>,
    /// Bytes beyond those of plain training.
    more: i64,
    /// |G|^2 of the last step, over all sites.
    square: f64,
}

/// Places of A and B among the trainable parameters, and their gradients.
type Sides<'a> = ((usize, usize), (&'a Tensor, &'a Tensor));

impl State {
    /// Name under which the optimiser keeps the moments of a site's whole weight.
    fn name(pair: &Pair) -> String {
        format!("{}.equivalent", pair.path)
    }

    /// The places of A and B among the gradients, and the gradients.
    fn sides<'a>(pair: &Pair, sums: &'a Sums) -> Result<Sides<'a>> {
        let found = pair.down.index.zip(pair.up.index).and_then(|(down, up)| {
            let (ga, gb) = (sums.get(down)?.as_ref()?, sums.get(up)?.as_ref()?);
            Some(((down, up), (ga, gb)))
        });
        found.ok_or_else(|| Error::run(&pair.path, "A and B do not reach the optimiser together"))
    }

    fn frame(&self, pair: &Pair) -> Result<Frame> {
        Frame::new(&pair.down.tensor, &pair.up.tensor, pair.scale, self.settings.damping)
    }
}

/// <x, y> in f64.
fn dot(x: &Tensor, y: &Tensor) -> Result<f64> {
    Ok((x * y)?.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?)
}

impl Dynamics for State {
    fn gradients(&mut self, _: &mut Moving<'_>, sums: &mut Sums, _: Rates) -> Result<()> {
        if self.full {
            return Ok(());
        }
        self.square = 0.0;
        for pair in &self.pairs {
            let ((down, up), (ga, gb)) = Self::sides(pair, sums)?;
            let (da, db) = self.frame(pair)?.adjusted(ga, gb, self.settings.freedom)?;
            self.square += dot(ga, &da)? + dot(gb, &db)?;
            sums[down] = Some(da);
            sums[up] = Some(db);
        }
        Ok(())
    }

    fn update(&mut self, moving: &mut Moving<'_>, sums: &Sums, rates: Rates) -> Result<()> {
        let mut rest = sums.to_vec();
        if self.full {
            self.square = 0.0;
            for pair in &self.pairs {
                let ((down, up), (ga, gb)) = Self::sides(pair, sums)?;
                let frame = self.frame(pair)?;
                let (da, db) = frame.nearest(ga, gb)?;
                self.square += dot(ga, &da)? + dot(gb, &db)?;
                let g = frame.equivalent(&da, &db)?;
                let direction = moving.optimizer.direction(&Self::name(pair), &g, rates.scale)?;
                let (ga, gb) = frame.gradients(&direction)?;
                let (da, db) = frame.adjusted(&ga, &gb, self.settings.freedom)?;
                moving.optimizer.advance(down, &da, rates.lr)?;
                moving.optimizer.advance(up, &db, rates.lr)?;
                rest[down] = None;
                rest[up] = None;
            }
        }
        moving.optimizer.step(&rest, Step { lr: rates.lr, scale: rates.scale, holds: &NO_HOLDS })
    }

    fn metrics(&self) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("equivalent_grad_norm".into(), self.square.max(0.0).sqrt().into());
        map
    }

    fn own(&self) -> Vec<(String, Vec<usize>)> {
        self.pairs.iter().filter(|_| self.full).map(|pair| (Self::name(pair), whole(pair).to_vec())).collect()
    }

    fn bytes(&self, plain: u64) -> u64 {
        plain.saturating_add_signed(self.more)
    }
}
