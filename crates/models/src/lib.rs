//! Base models: one transformer made of switches, read from Hugging Face folders and GGUF files.
//!
//! [`config::ModelConfig`] holds the switches; `config/families.rs` translates each `config.json`; `source/` hands out the
//! weights; [`Model`] runs whole or block by block, with adapters in the places that
//! [`espalier_adapters::Host`] exposes. No file here names a method.

mod attention;
mod block;
mod builder;
pub mod cache;
pub mod claim;
pub mod config;
pub mod context;
mod decoder;
pub mod error;
pub mod export;
pub mod freed;
mod fused;
mod head;
#[cfg(feature = "hub")]
pub mod hub;
pub mod input;
mod laid;
mod load;
pub mod seedling;
pub mod source;
pub mod streamed;
mod transformer;
mod weight_files;

pub use block::{BlockPass, FlatGradients};
pub use cache::KvCache;
pub use config::ModelConfig;
pub use context::Context;
pub use error::{Error, Result};
pub use espalier_kernels::decode::Decoder;
pub use input::TokenBatch;
pub use laid::Begun;
pub use load::Provenance;
pub use source::{LoadOptions, Quantization};
pub use streamed::{Stage, Streamed};
pub use transformer::Model;
