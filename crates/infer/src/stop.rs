//! Stop strings in a stream of text pieces: what may still become a stop string is held back.
//!
//! The stop string that is complete first ends the text, wherever the pieces are cut; of those that end at the same
//! place the longest counts. The result is therefore the same for any tokenisation of the text.

/// Watches one text for stop strings.
#[derive(Debug)]
pub(crate) struct StopFilter<'a> {
    stops: &'a [String],
    held: String,
}

impl<'a> StopFilter<'a> {
    /// A filter for these stop strings, none of them empty.
    pub(crate) fn new(stops: &'a [String]) -> Self {
        Self { stops, held: String::new() }
    }

    /// Adds a piece: the text that is now sure to stand before any stop string, and the stop string if one is complete.
    pub(crate) fn push(&mut self, piece: &str) -> (String, Option<&'a str>) {
        self.held.push_str(piece);
        let hit = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()).map(|start| (start + stop.len(), start, stop.as_str())))
            .min();
        if let Some((_, start, stop)) = hit {
            let mut text = std::mem::take(&mut self.held);
            text.truncate(start);
            return (text, Some(stop));
        }
        let held = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - held);
        (std::mem::replace(&mut self.held, rest), None)
    }

    /// What was held back, when no more text comes.
    pub(crate) fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes of the longest end of `text` that begins `stop` without being all of it.
fn overlap(text: &str, stop: &str) -> usize {
    stop.char_indices()
        .map(|(at, _)| at)
        .rev()
        .find(|at| *at <= text.len() && stop.get(..*at).is_some_and(|start| text.ends_with(start)))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, Vec<String>, Option<String>) {
        let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
        let mut filter = StopFilter::new(&stops);
        let mut given = Vec::new();
        for piece in pieces {
            let (text, hit) = filter.push(piece);
            given.push(text);
            if let Some(hit) = hit {
                return (given.concat(), given, Some(hit.to_string()));
            }
        }
        given.push(filter.flush());
        (given.concat(), given, None)
    }

    #[test]
    fn a_stop_string_over_several_pieces_is_cut() {
        let (text, given, hit) = run(&["</end>"], &["ab<", "/e", "nd>tail"]);
        assert_eq!((text.as_str(), hit.as_deref()), ("ab", Some("</end>")));
        assert_eq!(given, ["ab", "", ""]);
    }

    #[test]
    fn held_text_comes_out_when_it_becomes_no_stop_string() {
        let (text, given, hit) = run(&["aab"], &["xa", "a", "a", "c", "a"]);
        assert_eq!((text.as_str(), hit), ("xaaaca", None));
        assert_eq!(given, ["x", "", "a", "aac", "", "a"]);
    }

    #[test]
    fn the_result_does_not_depend_on_the_pieces() {
        let text = "über abcd ende";
        for stops in [&["bcd", "c"][..], &["c", "bcd"], &["e", "de"], &["ü"], &["zz"], &["d ", "bcd e"]] {
            let whole = run(stops, &[text]);
            let chars: Vec<String> = text.chars().map(String::from).collect();
            let chars: Vec<&str> = chars.iter().map(String::as_str).collect();
            let single = run(stops, &chars);
            assert_eq!((whole.0, whole.2), (single.0, single.2), "{stops:?}");
        }
    }

    #[test]
    fn several_bytes_in_one_character_are_not_split() {
        let (text, _, hit) = run(&["é!"], &["caf", "é", "é", "!"]);
        assert_eq!((text.as_str(), hit.as_deref()), ("café", Some("é!")));
    }
}
