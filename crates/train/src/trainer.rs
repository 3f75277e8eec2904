//! A run: everything a recipe names, loaded and checked, and what can be done with it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use candle_core::{Device, Tensor};
use espalier_adapters::attach::Attached;
use espalier_adapters::formats::{folder, safetensors};
use espalier_adapters::{AdapterSet, ParameterMap};
use espalier_data::TextCodec;
use espalier_models::Model;
use serde::Serialize;

use crate::dynamics::{Dynamics, Fit};
use crate::evidence;
use crate::identity::Identity;
use crate::live::Liveness;
use crate::objective::Objective;
use crate::observer::Observer;
use crate::optimizer::schedule::Schedule;
use crate::recipe::Recipe;
use crate::run::RunFolder;
use crate::setup::{self, Data};
use crate::tape;
use crate::training::Training;
use crate::{Error, Result};

/// Everything of one run.
#[derive(Debug)]
pub struct Run {
    /// The resolved recipe.
    pub recipe: Recipe,
    /// The base, with the adapter in its slots.
    pub model: Model,
    /// Adapters of the base.
    pub adapters: AdapterSet,
    /// Name of the trained one.
    pub name: String,
    /// Parameters that move.
    pub parameters: ParameterMap,
    /// Tokenizer and template.
    pub codec: TextCodec,
    /// Batches.
    pub data: Data,
    /// What is learned from them.
    pub objective: Box<dyn Objective>,
    /// Tensors that the adapter started with, by full name, where they were made from the data.
    pub starts: BTreeMap<String, Tensor>,
}

/// What is learned from, and how.
struct Material {
    codec: TextCodec,
    data: Data,
    objective: Box<dyn Objective>,
}

impl Material {
    /// For rows before which stand `virtual_tokens`.
    fn of(recipe: &Recipe, model: &Model, virtual_tokens: usize) -> Result<Self> {
        let path = model.provenance().path().map(Path::to_owned).unwrap_or_default();
        let codec = setup::codec(&path, recipe.tokenizer.as_deref(), model.config())?;
        let codec = setup::encoding(recipe, codec, model.config(), virtual_tokens)?;
        let data = setup::data(recipe, &codec, model.config(), virtual_tokens)?;
        let objective = setup::objective(model, &codec);
        Ok(Self { codec, data, objective })
    }
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// Steps taken altogether.
    pub steps: usize,
    /// Steps taken before this start.
    pub resumed_from: Option<usize>,
    /// Loss before the last step.
    pub loss: f64,
    /// Last evaluation.
    pub eval_loss: Option<f64>,
    /// Best evaluation.
    pub best: Option<(usize, f64)>,
    /// Whether it was stopped before its end.
    pub stopped: bool,
    /// Whether early stopping ended it.
    pub early_stopped: bool,
    /// Seconds of training.
    pub seconds: f64,
    /// Seconds from the start of the process to the end of the first step.
    pub first_step_s: f64,
    /// Tokens seen.
    pub tokens: u64,
    /// Tokens with a target.
    pub trained_tokens: u64,
    /// Tokens a second, the first step left out.
    pub tokens_per_s: f64,
    /// Peak memory.
    pub peak_memory_bytes: Option<u64>,
    /// Trainable values.
    pub trainable_parameters: usize,
    /// What the watch over the first steps of the last start found; None if no step was taken.
    pub live: Option<Liveness>,
}

/// What trains: an adapter, or the whole model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The recipe's adapter.
    Adapter,
    /// Every weight.
    WholeModel,
}

impl Run {
    /// Loads and checks everything a recipe names.
    ///
    /// # Errors
    /// If anything of it is missing or does not fit.
    pub fn prepare(recipe: Recipe) -> Result<Self> {
        Self::prepare_again(recipe, false)
    }

    /// As [`Self::prepare`]; where the run goes on from its folder (`resume`), an adapter that started from data starts there as
    /// it did.
    ///
    /// # Errors
    /// As [`Self::prepare`].
    pub fn prepare_again(recipe: Recipe, resume: bool) -> Result<Self> {
        let mut model = setup::model(&recipe)?;
        let material = Material::of(&recipe, &model, setup::virtual_tokens(&recipe)?)?;
        let kept = RunFolder::new(&recipe.out).starts();
        let (attached, starts) = setup::adapter(&recipe, &mut model, |model, config| match resume && kept.is_file() {
            // Made once: another pass could round otherwise on another device.
            true => Ok(safetensors::TensorFile::open(&kept)?.load_all(&Device::Cpu)?),
            false => {
                let schedule = Schedule::new(&recipe, 1 << 20);
                let first = (0..1 << 20).map(|step| schedule.factor(step)).find(|factor| *factor > 0.0);
                let first_lr = recipe.lr * first.unwrap_or(1.0);
                evidence::starts(&recipe, model, config, &material.data, material.objective.as_ref(), first_lr)
            }
        })?;
        Self::assemble(recipe, model, attached, material, starts)
    }

    /// A run that trains every weight of `model`.
    ///
    /// # Errors
    /// As [`Self::prepare`].
    pub fn prepare_whole(recipe: Recipe, mut model: Model) -> Result<Self> {
        let material = Material::of(&recipe, &model, 0)?;
        let attached = setup::whole_model(&recipe, &mut model)?;
        Self::assemble(recipe, model, attached, material, BTreeMap::new())
    }

    fn assemble(
        recipe: Recipe,
        mut model: Model,
        mut attached: Attached,
        material: Material,
        starts: BTreeMap<String, Tensor>,
    ) -> Result<Self> {
        let Material { codec, data, objective } = material;
        let dynamics =
            recipe.dynamics_config()?.fit(&mut Fit { recipe: &recipe, model: &mut model, attached: &attached })?;
        attached.parameters.train_only(|p| dynamics.trains(p));
        let parameters = attached.parameters.clone();
        if parameters.trainable().next().is_none() {
            return Err(Error::recipe("adapter", "nothing is trained: no parameter is trainable"));
        }
        let mut adapters = AdapterSet::new();
        let name = "default".to_owned();
        adapters.add(&name, attached)?;
        adapters.activate(&mut model, &[(&name, 1.0)])?;
        Ok(Self { recipe, model, adapters, name, parameters, codec, data, objective, starts })
    }

    /// How the parameters move: a new one at each call, at the run's beginning.
    ///
    /// # Errors
    /// If it does not go with the adapter, the model or the optimiser.
    pub fn dynamics(&mut self) -> Result<Box<dyn Dynamics>> {
        let attached = self.adapters.get(&self.name)?;
        self.recipe.dynamics_config()?.fit(&mut Fit { recipe: &self.recipe, model: &mut self.model, attached })
    }

    /// Steps of an epoch.
    fn epoch_steps(&self, epoch: u64) -> Result<usize> {
        Ok(self.data.train.len_per_epoch(epoch)?.div_ceil(self.recipe.accumulation))
    }

    /// Steps of the whole run.
    ///
    /// # Errors
    /// If the data cannot be laid out.
    pub fn total_steps(&self) -> Result<usize> {
        if let Some(steps) = self.recipe.max_steps {
            return Ok(steps);
        }
        let whole = self.recipe.epochs.floor() as u64;
        let mut steps = 0;
        for epoch in 0..whole {
            steps += self.epoch_steps(epoch)?;
        }
        let rest = self.recipe.epochs - whole as f64;
        if rest > 0.0 {
            steps += (self.epoch_steps(whole)? as f64 * rest).ceil() as usize;
        }
        Ok(steps)
    }

    /// What the run is made of.
    ///
    /// # Errors
    /// If the recipe cannot be written out, or the base or the start adapter cannot be read.
    pub fn identity(&self) -> Result<Identity> {
        Identity::of(self)
    }

    /// Mean loss over the evaluation data, and the number of its targets.
    ///
    /// # Errors
    /// If a batch cannot be read.
    pub fn evaluate(&self) -> Result<Option<(f64, usize)>> {
        let Some(eval) = &self.data.eval else { return Ok(None) };
        let (mut sum, mut weight) = (0.0, 0);
        for i in 0..eval.len_per_epoch(0)? {
            let batch = eval.batch(0, i)?;
            let targets = self.objective.targets(&batch)?;
            sum += tape::evaluate(&self.model, &batch, &targets)?;
            weight += targets.weight();
        }
        Ok((weight > 0).then(|| (sum / weight as f64, weight)))
    }

    /// Writes the trained adapter as a PEFT folder; [`crate::reload::check`] reads it back.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save_adapter(&mut self, path: &Path) -> Result<folder::Saved> {
        let attached = self.adapters.get(&self.name)?;
        Ok(folder::save(&mut self.model, attached, path)?)
    }

    /// Trains to the end, or until `stop` is set; `checkpoints` is where checkpoints go, and where a resumed run starts.
    ///
    /// # Errors
    /// If a batch cannot be read, a value is not finite, a trainable tensor is not trained, or a checkpoint cannot be
    /// written.
    pub fn train(
        &mut self,
        checkpoints: Option<&Path>,
        resume: bool,
        observer: &mut dyn Observer,
        stop: &AtomicBool,
    ) -> Result<Outcome> {
        Training::new(self, checkpoints, resume)?.run(observer, stop)
    }
}
