//! From trained bytes to trained tokens, by the offsets of the tokens.

use std::ops::Range;

use tokenizers::Encoding;

use super::IGNORE;

/// Labels of the tokens that reach into one of the spans. Spans are in order and apart.
pub(super) fn label_spans(encoding: &Encoding, spans: &[Range<usize>]) -> Vec<i32> {
    let mut labels = Vec::with_capacity(encoding.len());
    let mut before = 0;
    let mut spans = spans.iter().filter(|span| !span.is_empty()).peekable();
    let tokens = encoding.get_ids().iter().zip(encoding.get_offsets()).zip(encoding.get_special_tokens_mask());
    for ((&id, &(start, end)), &added) in tokens {
        if added == 1 {
            labels.push(IGNORE);
            continue;
        }
        // Tokenizers may trim white space off the offsets; a token of nothing else then seems empty.
        let start = if start == end { before.min(end) } else { start };
        before = end.max(before);
        while spans.next_if(|span| span.end <= start).is_some() {}
        let trained = spans.peek().is_some_and(|span| end > span.start && start < span.end);
        labels.push(if trained { id as i32 } else { IGNORE });
    }
    labels
}
