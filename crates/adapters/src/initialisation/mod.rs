//! Where the factors A and B of a low-rank method start: one file per initialisation, and the list that registers them.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use espalier_kernels::frozen::FrozenWeight;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::adapter::{Init, Site};
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

macro_rules! initialisations {
    ($($(#[$doc:meta])* $module:ident :: $variant:ident = $name:literal;)*) => {
        $(pub mod $module;)*

        /// Where A and B start.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub enum Initialisation {
            $($(#[$doc])* $variant,)*
        }

        /// Names of all initialisations, in the order of the list.
        pub const INITIALISATIONS: &[&str] = &[$($name),*];

        impl Initialisation {
            /// The name in recipes.
            pub fn name(&self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The initialisation called `name`.
            ///
            /// # Errors
            /// If there is none; names the nearest.
            pub fn by_name(name: &str) -> Result<Self> {
                match name {
                    $($name => Ok(Self::$variant),)*
                    _ => Err(Error::config("init", crate::config::unknown_value(name, INITIALISATIONS))),
                }
            }

            /// Makes the factors of a site with scaling `scale`.
            ///
            /// # Errors
            /// If the file's tensors do not fit or a decomposition fails.
            pub fn factors(&self, site: &Site, scale: f64, init: &mut Init<'_>) -> Result<Factors> {
                match self { $(Self::$variant => $module::factors(site, scale, init),)* }
            }
        }
    };
}

initialisations! {
    /// A uniform (Kaiming), B zero; for lookups A zero, B normal.
    #[default]
    kaiming::Default = "default";
    /// A normal with standard deviation 1/r, B zero.
    gaussian::Gaussian = "gaussian";
    /// From the QR decomposition of the base.
    olora::Olora = "olora";
    /// From the principal singular vectors of the base.
    pissa::Pissa = "pissa";
    /// As `pissa`, by randomised subspace iteration.
    pissa_niter::PissaNiter = "pissa_niter";
}

impl TryFrom<String> for Initialisation {
    type Error = Error;

    fn try_from(name: String) -> Result<Self> {
        Self::by_name(&name)
    }
}

impl From<Initialisation> for String {
    fn from(value: Initialisation) -> Self {
        value.name().into()
    }
}

impl Initialisation {
    /// PEFT's value of `init_lora_weights`.
    pub(crate) fn to_peft(self) -> Value {
        match self {
            Self::Default => Value::Bool(true),
            Self::PissaNiter => Value::from(format!("pissa_niter_{}", pissa_niter::ITERATIONS)),
            other => Value::from(other.name()),
        }
    }

    /// Reads PEFT's value of `init_lora_weights`.
    pub(crate) fn from_peft(value: &Value) -> Result<Self> {
        match value {
            Value::Bool(_) => Ok(Self::Default),
            Value::String(name) if name.starts_with("pissa_niter_") => Ok(Self::PissaNiter),
            Value::String(name) => match Self::by_name(name) {
                Ok(known) => Ok(known),
                // Schemes that leave the base as it is matter only where training starts.
                Err(_) if matches!(name.as_str(), "eva" | "orthogonal") => Ok(Self::Default),
                Err(Error::Config { message, .. }) => Err(Error::config("init_lora_weights", message)),
                Err(error) => Err(error),
            },
            other => Err(Error::config("init_lora_weights", format!("{other} is not a valid value"))),
        }
    }

    /// Whether a part of the base moves into the adapter, so that the saved factors mean nothing without the residual.
    pub fn moves_base(self) -> bool {
        matches!(self, Self::Olora | Self::Pissa | Self::PissaNiter)
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
