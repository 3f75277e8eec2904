//! Classification rows: a text or a pair within the tokens that the tokenizer sets around it, and the class.
//!
//! Where the length limit cuts, the longer of the two texts gives way first and the tokens around them stay.

use tokenizers::{Encoding, PostProcessor, TruncationDirection};

use super::guard::guarded;
use super::{Example, IGNORE, Outcome, TextCodec, Truncation};
use crate::error::RowError;
use crate::row::Label;

impl TextCodec {
    pub(super) fn classified(&self, text: &str, pair: Option<&str>, label: &Label) -> Outcome<Example> {
        let class = self.class(label)?;
        let mut first = self.tokenize(text, false)?;
        let mut second = pair.map(|pair| self.tokenize(pair, false)).transpose()?;
        let tokenizer = self.tokenizer.as_ref().ok_or(RowError::NoTokenizer)?;
        let added = tokenizer.get_post_processor().map_or(0, |p| p.added_tokens(pair.is_some()));
        let bos = usize::from(self.specials.add_bos && added == 0);
        let length = |a: &Encoding, b: &Option<Encoding>| a.len() + b.as_ref().map_or(0, Encoding::len) + added + bos;
        let whole = length(&first, &second);
        let mut truncated = false;
        if let Some(max_length) = self.options.max_length
            && whole > max_length
        {
            let side = match self.options.truncation {
                Truncation::Right => TruncationDirection::Right,
                Truncation::Left => TruncationDirection::Left,
                truncation => return Err(RowError::TooLong { length: whole, max_length, truncation }),
            };
            // The longer text gives way first; the tokens around the texts stay.
            let room = max_length.saturating_sub(added + bos);
            let (a, b) = shares(first.len(), second.as_ref().map_or(0, Encoding::len), room);
            first.truncate(a, 0, side);
            if let Some(second) = second.as_mut() {
                second.truncate(b, 0, side);
            }
            truncated = true;
        }
        let joined = guarded(|| tokenizer.post_process(first, second, true)).map_err(RowError::Tokenizer)?;
        let mut ids = joined.get_ids().to_vec();
        if let Some(bos) = self.declared_bos(&ids) {
            ids.insert(0, bos);
        }
        let labels = vec![IGNORE; ids.len()];
        let mut example = self.finish(ids, labels, Some(class))?;
        example.truncated |= truncated;
        Ok(example)
    }

    fn class(&self, label: &Label) -> Outcome<u32> {
        let names = self.options.label_names.as_deref();
        let known = || names.map_or("whole numbers from 0".to_string(), |names| names.join(", "));
        let (index, found) = match label {
            Label::Index(index) => (Some(*index), index.to_string()),
            Label::Name(name) => {
                let by_name = names.and_then(|names| names.iter().position(|known| known == name));
                (by_name.or_else(|| name.trim().parse().ok()), format!("{name:?}"))
            }
        };
        index
            .filter(|index| names.is_none_or(|names| *index < names.len()))
            .and_then(|index| u32::try_from(index).ok())
            .filter(|index| *index != u32::MAX)
            .ok_or_else(|| RowError::Label { found, known: known() })
    }
}

/// How a pair shares `room` tokens when the longer text is cut first.
fn shares(a: usize, b: usize, room: usize) -> (usize, usize) {
    let half = room / 2;
    if a <= half {
        (a.min(room), b.min(room - a.min(room)))
    } else if b <= room - half {
        (a.min(room - b.min(room)), b)
    } else {
        (half, room - half)
    }
}
