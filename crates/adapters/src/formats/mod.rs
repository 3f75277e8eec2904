//! File formats of adapters: the only place that knows the key names of other tools' files, and the only place of this
//! crate that opens files.

pub mod atomic;
mod base_mark;
pub mod check;
mod copies;
pub mod folder;
pub mod forms;
pub mod gguf;
pub(crate) mod gguf_adapter;
pub mod hash;
mod loralib;
pub mod mlx;
mod outline;
pub mod peft_config;
pub mod piecewise;
mod products;
pub mod safetensors;
pub mod sum;
mod tied;
