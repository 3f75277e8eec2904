//! A small template language for English text.
//!
//! `[a|b|c]` one of the alternatives (nested freely, may be empty); `{key}` a value of the scene, `{Key}` the same with a
//! capital; `{@class}` a fresh word of a class of the lexicon, `{@class+s}` its plural; `~` a double quote.
//! Afterwards `a` becomes `an` before a vowel sound, and a letter that opens a sentence is made a capital.

use super::draw::Draw;
use super::words;

/// The values that a template's `{key}`s stand for: who, where, with what. Fixed for one text, so that entities stay consistent.
#[derive(Default, Clone)]
pub(crate) struct Scene(Vec<(&'static str, String)>);

impl Scene {
    /// Sets `key`; a later value replaces an earlier one.
    pub(crate) fn set(&mut self, key: &'static str, value: impl Into<String>) -> &mut Self {
        let value = value.into();
        match self.0.iter_mut().find(|(known, _)| *known == key) {
            Some(entry) => entry.1 = value,
            None => self.0.push((key, value)),
        }
        self
    }

    /// The value of `key`, or an empty string.
    pub(crate) fn get(&self, key: &str) -> &str {
        self.0.iter().find(|(known, _)| *known == key).map_or("", |(_, value)| value.as_str())
    }

    fn has(&self, key: &str) -> bool {
        self.0.iter().any(|(known, _)| *known == key)
    }

    /// Pronouns of the entity `prefix`: `{he}`, `{him}`, `{his}`, `{himself}`, each behind the prefix.
    pub(crate) fn pronouns(&mut self, keys: [&'static str; 4], female: bool) -> &mut Self {
        let forms = if female { ["she", "her", "her", "herself"] } else { ["he", "him", "his", "himself"] };
        for (key, form) in keys.into_iter().zip(forms) {
            self.set(key, form);
        }
        self
    }

    /// Expands and polishes one template.
    pub(crate) fn say(&self, template: &str, draw: &mut Draw) -> String {
        let mut raw = String::with_capacity(template.len());
        self.expand(template, draw, &mut raw);
        polish(&raw)
    }

    /// Expands without the final polish: for fragments that go into another template.
    pub(crate) fn fragment(&self, template: &str, draw: &mut Draw) -> String {
        let mut raw = String::with_capacity(template.len());
        self.expand(template, draw, &mut raw);
        raw
    }

    fn expand(&self, template: &str, draw: &mut Draw, out: &mut String) {
        let mut rest = template;
        while let Some(at) = rest.find(['[', '{', '~']) {
            out.push_str(&rest[..at]);
            let tail = &rest[at + 1..];
            match rest.as_bytes()[at] {
                b'~' => {
                    out.push('"');
                    rest = tail;
                }
                b'{' => {
                    let (key, after) = tail.split_once('}').unwrap_or((tail, ""));
                    self.value(key, draw, out);
                    rest = after;
                }
                _ => {
                    let (choices, after) = alternatives(tail);
                    let chosen = *draw.pick(&choices);
                    self.expand(chosen, draw, out);
                    rest = after;
                }
            }
        }
        out.push_str(rest);
    }

    fn value(&self, key: &str, draw: &mut Draw, out: &mut String) {
        if let Some(class) = key.strip_prefix('@') {
            let (class, many) = class.strip_suffix("+s").map_or((class, false), |name| (name, true));
            match words::class(class) {
                Some(list) => {
                    let word = draw.word(list);
                    if many { out.push_str(&words::plural(word)) } else { out.push_str(word) }
                }
                None => unknown(key, out),
            }
        } else if self.has(key) {
            out.push_str(self.get(key));
        } else {
            let lower = key.to_ascii_lowercase();
            if lower != key && self.has(&lower) {
                out.push_str(&capital(self.get(&lower)));
            } else {
                unknown(key, out);
            }
        }
    }
}

/// A key that no scene sets stays visible, braces and all; the tests look for braces in the output.
fn unknown(key: &str, out: &mut String) {
    out.push('{');
    out.push_str(key);
    out.push('}');
}

/// Splits `a|b]rest` at the top level into the choices and what follows the closing bracket.
fn alternatives(text: &str) -> (Vec<&str>, &str) {
    let (mut depth, mut start) = (0usize, 0usize);
    let mut choices = Vec::with_capacity(4);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'[' => depth += 1,
            b']' if depth > 0 => depth -= 1,
            b'|' if depth == 0 => {
                choices.push(&text[start..at]);
                start = at + 1;
            }
            b']' => {
                choices.push(&text[start..at]);
                return (choices, &text[at + 1..]);
            }
            _ => {}
        }
    }
    choices.push(&text[start..]);
    (choices, "")
}

/// The word with a capital first letter.
pub(crate) fn capital(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| first.to_ascii_uppercase().to_string() + letters.as_str())
}

/// `a` or `an`, whichever the word takes.
pub(crate) fn article(word: &str) -> &'static str {
    if vowel_sound(word) { "an" } else { "a" }
}

fn vowel_sound(word: &str) -> bool {
    if word.starts_with("hour") || word.starts_with("honest") {
        return true;
    }
    let hard = ["uni", "use", "one", "eu"].iter().any(|prefix| word.starts_with(prefix));
    !hard && word.starts_with(['a', 'e', 'i', 'o', 'u', 'A', 'E', 'I', 'O', 'U'])
}

/// Articles and sentence capitals.
pub(crate) fn polish(raw: &str) -> String {
    let mut out = String::with_capacity(raw.len() + 8);
    let mut opens = true;
    let mut previous = ' ';
    for (at, letter) in raw.char_indices() {
        if opens && letter.is_ascii_alphabetic() {
            out.push(letter.to_ascii_uppercase());
            opens = false;
        } else {
            opens = match letter {
                ' ' => opens || matches!(previous, '.' | '!' | '?'),
                '\n' => true,
                '"' => opens,
                _ => false,
            };
            out.push(letter);
        }
        let alone = !previous.is_ascii_alphanumeric() && previous != '\'';
        let follows = raw[at + letter.len_utf8()..].strip_prefix(' ');
        if alone && matches!(letter, 'a' | 'A') && follows.is_some_and(vowel_sound) {
            out.push('n');
        }
        previous = letter;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn articles_and_capitals_follow_english() {
        let mut scene = Scene::default();
        scene.set("thing", "apple").set("name", "Mia");
        let mut draw = Draw::new(1, "test", 0, 0, 0);
        let said =
            scene.say("a {thing} and a useful egg. {name} saw a owl! a hour? ~A orange,~ said {name}.", &mut draw);
        assert_eq!(said, "An apple and a useful egg. Mia saw an owl! An hour? \"An orange,\" said Mia.");
    }

    #[test]
    fn alternatives_nest_and_may_be_empty() {
        let scene = Scene::default();
        let mut seen = std::collections::BTreeSet::new();
        for index in 0..200 {
            seen.insert(scene.fragment("x[|1[a|b]]", &mut Draw::new(1, "test", 0, index, 0)));
        }
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["x", "x1a", "x1b"]);
    }
}
