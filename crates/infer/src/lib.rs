//! Generation and evaluation: KV cache, sampling, streaming.
//!
//! [`generate`] continues token prompts in batches; [`ChatSession`] keeps a conversation; [`eval`] scores a model on rows
//! and examples; [`probe`] gives raw scores. Every sequence has its own random stream, so an answer does not depend on
//! what else is in the batch.

mod chat;
mod error;
pub mod eval;
mod generate;
mod limits;
pub mod probe;
mod sampler;
mod sequence;
mod stop;

pub use chat::{ChatSession, Reply};
pub use error::{Error, Result};
pub use generate::{Event, GenerateOptions, Generated, Stats, end_ids, generate, prompt_ids};
pub use limits::{longest, max_length};
pub use sampler::{Sampler, SamplingConfig};
pub use sequence::{Completion, Finish};
