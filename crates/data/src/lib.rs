//! Data sources, chat templates, packing, mixing and synthetic task generators.
//!
//! The way of a row: [`Source`] reads files record by record, [`Row`] names what a record means, [`TextCodec`] turns it
//! into token ids and labels (with [`ChatTemplate`] for conversations), [`TokenStore`] keeps the result of one pass, and
//! [`Batcher`] deals batches from one store or from a weighted [`Mixture`], packed or padded, the same for the same seed.

mod batch;
mod detect;
mod encode;
mod error;
#[doc(hidden)]
pub mod faults;
mod inspect;
mod mix;
mod pack;
mod row;
mod seed;
mod source;
mod store;
pub mod synthetic;
mod template;
mod train_tokenizer;

pub use batch::{Batch, BatchOptions, Batcher, PADDING, SplitSize, split};
pub use encode::{EncodeOptions, Example, IGNORE, SpecialTokens, StreamDecoder, TextCodec, Truncation};
pub use error::{DataError, Location, Result, RowError};
pub use inspect::{TokenView, describe_example};
pub use mix::{Draw, Mixture, Part};
pub use pack::{Packing, pack};
pub use row::{Label, Message, Row, Turns};
pub use source::{DataOptions, Format, Records, Rows, Source, TextUnit};
pub use store::{ExampleRef, Report, TokenStore, cache_key};
pub use template::{ChatTemplate, Rendered, SpansFrom};
pub use train_tokenizer::{TokenizerOptions, train_tokenizer};
