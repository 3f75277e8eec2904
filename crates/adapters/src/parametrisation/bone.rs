//! Bone: one block matrix per row of blocks, multiplied into the frozen weight's own blocks and added to them; and its
//! descendants without the weight, which PEFT calls MiSS.
//!
//! Equation: affine: dW_ij = W_ij S_i + S_i; shard: dW = S^T [I I ... I], which is LoRA with a fixed A; mini: shard with S tiled
//! Shapes:   x [.., d_in] -> y [.., d_out]; affine: S [d_out / r, r, r]; shard: S [r, d_out]; mini: S [r, mini_r]
//! Source:   arXiv 2409.15371 (version 1: affine, later "Bat"; from version 2 on: shard, later "MiSS"); PEFT `init_weights`
//! Cost:     affine: 2 r d_in d_out FLOPs a forward pass and the weight's gradient on the way back; shard: d_in + 2 r d_out FLOPs
//!           a token; r d_out parameters a layer (mini: r mini_r)

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use espalier_kernels::frozen::FrozenWeight;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::adapter::{Adapter, Init, Method, Site, checked_dropout};
use crate::formats::peft_config::{self, PeftNames};
use crate::low_rank::LowRankView;
use crate::weight_space;
use crate::{Error, Flow, ParameterMap, Result};

/// Which of the operators that carry the name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// dW_ij = W_ij S_i + S_i, the paper's own.
    #[default]
    Affine,
    /// Every r-wide slab of columns of dW is the same matrix.
    Shard,
    /// As shard, with a narrower S tiled along the output.
    Mini,
}

/// How Bone is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Bone {
    /// Block size (affine), or number of rows of S.
    pub r: usize,
    /// Which operator.
    pub form: Form,
    /// Columns of S in the form mini; they divide the output.
    pub mini_r: usize,
    /// Probability of dropping an input of the change while training (not for affine, which has no input of its own).
    pub dropout: f64,
}

impl Default for Bone {
    fn default() -> Self {
        Self { r: 64, form: Form::Affine, mini_r: 1, dropout: 0.0 }
    }
}

const MISS: PeftNames = PeftNames { kind: "MISS", keys: &[("dropout", "miss_dropout")], fixed: &[] };
/// What PEFT called it until 0.18.
const BONE: PeftNames = PeftNames { kind: "BONE", keys: &[("dropout", "miss_dropout")], fixed: &[] };

/// Name of S in files.
const BLOCK: &str = "miss_block";

impl Method for Bone {
    type Layer = BoneLayer;

    fn attach(&self, site: &Site, init: &mut Init<'_>) -> Result<BoneLayer> {
        site.refuse_lookup("bone")?;
        let r = site.checked_rank()?;
        let dropout = checked_dropout(self.dropout)?;
        let (m, n) = (site.d_out, site.d_in);
        let refuse = |what: String| Err(Error::config("r", format!("{}: {what}", site.path)));
        if r > n {
            return refuse(format!("rank {r} is above the input width {n}"));
        }
        let (shape, repeat): (Vec<usize>, usize) = match self.form {
            Form::Affine if m % r != 0 || n % r != 0 => {
                return refuse(format!("blocks of rank {r} do not divide the weight [{m}, {n}]; use the form shard"));
            }
            Form::Affine if dropout > 0.0 => {
                return Err(Error::config("dropout", "the form affine changes the weight and has no input to drop"));
            }
            Form::Affine => (vec![m / r, r, r], 1),
            Form::Shard => (vec![r, m], 1),
            Form::Mini if self.mini_r == 0 || m % self.mini_r != 0 => {
                return Err(Error::config(
                    "mini_r",
                    format!("{}: {} columns do not divide the output width {m}", site.path, self.mini_r),
                ));
            }
            Form::Mini => (vec![r, self.mini_r], m / self.mini_r),
        };
        let s = init.zeros(BLOCK, shape)?;
        let folds = match self.form {
            Form::Affine => None,
            _ => Some(folds(r, n, init)?),
        };
        Ok(BoneLayer { path: site.path.clone(), s, folds, repeat, dropout })
    }

    fn rank_and_alpha(&self) -> (usize, f64) {
        (self.r, 0.0)
    }

    fn examples() -> Vec<(String, Self)> {
        let shard = Self { r: 4, form: Form::Shard, ..Self::default() };
        vec![
            ("affine".to_owned(), Self { r: 1, ..Self::default() }),
            ("shard".to_owned(), shard.clone()),
            ("dropout".to_owned(), Self { dropout: 0.4, ..shard.clone() }),
            ("mini".to_owned(), Self { r: 3, form: Form::Mini, ..shard }),
        ]
    }

    fn to_peft(&self) -> Option<Map<String, Value>> {
        let mut keys = peft_config::settings_to_keys(self, &MISS)?;
        keys.remove("form");
        let start = match self.form {
            Form::Affine => Value::from("bat"),
            Form::Shard => Value::from(true),
            Form::Mini => Value::from("mini"),
        };
        keys.insert("init_weights".into(), start);
        Some(keys)
    }

    fn from_peft(keys: &mut Map<String, Value>) -> Result<Option<Self>> {
        if !keys.get("peft_type").is_some_and(|kind| kind == MISS.kind || kind == BONE.kind) {
            return Ok(None);
        }
        let form = match keys.remove("init_weights") {
            None | Some(Value::Null | Value::Bool(_)) => Form::Shard,
            Some(Value::String(name)) if name == "bat" => Form::Affine,
            Some(Value::String(name)) if name == "mini" => Form::Mini,
            Some(other) => return Err(Error::config("init_weights", format!("{other} is not a form of bone"))),
        };
        let read = match peft_config::settings_from_keys::<Self>(keys, &MISS)? {
            Some(read) => Some(read),
            None => peft_config::settings_from_keys::<Self>(keys, &BONE)?,
        };
        Ok(read.map(|read| Self { form, ..read }))
    }

    /// Files of the first three weeks say nothing of the form: three dimensions are affine.
    fn settle(&mut self, tensors: &BTreeMap<String, Tensor>) {
        let mut blocks = tensors.iter().filter(|(name, _)| name.ends_with(BLOCK)).map(|(_, t)| t.rank()).peekable();
        if self.form == Form::Shard && blocks.peek().is_some() && blocks.all(|rank| rank == 3) {
            self.form = Form::Affine;
        }
    }
}

/// [I I ... I] of `r` rows and `n` columns.
fn folds(r: usize, n: usize, init: &Init<'_>) -> Result<Tensor> {
    let values: Vec<f32> = (0..r * n).map(|i| if i % n % r == i / n { 1.0 } else { 0.0 }).collect();
    Ok(Tensor::from_vec(values, (r, n), &init.device)?.to_dtype(init.dtype)?)
}

/// S at one site.
#[derive(Debug)]
pub struct BoneLayer {
    path: String,
    s: Tensor,
    /// The fixed A of the forms that are of low rank; None for affine.
    folds: Option<Tensor>,
    /// How often S is repeated along the output.
    repeat: usize,
    dropout: f64,
}

impl BoneLayer {
    /// W S + S by blocks, on the tape, where `weight` is [d_out, d_in].
    fn affine(&self, weight: &Tensor) -> Result<Tensor> {
        let (m, n) = weight.dims2()?;
        let (rows, b, _) = self.s.dims3()?;
        let product = weight.reshape((rows, b * n / b, b))?.matmul(&self.s)?;
        let sum = product.reshape((rows, b, n / b, b))?.broadcast_add(&self.s.unsqueeze(2)?)?;
        Ok(sum.reshape((m, n))?)
    }

    fn view(&self, a: &Tensor) -> Result<LowRankView> {
        let s = if self.repeat > 1 { self.s.repeat((1, self.repeat))? } else { self.s.clone() };
        Ok(LowRankView::new(a, &s.t()?.contiguous()?, 1.0))
    }
}

impl Adapter for BoneLayer {
    fn forward(&self, base: &Arc<FrozenWeight>, x: &Tensor, flow: &Flow) -> Result<Tensor> {
        match &self.folds {
            Some(a) => self.view(a)?.forward(base, x, flow.dropped(x, self.dropout, &self.path)?.as_ref()),
            None => {
                let weight = base.dequantize(self.s.dtype())?;
                weight_space::product(x, &(&weight + self.affine(&weight)?)?)
            }
        }
    }

    fn delta(&self, base: &Arc<FrozenWeight>) -> Result<Option<Tensor>> {
        Ok(Some(match &self.folds {
            Some(a) => self.view(a)?.delta(base)?,
            None => self.affine(&base.dequantize(self.s.dtype())?)?.detach().to_dtype(DType::F32)?,
        }))
    }

    fn parameters(&self) -> ParameterMap {
        let mut map = ParameterMap::new();
        map.push(BLOCK, &self.s, true);
        map
    }

    fn low_rank(&self, _base: &Arc<FrozenWeight>) -> Result<Option<LowRankView>> {
        self.folds.as_ref().map(|a| self.view(a)).transpose()
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }
}
