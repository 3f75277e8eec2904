//! Adapters for frozen linear maps.
//!
//! A model is built from the three modules here ([`Linear`], [`Embedding`], [`Norm`]); each has a place where a named
//! adapter can act. A *method* (one file under [`parametrisation`]) says what the change is made of, an *initialisation*
//! (one file under [`initialisation`]) where it starts, a [`target::TargetSpec`] where it sits, and [`AdapterSet`] keeps
//! several adapters by name, switches and combines them. Files are read and written by [`formats`] alone.
//!
//! Invariants: no method names a model; only [`formats`] knows the key names of other tools' files; nothing prints.

pub mod adapter;
pub mod attach;
pub mod auxiliary;
mod base;
pub mod by_row;
pub mod combine;
pub mod config;
mod cut;
pub mod decomposition;
mod embedding;
mod encoder;
pub mod error;
pub mod flow;
pub mod formats;
mod init;
pub mod initialisation;
pub mod low_rank;
pub mod module;
mod output_dropout;
pub mod parameter;
pub mod parametrisation;
pub mod projected;
pub mod prompt;
pub mod random;
mod rotation;
pub mod set;
mod sites;
pub mod target;
pub mod tied;
mod weight_space;
pub mod written;

pub use adapter::{Adapter, Init, Method, Site};
pub use config::AdapterConfig;
pub use error::{Error, Result};
pub use espalier_kernels::frozen::FrozenWeight;
pub use flow::Flow;
pub use low_rank::LowRankView;
pub use module::{Dense, Embedding, Host, Linear, ModuleMut, Norm};
pub use parameter::{Parameter, ParameterMap};
pub use parametrisation::MethodConfig;
pub use set::AdapterSet;
