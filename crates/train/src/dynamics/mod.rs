//! How parameters move: one file per dynamics, and the one list that registers them.
//!
//! The optimiser moves a tensor by its gradient; a dynamics decides what is moved by what, and when: it may say which
//! parameters are trained and how fast, see and change gradients, take the update into its own hands, and change
//! parameters, the optimiser's state or the frozen weights between steps. The trainer names none of them. A dynamics is
//! added by writing its file and one line in the list below; recipe values, documentation, and the trials of stopped and
//! killed runs follow from it.

pub mod rank_allocator;

use std::collections::BTreeMap;

use candle_core::Tensor;
use espalier_adapters::attach::Attached;
use espalier_adapters::{Flow, Parameter, ParameterMap};
use espalier_models::Model;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::optimizer::{NO_HOLDS, Optimizer, Step};
use crate::recipe::Recipe;
use crate::{Error, Result};

/// What a dynamics is fitted to, before anything is trained.
#[derive(Debug)]
pub struct Fit<'a> {
    /// The recipe.
    pub recipe: &'a Recipe,
    /// The base, with the adapter in its slots or not.
    pub model: &'a mut Model,
    /// The adapter.
    pub attached: &'a Attached,
}

/// What a dynamics sees and may change while a run is under way.
#[derive(Debug)]
pub struct Moving<'a> {
    /// The base, with the adapter in its slots.
    pub model: &'a mut Model,
    /// The adapter.
    pub attached: &'a Attached,
    /// Its parameters; gradients are in the order of the trainable ones.
    pub parameters: &'a ParameterMap,
    /// What moves them.
    pub optimizer: &'a mut Optimizer,
    /// Steps taken.
    pub step: usize,
    /// Steps of the whole run.
    pub total: usize,
    /// Seed of everything random.
    pub seed: u64,
}

/// Gradients in the order of the trainable parameters; None where there is none.
pub type Sums = [Option<Tensor>];

/// Learning rate of a step and the factor that clips its gradients.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Learning rate.
    pub lr: f64,
    /// Factor on all gradients.
    pub scale: f64,
}

/// How the parameters of one run move. Every hook has a default that does nothing of its own.
pub trait Dynamics: Send + std::fmt::Debug {
    /// Whether a parameter is trained at all.
    fn trains(&self, parameter: &Parameter) -> bool {
        let _ = parameter;
        true
    }

    /// Factor on the learning rate of a parameter.
    fn factor(&self, parameter: &Parameter) -> f64 {
        let _ = parameter;
        1.0
    }

    /// Factor on the learning rate of the step after `step` steps, beside the recipe's course.
    fn rate(&self, step: usize) -> f64 {
        let _ = step;
        1.0
    }

    /// Begins a new run (not one that goes on): parameters and frozen weights may be given other values.
    ///
    /// # Errors
    /// If the device refuses.
    fn begin(&mut self, moving: &mut Moving<'_>) -> Result<()> {
        let _ = moving;
        Ok(())
    }

    /// Enters the loop, in a new run and in one that goes on.
    ///
    /// # Errors
    /// If the device refuses.
    fn enter(&mut self, moving: &mut Moving<'_>) -> Result<()> {
        let _ = moving;
        Ok(())
    }

    /// Before the passes of a step.
    ///
    /// # Errors
    /// If the device refuses.
    fn before(&mut self, moving: &mut Moving<'_>) -> Result<()> {
        let _ = moving;
        Ok(())
    }

    /// What travels beside the activations of the `part`-th pass of the step after `step` steps.
    fn flow(&self, flow: Flow, step: usize, part: usize) -> Flow {
        let _ = (step, part);
        flow
    }

    /// Why the `index`-th trainable parameter has no gradient in this step, where it is not meant to have one.
    fn asleep(&self, index: usize) -> Option<String> {
        let _ = index;
        None
    }

    /// Why the `index`-th trainable parameter may have the values it began with, after the last step.
    fn still(&self, index: usize) -> Option<String> {
        self.asleep(index)
    }

    /// Sees and may change the gradients of a step, which are not clipped yet, before the update.
    ///
    /// # Errors
    /// If shapes do not fit.
    fn gradients(&mut self, moving: &mut Moving<'_>, sums: &mut Sums, rates: Rates) -> Result<()> {
        let _ = (moving, sums, rates);
        Ok(())
    }

    /// The update itself: by default the optimiser's, of every parameter by its own gradient.
    ///
    /// # Errors
    /// If shapes do not fit.
    fn update(&mut self, moving: &mut Moving<'_>, sums: &Sums, rates: Rates) -> Result<()> {
        moving.optimizer.step(sums, Step { lr: rates.lr, scale: rates.scale, holds: &NO_HOLDS })
    }

    /// After the update; [`Moving::step`] counts it.
    ///
    /// # Errors
    /// If the device refuses.
    fn after(&mut self, moving: &mut Moving<'_>) -> Result<()> {
        let _ = moving;
        Ok(())
    }

    /// Leaves the loop: slots are as they were before [`Self::enter`], with the trained values.
    ///
    /// # Errors
    /// If the walk over the model fails.
    fn leave(&mut self, moving: &mut Moving<'_>) -> Result<()> {
        let _ = moving;
        Ok(())
    }

    /// Values of the last step, by name, for its record.
    fn metrics(&self) -> Map<String, Value> {
        Map::new()
    }

    /// Everything that a run must have to go on, besides parameters and the optimiser's state.
    ///
    /// # Errors
    /// If values cannot be read.
    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        Ok(BTreeMap::new())
    }

    /// Puts back what [`Self::state`] gave; the parameters have been put back before.
    ///
    /// # Errors
    /// If a tensor is missing, has another shape, or belongs to nothing.
    fn restore(&mut self, state: BTreeMap<String, Tensor>, moving: &mut Moving<'_>) -> Result<()> {
        let _ = moving;
        match state.into_keys().next() {
            Some(name) => Err(Error::run(name, "belongs to nothing in this run's dynamics")),
            None => Ok(()),
        }
    }

    /// Names and shapes of tensors that the optimiser keeps something of beside the parameters.
    fn own(&self) -> Vec<(String, Vec<usize>)> {
        Vec::new()
    }

    /// Whether frozen weights change, so that what was trained is a model and no adapter of its base.
    fn moves_base(&self) -> bool {
        false
    }

    /// Bytes of gradients, the optimiser's state and the dynamics' own, where plain training takes `plain`.
    fn bytes(&self, plain: u64) -> u64 {
        plain
    }
}

/// Settings to try a dynamics with, and the adapter that they go with.
#[derive(Debug, Clone)]
pub struct Example<S> {
    /// Name.
    pub name: &'static str,
    /// Settings.
    pub settings: S,
    /// The `[adapter]` table, as TOML.
    pub adapter: &'static str,
}

/// The settings of one dynamics: its fields are the keys of the `[dynamics]` table.
pub trait Settings: Clone + Default + Serialize + DeserializeOwned {
    /// The dynamics itself.
    type State: Dynamics + 'static;

    /// The dynamics of one run.
    ///
    /// # Errors
    /// If a setting is not valid, or the dynamics does not go with the adapter, the model or the optimiser.
    fn fit(&self, fit: &mut Fit<'_>) -> Result<Self::State>;

    /// Settings to try it with: at least as it comes, and one of each way in which it can be set up. What is promised of
    /// every dynamics is tried with each of them.
    fn examples() -> Vec<Example<Self>>;
}

macro_rules! dynamics {
    ($($(#[$doc:meta])* $module:ident :: $config:ident = $name:literal;)*) => {
        $(pub mod $module;)*

        /// Which dynamics, with its settings; in recipes tagged by `method`.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "method")]
        pub enum DynamicsConfig {
            $($(#[$doc])* #[serde(rename = $name)] $config($module::$config),)*
        }

        /// Names of all dynamics, in the order of the list.
        pub const DYNAMICS: &[&str] = &[$($name),*];

        impl DynamicsConfig {
            /// The name in recipes.
            pub fn name(&self) -> &'static str {
                match self { $(Self::$config(_) => $name,)* }
            }

            /// The dynamics of one run.
            ///
            /// # Errors
            /// As [`Settings::fit`].
            pub fn fit(&self, fit: &mut Fit<'_>) -> Result<Box<dyn Dynamics>> {
                match self { $(Self::$config(settings) => Ok(Box::new(settings.fit(fit)?)),)* }
            }

            /// Every dynamics in each of its [`Settings::examples`].
            pub fn examples() -> Vec<(String, Self, &'static str)> {
                let mut all = Vec::new();
                $(all.extend($module::$config::examples().into_iter().map(|e| {
                    (format!("{} {}", $name, e.name), Self::$config(e.settings), e.adapter)
                }));)*
                all
            }

            /// The default settings of the dynamics called `name`.
            ///
            /// # Errors
            /// If there is no such dynamics; names the nearest.
            pub fn by_name(name: &str) -> Result<Self> {
                match name {
                    $($name => Ok(Self::$config($module::$config::default())),)*
                    _ => Err(Error::recipe(
                        "dynamics.method",
                        espalier_adapters::config::unknown_value(name, DYNAMICS),
                    )),
                }
            }
        }
    };
}

dynamics! {
    /// Every parameter by its own gradient.
    plain::Plain = "plain";
    /// The output side of a product learns faster.
    lora_plus::LoraPlus = "lora-plus";
    /// Only the output side of a product is trained.
    lora_fa::LoraFa = "lora-fa";
    /// The change of the whole weight follows full fine-tuning's.
    lora_pro::LoraPro = "lora-pro";
    /// Outputs that the product hardly changes yet learn faster.
    allora::Allora = "allora";
    /// A few blocks at a time, drawn anew every period.
    lisa::Lisa = "lisa";
    /// A few rows and columns at a time are exchanged with a pool, and the frozen weight makes up for it.
    switchlora::Switchlora = "switchlora";
    /// The product is added to the frozen weight and begins anew.
    relora::Relora = "relora";
    /// Dense weights, whose gradients are seen in a subspace.
    galore::Galore = "galore";
    /// A rank drawn at every step.
    dylora::Dylora = "dylora";
}

/// Whether a share is one: at least 0 and at most 1.
///
/// # Errors
/// If it is not.
pub(crate) fn checked_share(key: &str, value: f64) -> Result<f64> {
    match (0.0..=1.0).contains(&value) {
        true => Ok(value),
        false => Err(Error::recipe(format!("dynamics.{key}"), format!("{value} is not between 0 and 1"))),
    }
}

/// A number of at least 1.
///
/// # Errors
/// If it is 0.
pub(crate) fn checked_count(key: &str, value: usize) -> Result<usize> {
    match value {
        0 => Err(Error::recipe(format!("dynamics.{key}"), "must be at least 1")),
        n => Ok(n),
    }
}

/// A finite number above 0.
///
/// # Errors
/// If it is not.
pub(crate) fn checked_positive(key: &str, value: f64) -> Result<f64> {
    match value.is_finite() && value > 0.0 {
        true => Ok(value),
        false => Err(Error::recipe(format!("dynamics.{key}"), format!("{value} is not a number above 0"))),
    }
}
