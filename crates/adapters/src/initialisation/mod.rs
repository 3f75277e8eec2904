//! Where the factors A and B of a low-rank method start: one file per initialisation, and the list that registers them.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use espalier_kernels::frozen::FrozenWeight;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::adapter::{Evidence, Init, Site, Wanted};
use crate::parametrisation::lora::LoraLayer;
use crate::{Error, Result};

/// A [r, d_in] and B [d_out, r] of a site, as variables, and the base that is left where a part of it moved into B A.
#[derive(Debug)]
pub struct Factors {
    /// A.
    pub a: Tensor,
    /// B.
    pub b: Tensor,
    /// Where the initialisation took s B A out of W: what is left, and the B and A that were taken.
    pub moved: Option<Moved>,
}

/// A part of the base that became the start of an adapter.
#[derive(Debug, Clone)]
pub struct Moved {
    /// W - s B0 A0.
    pub residual: Arc<FrozenWeight>,
    /// A0 [r, d_in].
    pub a: Tensor,
    /// B0 [d_out, r].
    pub b: Tensor,
}

/// Where A and B start: one implementation per file.
pub trait Start: Clone + Default + PartialEq + Serialize + DeserializeOwned {
    /// Whether a part of the base moves into the adapter, so that the saved factors mean nothing without the residual.
    const MOVES_BASE: bool = false;

    /// What must be known of the data before the start can be made.
    fn wanted(&self) -> Option<Wanted> {
        None
    }

    /// A [r, d_in] and B [d_out, r] of a site with scaling `scale`, from what is known of the data there.
    ///
    /// # Errors
    /// If the evidence has another shape, or a decomposition fails.
    fn start_from(&self, site: &Site, scale: f64, evidence: &Evidence<'_>) -> Result<(Tensor, Tensor)> {
        let _ = (scale, evidence);
        Err(Error::unsupported(format!("evidence for {}", site.path), "the initialisation takes none"))
    }

    /// Makes the factors of a site with scaling `scale`.
    ///
    /// # Errors
    /// If the file's tensors do not fit or a decomposition fails.
    fn factors(&self, site: &Site, scale: f64, init: &mut Init<'_>) -> Result<Factors>;
}

macro_rules! initialisations {
    ($($(#[$doc:meta])* $module:ident :: $config:ident = $name:literal;)*) => {
        $(pub mod $module;)*

        /// Where A and B start: a name in recipes, or a table with `name` and the settings that are not as they come.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(try_from = "Value", into = "Value")]
        pub enum Initialisation {
            $($(#[$doc])* $config($module::$config),)*
        }

        /// Names of all initialisations, in the order of the list.
        pub const INITIALISATIONS: &[&str] = &[$($name),*];

        impl Initialisation {
            /// The name in recipes.
            pub fn name(&self) -> &'static str {
                match self { $(Self::$config(_) => $name,)* }
            }

            /// The initialisation called `name`, as it comes.
            ///
            /// # Errors
            /// If there is none; names the nearest.
            pub fn by_name(name: &str) -> Result<Self> {
                match name {
                    $($name => Ok(Self::$config($module::$config::default())),)*
                    _ => Err(Error::config("init", crate::config::unknown_value(name, INITIALISATIONS))),
                }
            }

            /// The initialisation called `name` with these settings.
            fn with_settings(name: &str, settings: Value) -> Result<Self> {
                let read = match name {
                    $($name => serde_json::from_value(settings).map(Self::$config),)*
                    _ => return Self::by_name(name),
                };
                read.map_err(|e| Error::config("init", format!("{name}: {e}")))
            }

            /// Its settings; the ones as it comes.
            fn settings(&self) -> serde_json::Result<(Value, Value)> {
                match self {
                    $(Self::$config(own) => Ok((serde_json::to_value(own)?,
                        serde_json::to_value($module::$config::default())?)),)*
                }
            }

            /// Makes the factors of a site with scaling `scale`.
            ///
            /// # Errors
            /// If the file's tensors do not fit or a decomposition fails.
            pub fn factors(&self, site: &Site, scale: f64, init: &mut Init<'_>) -> Result<Factors> {
                match self { $(Self::$config(own) => own.factors(site, scale, init),)* }
            }

            /// What must be known of the data before the start can be made.
            pub fn wanted(&self) -> Option<Wanted> {
                match self { $(Self::$config(own) => own.wanted(),)* }
            }

            /// A [r, d_in] and B [d_out, r] of a site from what is known of the data there.
            ///
            /// # Errors
            /// If the evidence has another shape, or a decomposition fails.
            pub fn start_from(&self, site: &Site, scale: f64, evidence: &Evidence<'_>) -> Result<(Tensor, Tensor)> {
                match self { $(Self::$config(own) => own.start_from(site, scale, evidence),)* }
            }

            /// Whether a part of the base moves into the adapter, so that the saved factors mean nothing without the residual.
            pub fn moves_base(&self) -> bool {
                match self { $(Self::$config(_) => <$module::$config as Start>::MOVES_BASE,)* }
            }
        }
    };
}

initialisations! {
    /// A uniform (Kaiming), B zero; for lookups A zero, B normal.
    kaiming::Kaiming = "default";
    /// Principal directions of the inputs that the data gives.
    eva::Eva = "eva";
    /// A normal with standard deviation 1/r, B zero.
    gaussian::Gaussian = "gaussian";
    /// From the singular vectors of the gradient that the data gives.
    lora_ga::LoraGa = "lora-ga";
    /// From the QR decomposition of the base.
    olora::Olora = "olora";
    /// From the principal singular vectors of the base.
    pissa::Pissa = "pissa";
    /// As `pissa`, by randomised subspace iteration.
    pissa_niter::PissaNiter = "pissa_niter";
}

impl Default for Initialisation {
    fn default() -> Self {
        Self::Kaiming(kaiming::Kaiming {})
    }
}

impl TryFrom<Value> for Initialisation {
    type Error = Error;

    fn try_from(value: Value) -> Result<Self> {
        match value {
            Value::String(name) => Self::by_name(&name),
            Value::Object(mut table) => match table.remove("name") {
                Some(Value::String(name)) => Self::with_settings(&name, Value::Object(table)),
                _ => Err(Error::config("init", "a table names the initialisation by `name`")),
            },
            other => Err(Error::config("init", format!("{other} is neither a name nor a table"))),
        }
    }
}

impl From<Initialisation> for Value {
    fn from(start: Initialisation) -> Self {
        match start.settings() {
            Ok((Value::Object(mut own), Value::Object(plain))) if own != plain => {
                own.insert("name".into(), start.name().into());
                Value::Object(own)
            }
            _ => start.name().into(),
        }
    }
}

impl Initialisation {
    /// PEFT's value of `init_lora_weights`.
    pub(crate) fn to_peft(&self) -> Value {
        match self {
            Self::Kaiming(_) => Value::Bool(true),
            Self::PissaNiter(_) => Value::from(format!("pissa_niter_{}", pissa_niter::ITERATIONS)),
            // What was made from data is a start like any other once it is saved.
            other if other.wanted().is_some() => Value::Bool(true),
            other => Value::from(other.name()),
        }
    }

    /// Reads PEFT's value of `init_lora_weights`.
    pub(crate) fn from_peft(value: &Value) -> Result<Self> {
        match value {
            Value::Bool(_) => Ok(Self::default()),
            Value::String(name) if name.starts_with("pissa_niter_") => Self::by_name("pissa_niter"),
            // Schemes that leave the base as it is matter only where training starts.
            Value::String(name) if matches!(name.as_str(), "eva" | "orthogonal") => Ok(Self::default()),
            Value::String(name) => match Self::by_name(name) {
                Ok(known) => Ok(known),
                Err(Error::Config { message, .. }) => Err(Error::config("init_lora_weights", message)),
                Err(error) => Err(error),
            },
            other => Err(Error::config("init_lora_weights", format!("{other} is not a valid value"))),
        }
    }
}

/// Shapes of A and B at a site.
fn shapes(site: &Site) -> ((usize, usize), (usize, usize)) {
    ((site.rank, site.d_in), (site.d_out, site.rank))
}

/// Factors whose start is computed from the base: `start` gives B0 and A0 with W ~ s B0 A0; the residual is W - s B0 A0.
fn from_base(
    site: &Site,
    scale: f64,
    init: &mut Init<'_>,
    start: impl FnOnce(&Tensor) -> Result<(Tensor, Tensor)>,
) -> Result<Factors> {
    if site.lookup {
        return Err(Error::unsupported(
            format!("an initialisation from the base on {}", site.path),
            "an embedding keeps its base; use the default initialisation",
        ));
    }
    let least = site.d_in.min(site.d_out);
    if site.rank > least {
        return Err(Error::config(
            "r",
            format!("{}: rank {} exceeds the rank {least} of the base it is taken from", site.path, site.rank),
        ));
    }
    let weight = site.base.dequantize(DType::F32)?;
    let (b0, a0) = start(&weight)?;
    let residual = (&weight - (b0.matmul(&a0)? * scale)?)?;
    let dtype = site.base.as_dense().map_or(DType::F32, Tensor::dtype);
    let residual = Arc::new(FrozenWeight::dense(residual.to_dtype(dtype)?)?);
    let (name_a, name_b) = LoraLayer::names(false);
    let (a, b) = (init.copy_of(name_a, &a0)?, init.copy_of(name_b, &b0)?);
    Ok(Factors { a, b, moved: Some(Moved { residual, a: a0, b: b0 }) })
}

/// Factors whose start was made from evidence of the data, given to [`Init`]; the frozen part becomes W - s B A where they
/// `move_base`, so that nothing has changed at the start.
fn from_data(name: &str, moves_base: bool, site: &Site, scale: f64, init: &mut Init<'_>) -> Result<Factors> {
    if site.lookup {
        return Err(Error::unsupported(
            format!("the initialisation {name} of {}", site.path),
            "the data says nothing of an embedding's inputs; use the default initialisation",
        ));
    }
    let (name_a, name_b) = LoraLayer::names(false);
    if init.is_fresh() && !init.has_start(name_b) {
        return Err(Error::unsupported(
            format!("the initialisation {name} of {}", site.path),
            "it starts from data, so it needs a training run; adapters are not made without one",
        ));
    }
    if moves_base {
        if !init.is_fresh() {
            return Err(Error::config(
                "init_lora_weights",
                format!(
                    "factors from {name} mean nothing without the residual they were made with; convert the adapter to \
                     plain LoRA where it was trained (PEFT: path_initial_model_for_weight_conversion)"
                ),
            ));
        }
        let (a, b) = (init.start(name_a)?, init.start(name_b)?);
        return from_base(site, scale, init, |_| Ok((b, a)));
    }
    let (shape_a, shape_b) = shapes(site);
    let absent = |_: &mut _, _: &_, _: &_| Err(Error::unsupported(name, "no start was made"));
    Ok(Factors { a: init.trainable(name_a, shape_a, absent)?, b: init.zeros(name_b, shape_b)?, moved: None })
}
