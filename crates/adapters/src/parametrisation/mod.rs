//! What a change is made of: one file per method, and the one list that registers them.
//!
//! A method is added by writing its file and one line in the list below; the configuration enum, the recipe values and
//! the documentation index follow from it.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::adapter::{Adapter, Init, Method, PromptSite, Property, Reach, Site};
use crate::prompt::{PromptShape, Prompter};
use crate::{Error, Result};

macro_rules! methods {
    ($($(#[$doc:meta])* $module:ident :: $config:ident = $name:literal;)*) => {
        $(pub mod $module;)*

        /// Which method, with its settings; in recipes tagged by `method`.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "method")]
        pub enum MethodConfig {
            $($(#[$doc])* #[serde(rename = $name)] $config($module::$config),)*
        }

        /// Names of all methods, in the order of the list.
        pub const METHODS: &[&str] = &[$($name),*];

        impl MethodConfig {
            /// The method's name in recipes.
            pub fn name(&self) -> &'static str {
                match self { $(Self::$config(_) => $name,)* }
            }

            /// Makes the layer for one site. Errors as [`Method::attach`].
            ///
            /// # Errors
            /// If the settings do not fit the site, or a file's tensors do not fit.
            pub fn attach(&self, site: &Site, init: &mut Init<'_>) -> Result<std::sync::Arc<dyn Adapter>> {
                init.path.clone_from(&site.path);
                match self { $(Self::$config(method) => Ok(std::sync::Arc::new(method.attach(site, init)?)),)* }
            }

            /// What the method acts on.
            pub fn reach(&self) -> Reach<'_> {
                match self { $(Self::$config(method) => method.reach(),)* }
            }

            /// Makes what stands before the sequences.
            ///
            /// # Errors
            /// If the settings do not fit the model, or a file's tensors do not fit.
            pub fn prompter(&self, site: &PromptSite<'_>, init: &mut Init<'_>) -> Result<std::sync::Arc<dyn Prompter>> {
                match self { $(Self::$config(method) => method.prompter(site, init),)* }
            }

            /// The settings with the model's sizes filled in.
            ///
            /// # Errors
            /// If sizes were given that are not the model's.
            pub fn fitted(&self, shape: &PromptShape) -> Result<Self> {
                Ok(match self { $(Self::$config(method) => Self::$config(method.fitted(shape)?),)* })
            }

            /// The sizes of the model that the settings are for, where they say so.
            pub fn prompt_shape(&self) -> Option<PromptShape> {
                match self { $(Self::$config(method) => method.prompt_shape(),)* }
            }

            /// Whether a run of `steps` steps trains the method as its settings say.
            ///
            /// # Errors
            /// If it does not.
            pub fn check_schedule(&self, steps: usize) -> Result<()> {
                match self { $(Self::$config(method) => method.check_schedule(steps),)* }
            }

            /// Why the method has not this property, if it has not.
            pub fn exception(&self, property: Property) -> Option<&'static str> {
                let all = match self { $(Self::$config(_) => $module::$config::exceptions(),)* };
                all.iter().find(|(excepted, _)| *excepted == property).map(|(_, reason)| *reason)
            }

            /// Rank and scaling numerator before patterns.
            pub fn rank_and_alpha(&self) -> (usize, f64) {
                match self { $(Self::$config(method) => method.rank_and_alpha(),)* }
            }

            /// Paths of the modules that the settings name one by one.
            pub fn named_modules(&self) -> Vec<&str> {
                match self { $(Self::$config(method) => method.named_modules(),)* }
            }

            /// Every method in each of its [`Method::examples`], by name.
            pub fn examples() -> Vec<(String, Self)> {
                let mut all = Vec::new();
                $(for (name, method) in $module::$config::examples() {
                    all.push((format!("{} {name}", $name), Self::$config(method)));
                })*
                all
            }

            /// Whether an adapter so set up changes nothing before it is trained.
            pub fn starts_at_base(&self) -> bool {
                match self { $(Self::$config(method) => method.starts_at_base(),)* }
            }

            /// The method of portable parameters, with the factors on ranks and alphas.
            pub fn portable(&self) -> Option<(Self, usize, f64)> {
                match self { $(Self::$config(method) => method.portable().map(|(m, r, a)| (Self::$config(m), r, a)),)* }
            }

            /// Settings under PEFT's keys, or None where PEFT lacks the method.
            pub fn to_peft(&self) -> Option<Map<String, Value>> {
                match self { $(Self::$config(method) => method.to_peft(),)* }
            }

            /// Reads PEFT's keys, removing those it used.
            ///
            /// # Errors
            /// If the type of adapter is not known, or a key's value is not.
            pub fn from_peft(keys: &mut Map<String, Value>) -> Result<Self> {
                $(if let Some(method) = $module::$config::from_peft(keys)? {
                    return Ok(Self::$config(method));
                })*
                Err(Error::config("peft_type", format!(
                    "{} is not a method known here (known: {})",
                    keys.get("peft_type").unwrap_or(&Value::Null), METHODS.join(", ")
                )))
            }

            /// The default settings of the method called `name`.
            ///
            /// # Errors
            /// If there is no such method; names the nearest.
            pub fn by_name(name: &str) -> Result<Self> {
                match name {
                    $($name => Ok(Self::$config($module::$config::default())),)*
                    _ => Err(Error::config("method", crate::config::unknown_value(name, METHODS))),
                }
            }
        }
    };
}

methods! {
    /// A product in the form of a singular value decomposition, pruned while it is trained.
    adalora::AdaLora = "adalora";
    /// Weight-decomposed low-rank adaptation.
    dora::Dora = "dora";
    /// Low-rank adaptation.
    lora::Lora = "lora";
    /// One frozen random pair shared by all layers, two trained vectors in each.
    vera::Vera = "vera";
    /// Every weight of the target modules, densely.
    full::Full = "full";
    /// The norms of the model, trained whole.
    ln_tuning::LnTuning = "ln_tuning";
    /// Vectors made by a small network before those of the tokens.
    p_tuning::PTuning = "p_tuning";
    /// Trained keys and values before those of every block.
    prefix_tuning::PrefixTuning = "prefix_tuning";
    /// Trained vectors before those of the tokens.
    prompt_tuning::PromptTuning = "prompt_tuning";
    /// Rows of the token table alone.
    trainable_tokens::TrainableTokens = "trainable_tokens";
}
