//! Optimisers: one file a rule, and the one list that registers them; what each keeps of a parameter, by name.
//!
//! A rule moves one tensor by one gradient. What it keeps (moments) has the shape of what it moves; how often it moved is
//! counted for each tensor, or for each row or column of it once some of them have begun anew. Weight decay is decoupled
//! under every rule.

pub mod schedule;

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};

pub use crate::kept::{Kept, Line, Steps};

use crate::recipe::Recipe;
use crate::{Error, Result};

/// Scalars of one update.
#[derive(Debug, Clone, Copy)]
pub struct At<'a> {
    /// Learning rate.
    pub lr: f64,
    /// Share of the parameter that decays, in units of the learning rate.
    pub decay: f64,
    /// Factor on the gradient (clipping).
    pub scale: f64,
    /// Updates so far, this one counted.
    pub steps: &'a Steps,
}

/// One update that several may be done of together.
#[derive(Debug)]
pub struct Work<'a> {
    /// The parameter.
    pub parameter: &'a Tensor,
    /// Its gradient.
    pub gradient: &'a Tensor,
    /// What the rule keeps of it.
    pub slots: &'a [Tensor],
    /// Scalars.
    pub at: At<'a>,
}

/// How a tensor moves.
pub trait Rule: Send + std::fmt::Debug {
    /// Names of what is kept of a tensor with `dims`; each has its shape and starts at 0.
    fn slots(&self, dims: &[usize]) -> &'static [&'static str];

    /// The parameter and what is kept of it after the update. Only elementwise rules may rely on [`At::steps`] being of
    /// several counts.
    ///
    /// # Errors
    /// If shapes do not fit.
    fn update(&self, work: &Work<'_>) -> Result<(Tensor, Vec<Tensor>)>;

    /// Does those of `work` that can be written where they are in few launches; says which.
    ///
    /// # Errors
    /// If the device refuses.
    fn launch(&self, work: &[Work<'_>]) -> Result<Vec<bool>> {
        Ok(vec![false; work.len()])
    }
}

/// A key of a recipe that is a setting of some optimisers, and whether the recipe sets it.
type Setting = (&'static str, fn(&Recipe) -> bool);

macro_rules! optimizers {
    ($($module:ident :: $rule:ident = $name:literal, $keys:expr;)*) => {
        $(pub mod $module;)*

        /// Names of all optimisers, in the order of the list.
        pub const OPTIMIZERS: &[&str] = &[$($name),*];

        /// The rule that a recipe names, with its settings.
        ///
        /// # Errors
        /// If there is no such optimiser, or the recipe sets a key that it does not have.
        pub fn rule(recipe: &Recipe) -> Result<Box<dyn Rule>> {
            match recipe.optimizer.as_str() {
                $($name => {
                    check_keys(recipe, $keys)?;
                    Ok(Box::new($module::$rule::of(recipe)?))
                })*
                other => Err(Error::recipe("optimizer", espalier_adapters::config::unknown_value(other, OPTIMIZERS))),
            }
        }
    };
}

optimizers! {
    adamw::AdamW = "adamw", &["beta1", "beta2", "adam_eps"];
    lion::Lion = "lion", &["beta1", "beta2"];
    muon::Muon = "muon", &["beta1", "beta2", "adam_eps", "momentum", "nesterov", "muon_adjust_lr"];
    sgd::Sgd = "sgd", &["momentum", "nesterov"];
}

/// Keys that are settings of some optimisers only.
const SETTINGS: &[Setting] = &[
    ("beta1", |r| r.beta1 != Recipe::default().beta1),
    ("beta2", |r| r.beta2 != Recipe::default().beta2),
    ("adam_eps", |r| r.adam_eps != Recipe::default().adam_eps),
    ("momentum", |r| r.momentum.is_some()),
    ("nesterov", |r| r.nesterov != Recipe::default().nesterov),
    ("muon_adjust_lr", |r| r.muon_adjust_lr != Recipe::default().muon_adjust_lr),
];

fn check_keys(recipe: &Recipe, own: &[&str]) -> Result<()> {
    match SETTINGS.iter().find(|(key, is_set)| !own.contains(key) && is_set(recipe)) {
        Some((key, _)) => Err(Error::recipe(*key, format!("is no setting of the optimiser `{}`", recipe.optimizer))),
        None => Ok(()),
    }
}

/// Bytes a trained tensor takes: itself, its gradient, and what the optimiser keeps of it, in f32.
pub fn bytes_of(rule: &dyn Rule, dims: &[usize]) -> u64 {
    let values = dims.iter().product::<usize>() as u64;
    4 * values * (2 + rule.slots(dims).len() as u64)
}

/// What stands still of a tensor during an update: where `moves` (u8, broadcast over the tensor) is 0.
#[derive(Debug, Clone)]
pub struct Hold {
    /// 1 where the tensor moves.
    pub moves: Tensor,
    /// Whether what is kept of the rest stands still as well, its count of updates included; else only its values do.
    pub kept: bool,
}

/// Learning rate of one step, the factor on its gradients, and what stands still, by the parameter's index.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// Learning rate before each parameter's factor.
    pub lr: f64,
    /// Factor on all gradients (clipping).
    pub scale: f64,
    /// What stands still of which parameter.
    pub holds: &'a BTreeMap<usize, Hold>,
}

/// Nothing stands still.
pub static NO_HOLDS: BTreeMap<usize, Hold> = BTreeMap::new();

/// Moves a list of parameters by a rule.
#[derive(Debug)]
pub struct Optimizer {
    rule: Box<dyn Rule>,
    decay: f64,
    names: Vec<String>,
    parameters: Vec<Var>,
    factors: Vec<f64>,
    kept: BTreeMap<String, Kept>,
}

impl Optimizer {
    /// The recipe's optimiser of `parameters` (name, variable), each with its factor on the learning rate. What is kept of a
    /// parameter begins with its first update.
    ///
    /// # Errors
    /// As [`rule`].
    pub fn new(recipe: &Recipe, parameters: Vec<(String, Var)>, factors: Vec<f64>) -> Result<Self> {
        let (names, parameters) = parameters.into_iter().unzip();
        Ok(Self { rule: rule(recipe)?, decay: recipe.weight_decay, names, parameters, factors, kept: BTreeMap::new() })
    }

    /// The parameters, in order.
    pub fn parameters(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.names.iter().map(String::as_str).zip(&self.parameters)
    }

    /// Factors on the learning rate, in the order of the parameters.
    pub fn factors(&self) -> &[f64] {
        &self.factors
    }

    /// What is kept under `name`, where something is.
    pub fn kept(&self, name: &str) -> Option<&Kept> {
        self.kept.get(name)
    }

    fn kept_of(&mut self, name: &str, like: &Tensor) -> Result<Kept> {
        match self.kept.remove(name) {
            Some(kept) => Ok(kept),
            None => Kept::new(self.rule.slots(like.dims()), like),
        }
    }

    /// One update of every parameter that has a gradient.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn step(&mut self, gradients: &[Option<Tensor>], step: Step<'_>) -> Result<()> {
        let mut items = Vec::new();
        for (i, gradient) in gradients.iter().enumerate().take(self.parameters.len()) {
            let Some(gradient) = gradient else { continue };
            let parameter = self.parameters[i].clone();
            if gradient.dims() != parameter.dims() {
                let (found, wanted) = (gradient.dims(), parameter.dims());
                return Err(Error::run(&self.names[i], format!("a gradient of {found:?} for values of {wanted:?}")));
            }
            let name = self.names[i].clone();
            let kept = self.kept_of(&name, parameter.as_tensor())?;
            let hold = step.holds.get(&i);
            let steps = kept.steps.next(hold.filter(|h| h.kept).map(|h| &h.moves))?;
            let gradient = gradient.to_dtype(DType::F32)?.contiguous()?;
            items.push((i, name, parameter, gradient, kept, steps, hold));
        }
        let work: Vec<Work<'_>> = items
            .iter()
            .map(|(i, _, parameter, gradient, kept, steps, _)| {
                let lr = step.lr * self.factors.get(*i).copied().unwrap_or(1.0);
                let at = At { lr, decay: self.decay, scale: step.scale, steps };
                Work { parameter: parameter.as_tensor(), gradient, slots: &kept.tensors, at }
            })
            .collect();
        let whole: Vec<bool> = items.iter().map(|item| item.6.is_none()).collect();
        let together = if whole.iter().all(|w| *w) { self.rule.launch(&work)? } else { vec![false; work.len()] };
        let mut moved = Vec::with_capacity(work.len());
        for (work, done) in work.iter().zip(&together) {
            moved.push(if *done { None } else { Some(self.rule.update(work)?) });
        }
        drop(work);
        for ((_, name, parameter, _, mut kept, steps, hold), moved) in items.into_iter().zip(moved) {
            if let Some((mut values, mut slots)) = moved {
                if let Some(hold) = hold {
                    let moves = hold.moves.broadcast_as(parameter.shape())?.contiguous()?;
                    values = moves.where_cond(&values, parameter.as_tensor())?;
                    if hold.kept {
                        let pairs = slots.iter().zip(&kept.tensors);
                        slots = pairs.map(|(new, old)| Ok(moves.where_cond(new, old)?)).collect::<Result<_>>()?;
                    }
                }
                parameter.set(&values.detach())?;
                kept.tensors = slots.iter().map(Tensor::detach).collect();
            }
            kept.steps = steps;
            self.kept.insert(name, kept);
        }
        Ok(())
    }

    /// What an update by `gradient` at a learning rate of 1 would take off a tensor of its shape, without decay; what is kept
    /// of it is under `name`, which is a parameter's or one of the caller's own.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn direction(&mut self, name: &str, gradient: &Tensor, scale: f64) -> Result<Tensor> {
        let gradient = gradient.to_dtype(DType::F32)?.contiguous()?;
        let mut kept = self.kept_of(name, &gradient)?;
        kept.steps = kept.steps.next(None)?;
        let zero = gradient.zeros_like()?;
        let at = At { lr: 1.0, decay: 0.0, scale, steps: &kept.steps };
        let work = Work { parameter: &zero, gradient: &gradient, slots: &kept.tensors, at };
        let (values, slots) = self.rule.update(&work)?;
        kept.tensors = slots;
        self.kept.insert(name.to_owned(), kept);
        Ok(values.neg()?.detach())
    }

    /// Moves the `index`-th parameter against `direction` at a learning rate, with decay: p (1 - lr wd) - lr d.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn advance(&mut self, index: usize, direction: &Tensor, lr: f64) -> Result<()> {
        let (Some(parameter), Some(factor)) = (self.parameters.get(index), self.factors.get(index)) else {
            return Err(Error::run("optimizer", format!("there is no parameter {index}")));
        };
        let lr = lr * factor;
        let keep = 1.0 - lr * self.decay;
        let values = parameter.to_dtype(DType::F32)?;
        let values = if keep == 1.0 { values } else { (values * keep)? };
        let moved = (values - (direction.to_dtype(DType::F32)? * lr)?)?;
        Ok(parameter.set(&moved.to_dtype(parameter.dtype())?.detach())?)
    }

    /// Forgets what is kept under `name`: its next update is a first one.
    pub fn forget(&mut self, name: &str) {
        self.kept.remove(name);
    }

    /// Sets what is kept of some rows or columns of a tensor to 0, their counts of updates included.
    ///
    /// # Errors
    /// If a line is outside the tensor.
    pub fn reset(&mut self, name: &str, lines: Line, indices: &[usize]) -> Result<()> {
        match self.kept.get_mut(name) {
            Some(kept) => kept.reset(lines, indices),
            None => Ok(()),
        }
    }

    /// Sets what is kept of the `share` of a tensor's entries whose first moment is smallest to 0; all of it with its count of
    /// updates if that is 1.
    ///
    /// # Errors
    /// If values cannot be read.
    pub fn prune(&mut self, name: &str, share: f64) -> Result<()> {
        if share >= 1.0 {
            self.forget(name);
        } else if let Some(kept) = self.kept.get_mut(name) {
            kept.prune(share)?;
        }
        Ok(())
    }

    /// Bytes of all that is kept.
    pub fn bytes(&self) -> u64 {
        self.kept.values().flat_map(|k| &k.tensors).map(|t| 4 * t.elem_count() as u64).sum()
    }

    /// What is kept, for checkpoints: `<slot>.<name>`, and `t.<name>` for the counts of updates. On a CUDA device they are the
    /// tensors themselves, which the next step changes.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut all = BTreeMap::new();
        for (name, kept) in &self.kept {
            for (slot, tensor) in kept.slots.iter().zip(&kept.tensors) {
                all.insert(format!("{slot}.{name}"), tensor.clone());
            }
            all.insert(format!("t.{name}"), kept.steps.tensor()?);
        }
        Ok(all)
    }

    /// Puts back what was kept after `steps` steps; `own` are names and shapes of the caller's own tensors beside the
    /// parameters.
    ///
    /// # Errors
    /// If a tensor is missing, has another shape, or belongs to nothing.
    pub fn restore(
        &mut self,
        mut state: BTreeMap<String, Tensor>,
        steps: usize,
        own: &[(String, Vec<usize>)],
    ) -> Result<()> {
        let device = self.parameters.first().map_or(Device::Cpu, |p| p.device().clone());
        let parameters = self.names.iter().zip(&self.parameters).map(|(n, p)| (n.clone(), p.dims().to_vec()));
        let places: Vec<(String, Vec<usize>)> = parameters.chain(own.iter().cloned()).collect();
        self.kept.clear();
        for (name, dims) in places {
            let slots = self.rule.slots(&dims);
            if let Some(kept) = Kept::take(&mut state, &name, slots, &dims, steps, &device)? {
                self.kept.insert(name, kept);
            }
        }
        match state.into_keys().next() {
            Some(name) => Err(Error::run(name, "belongs to no parameter of this run")),
            None => Ok(()),
        }
    }
}

/// Norm of all gradients together, in f64.
///
/// # Errors
/// If a gradient cannot be read.
pub fn global_norm(gradients: &[Option<Tensor>]) -> Result<f64> {
    #[cfg(feature = "cuda")]
    {
        use espalier_kernels::cuda::{is_flat, optimizer::sum_of_squares};
        let all: Vec<&Tensor> = gradients.iter().flatten().collect();
        if all.first().is_some_and(|f| all.iter().all(|g| is_flat(g) && g.device().same_device(f.device()))) {
            return Ok(sum_of_squares(&all)?.sqrt());
        }
    }
    let mut square = 0.0;
    for gradient in gradients.iter().flatten() {
        let values = gradient.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        square += values.iter().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>();
    }
    Ok(square.sqrt())
}
