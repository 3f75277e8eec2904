//! An example token by token, for the eye: what is trained and what is not.

use crate::encode::{Example, IGNORE, TextCodec};

/// One token of an example.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct TokenView {
    /// Its id.
    pub id: u32,
    /// Its text; where it is no whole character, its name in the vocabulary.
    pub text: String,
    /// Whether the loss counts it. The first token never is: nothing predicts it.
    pub trained: bool,
}

/// The tokens of an example with their text and whether they are trained.
pub fn describe_example(codec: &TextCodec, example: &Example) -> Vec<TokenView> {
    let name = |id: u32| codec.tokenizer().and_then(|t| t.id_to_token(id)).unwrap_or_else(|| format!("<{id}>"));
    example
        .input_ids
        .iter()
        .zip(&example.labels)
        .enumerate()
        .map(|(at, (&id, &label))| {
            let text = match codec.decode(&[id], false) {
                Ok(text) if !text.is_empty() && !text.contains('\u{FFFD}') => text,
                _ => name(id),
            };
            TokenView { id, text, trained: at > 0 && label != IGNORE }
        })
        .collect()
}
