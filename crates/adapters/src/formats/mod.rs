//! File formats of adapters: the only place that knows the key names of other tools' files, and the only place of this
//! crate that opens files.

pub mod atomic;
pub mod check;
mod copies;
pub mod faults;
pub mod folder;
pub mod forms;
pub mod gguf;
pub(crate) mod gguf_adapter;
pub mod hash;
mod loralib;
pub mod mlx;
mod outline;
pub mod peft_config;
mod products;
pub mod safetensors;
mod tied;
