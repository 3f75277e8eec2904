//! What a change is made of: one file per method, and the one list that registers them.
//!
//! A method is added by writing its file and one line in the list below; the configuration enum, the recipe values and
//! the documentation index follow from it.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::adapter::{Adapter, Evidence, Init, Method, PromptSite, Property, Reach, Site, Wanted};
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

            /// Looks at the paths of all sites before the first layer is made.
            ///
            /// # Errors
            /// If a setting names none of them.
            pub fn check_sites(&self, paths: &[&str]) -> Result<()> {
                match self { $(Self::$config(method) => method.check_sites(paths),)* }
            }

            /// Endings of the names that the method's tensors have in files, where it says so.
            pub fn tensors(&self) -> &'static [&'static str] {
                fn of<M: Method>(_: &M) -> &'static [&'static str] {
                    M::TENSORS
                }
                match self { $(Self::$config(method) => of(method),)* }
            }

            /// Endings of the names that tensors of any method have in files.
            pub fn tensor_names() -> impl Iterator<Item = &'static str> {
                [$(<$module::$config as Method>::TENSORS),*].into_iter().flatten().copied()
            }

            /// What must be known of the data before a new adapter can be made.
            pub fn wanted(&self) -> Option<Wanted> {
                match self { $(Self::$config(method) => method.wanted(),)* }
            }

            /// The tensors that a new layer at `site` starts with, by their names there, from what is known of the data.
            ///
            /// # Errors
            /// If the evidence has another shape, or a decomposition fails.
            pub fn starts(
                &self,
                site: &Site,
                evidence: &Evidence<'_>,
            ) -> Result<Vec<(String, candle_core::Tensor)>> {
                match self { $(Self::$config(method) => method.starts(site, evidence),)* }
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

            /// How many places of a sequence the method takes for what stands before it.
            pub fn virtual_tokens(&self) -> usize {
                match self { $(Self::$config(method) => method.virtual_tokens(),)* }
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

            /// Takes from the tensors of a file what its settings do not say.
            pub fn settle(&mut self, tensors: &std::collections::BTreeMap<String, candle_core::Tensor>) {
                match self { $(Self::$config(method) => method.settle(tensors),)* }
            }

            /// The method of portable parameters, with the factors on ranks and alphas.
            pub fn portable(&self) -> Option<(Self, usize, f64)> {
                match self { $(Self::$config(method) => method.portable().map(|(m, r, a)| (Self::$config(m), r, a)),)* }
            }

            /// The method of the first `rank` components, where they work by themselves.
            pub fn cut(&self, rank: usize) -> Option<Self> {
                match self { $(Self::$config(method) => method.cut(rank),)* }
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
    /// Low-rank adaptation in blocks that share one down-projection.
    block_lora::BlockLora = "block-lora";
    /// Orthogonal maps of the inputs as products of sparse ones, and factors on the outputs.
    boft::Boft = "boft";
    /// A block matrix multiplied into the frozen weight's blocks and added to them; MiSS.
    bone::Bone = "bone";
    /// Low-rank adaptation with a gate for every rank.
    codyra::Codyra = "codyra";
    /// Weight-decomposed low-rank adaptation.
    dora::Dora = "dora";
    /// A product whose first components work by themselves.
    dylora::Dylora = "dylora";
    /// Few entries of the change's spectrum.
    fourierft::Fourierft = "fourierft";
    /// Chains of Householder reflections of the inputs.
    hra::Hra = "hra";
    /// Learned factors on the outputs of maps, or on the inputs of feed-forward ones.
    ia3::Ia3 = "ia3";
    /// The entrywise product of two low-rank matrices.
    loha::Loha = "loha";
    /// The Kronecker product of a small matrix and a low-rank one.
    lokr::Lokr = "lokr";
    /// Low-rank adaptation.
    lora::Lora = "lora";
    /// A small trained matrix between frozen factors; LoRA-SB.
    lora_xs::LoraXs = "lora-xs";
    /// Factors mixed from random matrices that a seed gives.
    nola::Nola = "nola";
    /// Orthogonal maps of the inputs in blocks.
    oft::Oft = "oft";
    /// A full-rank change from diagonal factors of frozen random products.
    randlora::RandLora = "randlora";
    /// Low-rank factors put together from vectors that all layers share.
    vblora::Vblora = "vblora";
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
