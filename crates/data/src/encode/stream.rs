//! Decoding of a growing sequence: only whole characters come out, and never a character twice.
//!
//! A window of tokens is decoded again with each new one. What is sure (no incomplete character at its end) and not yet
//! given out is given out; the window moves on when it ends in a whole character.

use super::{Outcome, TextCodec};

/// Tokens after which an incomplete character is taken as broken bytes: a character has at most four.
const PATIENCE: usize = 32;

/// Decoder of one growing sequence of ids.
#[derive(Debug)]
pub struct StreamDecoder<'a> {
    codec: &'a TextCodec,
    skip_special: bool,
    window: Vec<u32>,
    /// Tokens of the window that are only there as context for the following ones.
    context: usize,
    /// Bytes of the window's text already given out.
    given: usize,
}

impl<'a> StreamDecoder<'a> {
    pub(super) fn new(codec: &'a TextCodec, skip_special: bool) -> Self {
        Self { codec, skip_special, window: Vec::new(), context: 0, given: 0 }
    }

    /// Adds a token; the text that is now sure, if any.
    pub fn push(&mut self, id: u32) -> Outcome<Option<String>> {
        self.window.push(id);
        let text = self.codec.decode(&self.window, self.skip_special)?;
        let sure = text.trim_end_matches('\u{FFFD}');
        let late = self.window.len() - self.context > PATIENCE;
        let whole = sure.len() == text.len() || late;
        let sure = if whole { text.as_str() } else { sure };
        let new = sure.get(self.given..).unwrap_or_default().to_string();
        self.given = self.given.max(sure.len());
        // Tokens without text stay: the text of the following ones may depend on what was before them.
        if whole && (late || !new.is_empty()) {
            self.window.drain(..self.context);
            self.context = self.window.len();
            self.given = self.codec.decode(&self.window, self.skip_special)?.len();
        }
        Ok(Some(new).filter(|new| !new.is_empty()))
    }

    /// What is left at the end of the sequence: replacement characters for bytes that became no character.
    pub fn finish(self) -> Outcome<Option<String>> {
        let text = self.codec.decode(&self.window, self.skip_special)?;
        Ok(text.get(self.given..).filter(|rest| !rest.is_empty()).map(str::to_string))
    }
}
