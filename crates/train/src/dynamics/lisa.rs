//! LISA: all that is outside the blocks, and a few blocks drawn anew every period, are trained densely; the others sleep.
//!
//! Equation: for t in period k: p <- the optimiser's update of p, if p is outside the blocks or in one of S_k; S_k are `layers`
//!           distinct blocks, drawn evenly
//! Shapes:   any
//! Source:   arXiv 2403.17919 algorithm 1; a period begins at every step that `interval` divides, as in LMFlow
//! Cost:     gradients and moments of the waking blocks alone; the backward pass stops at the lowest waking tensor

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use candle_core::Tensor;
use espalier_adapters::attach::DenseEntry;
use espalier_adapters::random::stream;
use espalier_adapters::{Dense, FrozenWeight, Host, ModuleMut};
use rand::seq::index::sample;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Dynamics, Example, Fit, Moving, Settings, checked_count};
use crate::optimizer::rule;
use crate::pairs::unfit;
use crate::Result;

/// What becomes of the optimiser's state when a period ends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// That of blocks that fall asleep is forgotten.
    #[default]
    DropAsleep,
    /// All of it is forgotten, as in the paper's experiments, whose periods were runs of their own.
    DropAll,
    /// It is kept, as in LMFlow.
    Keep,
}

/// How LISA is set up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lisa {
    /// Blocks awake at a time.
    pub layers: usize,
    /// Steps of a period.
    pub interval: usize,
    /// What becomes of the optimiser's state when a period ends: drop-asleep, drop-all, keep.
    pub moments: Policy,
}

impl Default for Lisa {
    fn default() -> Self {
        Self { layers: 2, interval: 20, moments: Policy::DropAsleep }
    }
}

impl Settings for Lisa {
    type State = State;

    fn fit(&self, fit: &mut Fit<'_>) -> Result<State> {
        checked_count("layers", self.layers)?;
        checked_count("interval", self.interval)?;
        let (model, attached) = (&*fit.model, fit.attached);
        let parameters = &attached.parameters;
        let mut blocks: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        let (mut bytes, mut of_block) = ([0u64; 2], BTreeMap::<usize, u64>::new());
        let rule = rule(fit.recipe)?;
        for (i, p) in parameters.trainable().enumerate() {
            let dims = p.tensor.dims();
            let values = 4 * p.tensor.elem_count() as u64;
            let moving = values * (1 + rule.slots(dims).len() as u64);
            bytes[0] += values;
            match model.block_of(&p.name) {
                Some(block) => {
                    blocks.entry(block).or_default().push(i);
                    *of_block.entry(block).or_default() += moving;
                }
                None => bytes[1] += moving,
            }
        }
        let dense = |path: &String| attached.dense.iter().any(|d: &DenseEntry| d.path == *path);
        let low = attached.layers.iter().find(|(path, layer)| {
            let whole = layer.parameters().iter().all(|p| p.name == "weight" && p.trainable);
            model.block_of(path).is_some() && !whole && !dense(path)
        });
        if let Some((path, _)) = low {
            let name = attached.config.method.name();
            return Err(unfit("lisa", format!("{path}: `{name}` does not train the weight itself; it goes with `full`")));
        }
        if blocks.is_empty() {
            return Err(unfit("lisa", "no parameter of a block is trained, so there is nothing to draw from"));
        }
        let mut largest: Vec<u64> = of_block.into_values().collect();
        largest.sort_unstable_by(|a, b| b.cmp(a));
        let awake = match self.moments {
            Policy::Keep => largest.iter().sum::<u64>(),
            _ => largest.iter().take(self.layers).sum(),
        };
        let bytes = bytes[0] + bytes[1] + awake;
        Ok(State {
            settings: self.clone(),
            blocks,
            awake: BTreeSet::new(),
            asleep: BTreeSet::new(),
            entered: false,
            weights: BTreeMap::new(),
            dense: BTreeMap::new(),
            bytes,
        })
    }

    fn examples() -> Vec<Example<Self>> {
        let some = "method = 'full'\ntarget_modules = ['q_proj', 'down_proj']";
        let one = Self { layers: 1, interval: 2, ..Self::default() };
        vec![
            Example { name: "as it comes", settings: Self::default(), adapter: "method = 'full'" },
            Example { name: "one block, two steps", settings: one.clone(), adapter: "method = 'full'\nbias = 'all'" },
            Example { name: "all forgotten", settings: Self { moments: Policy::DropAll, ..one.clone() }, adapter: some },
            Example { name: "all kept", settings: Self { moments: Policy::Keep, ..one }, adapter: some },
        ]
    }
}

/// The blocks drawn for the `period`-th period out of `blocks`.
pub fn drawn(seed: u64, period: usize, blocks: &[usize], layers: usize) -> BTreeSet<usize> {
    let mut rng = stream(seed, &format!("lisa {period}"));
    let layers = layers.min(blocks.len());
    sample(&mut rng, blocks.len(), layers).into_iter().map(|i| blocks[i]).collect()
}

/// Who is awake in a run, and what the slots of the model held before.
#[derive(Debug)]
pub struct State {
    settings: Lisa,
    /// Places of the trainable parameters of each block.
    blocks: BTreeMap<usize, Vec<usize>>,
    awake: BTreeSet<usize>,
    /// Places of the parameters that sleep.
    asleep: BTreeSet<usize>,
    entered: bool,
    weights: BTreeMap<String, Arc<FrozenWeight>>,
    dense: BTreeMap<(String, &'static str), Dense>,
    bytes: u64,
}

impl State {
    /// Puts frozen weights of the same values where parameters sleep, and the parameters themselves elsewhere.
    fn slots(&mut self, moving: &mut Moving<'_>) -> Result<()> {
        let attached = moving.attached;
        let (weights, dense) = (&mut self.weights, &mut self.dense);
        let names: BTreeSet<&str> = (moving.parameters.trainable().enumerate())
            .filter(|(i, _)| self.asleep.contains(i))
            .map(|(_, p)| p.name.as_str())
            .collect();
        let mut small = |path: &str, part: &'static str, slot: &mut Dense| {
            let key = (path.to_owned(), part);
            let Some(trained) = slot.trained().cloned().or_else(|| dense.get(&key)?.trained().cloned()) else { return };
            let own = dense.entry(key).or_insert_with(|| slot.clone());
            let sleeps = names.contains(format!("{path}.{part}").as_str());
            *slot = if sleeps { Dense::new(trained.detach()) } else { own.clone() };
        };
        moving.model.walk(&mut |module| {
            let path = module.path().to_owned();
            match module {
                ModuleMut::Linear(linear) => {
                    if let Some(layer) = attached.layers.get(&path) {
                        let own = weights.entry(path.clone()).or_insert_with(|| linear.base().clone()).clone();
                        let weight = layer.parameters().get("weight").map(|p| p.tensor.detach());
                        match weight.filter(|_| names.contains(format!("{path}.weight").as_str())) {
                            Some(weight) => {
                                let dtype = own.as_dense().map_or(weight.dtype(), Tensor::dtype);
                                linear.set_base(Arc::new(FrozenWeight::dense(weight.to_dtype(dtype)?)?))?;
                                linear.set_adapter(None);
                            }
                            None => {
                                linear.set_base(own)?;
                                linear.set_adapter(Some(layer.clone()));
                            }
                        }
                    }
                    if let Some(bias) = linear.bias_mut() {
                        small(&path, "bias", bias);
                    }
                }
                ModuleMut::Norm(norm) => {
                    small(&path, "weight", norm.weight_mut());
                    if let Some(bias) = norm.bias_mut() {
                        small(&path, "bias", bias);
                    }
                }
                ModuleMut::Embedding(_) => {}
            }
            Ok(())
        })?;
        Ok(())
    }
}

impl Dynamics for State {
    fn before(&mut self, moving: &mut Moving<'_>) -> Result<()> {
        let begins = moving.step.is_multiple_of(self.settings.interval);
        if self.entered && !begins {
            return Ok(());
        }
        self.entered = true;
        let blocks: Vec<usize> = self.blocks.keys().copied().collect();
        self.awake = drawn(moving.seed, moving.step / self.settings.interval, &blocks, self.settings.layers);
        let sleeping = self.blocks.iter().filter(|(block, _)| !self.awake.contains(block));
        self.asleep = sleeping.flat_map(|(_, places)| places.iter().copied()).collect();
        for (i, p) in moving.parameters.trainable().enumerate() {
            let forget = match self.settings.moments {
                Policy::DropAsleep => self.asleep.contains(&i),
                Policy::DropAll => begins,
                Policy::Keep => false,
            };
            if forget {
                moving.optimizer.forget(&p.name);
            }
        }
        self.slots(moving)
    }

    fn asleep(&self, index: usize) -> Option<String> {
        let (awake, all) = (self.awake.len(), self.blocks.len());
        self.asleep.contains(&index).then(|| format!("{awake} of {all} blocks are awake at a time, and its own is not"))
    }

    fn leave(&mut self, moving: &mut Moving<'_>) -> Result<()> {
        self.asleep.clear();
        self.entered = false;
        self.slots(moving)
    }

    fn metrics(&self) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("awake_blocks".into(), self.awake.iter().copied().collect::<Vec<_>>().into());
        map
    }

    fn bytes(&self, _: u64) -> u64 {
        self.bytes
    }
}
