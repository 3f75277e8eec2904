//! What a change is made of: one file per method, and the one list that registers them.
//!
//! A method is added by writing its file and one line in the list below; the configuration enum, the recipe values and
//! the documentation index follow from it.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::adapter::{Adapter, Init, Method, Site};
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
    /// Weight-decomposed low-rank adaptation.
    dora::Dora = "dora";
    /// A product whose first components work by themselves.
    dylora::Dylora = "dylora";
    /// Low-rank adaptation.
    lora::Lora = "lora";
    /// One frozen random pair shared by all layers, two trained vectors in each.
    vera::Vera = "vera";
    /// Every weight of the target modules, densely.
    full::Full = "full";
}
