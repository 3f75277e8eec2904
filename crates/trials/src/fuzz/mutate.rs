//! Inputs by number: a well-formed one with a few things wrong, at random and where the structure is.

use espalier_adapters::random::stream;
use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use super::Target;

/// Longest input.
const LONGEST: usize = 1 << 17;
/// Whole numbers at the edges of what fits.
const EDGES: [u64; 14] =
    [0, 1, 2, 7, 255, 256, 65_535, 65_536, 1 << 31, u32::MAX as u64, 1 << 32, 1 << 62, i64::MAX as u64, u64::MAX];

/// Input number `n` of a target; the same each time.
pub fn input(target: &Target, corpus: &[Vec<u8>], n: u64) -> Vec<u8> {
    let mut rng = stream(36, &format!("{}/{n}", target.name));
    let Some(seed) = corpus.choose(&mut rng) else { return Vec::new() };
    let mut bytes = seed.clone();
    for _ in 0..rng.random_range(1..=6) {
        change(&mut bytes, target, corpus, &mut rng);
        bytes.truncate(LONGEST);
    }
    bytes
}

fn change(bytes: &mut Vec<u8>, target: &Target, corpus: &[Vec<u8>], rng: &mut ChaCha8Rng) {
    let length = bytes.len();
    let at = rng.random_range(0..=length);
    let some = |rng: &mut ChaCha8Rng| at..(at + rng.random_range(0..64usize)).min(length);
    match rng.random_range(0..14) {
        0 if length > at => bytes[at] ^= 1 << rng.random_range(0..8),
        1 if length > at => bytes[at] = rng.random(),
        2 => drop(bytes.drain(some(rng))),
        3 => {
            let part = bytes[some(rng)].to_vec();
            let times = rng.random_range(1..20);
            bytes.splice(at..at, part.repeat(times));
        }
        4 => bytes.truncate(at),
        5 => {
            let word = target.words.choose(rng).copied().unwrap_or_default();
            bytes.splice(at..at, word.bytes());
        }
        6 => {
            let word = target.words.choose(rng).copied().unwrap_or_default();
            bytes.splice(some(rng), word.bytes());
        }
        7 => {
            let edge = EDGES.choose(rng).copied().unwrap_or_default().to_le_bytes();
            let wide = if rng.random() { 8 } else { 4 };
            bytes.iter_mut().skip(at).zip(&edge[..wide]).for_each(|(byte, edge)| *byte = *edge);
        }
        8 => {
            // From here on another input.
            let other = corpus.choose(rng).map(Vec::as_slice).unwrap_or_default();
            let from = rng.random_range(0..=other.len());
            bytes.truncate(at);
            bytes.extend(&other[from..]);
        }
        9 => number(bytes, at, rng),
        10 => {
            let open = ["[", "{\"a\":", "(", "{{", "{% if x %}", "<"].choose(rng).copied().unwrap_or_default();
            bytes.splice(at..at, open.repeat(rng.random_range(1..400)).bytes());
        }
        _ => structure(bytes, rng),
    }
}

/// Another number in place of the next one written in digits.
fn number(bytes: &mut Vec<u8>, at: usize, rng: &mut ChaCha8Rng) {
    let Some(from) = bytes.iter().skip(at).position(u8::is_ascii_digit).map(|p| p + at) else { return };
    let to = bytes.iter().skip(from).position(|b| !b.is_ascii_digit()).map_or(bytes.len(), |p| p + from);
    let edge = EDGES.choose(rng).copied().unwrap_or_default();
    let text = match rng.random_range(0..4) {
        0 => format!("-{edge}"),
        1 => format!("{edge}.5e{}", rng.random_range(0..400)),
        _ => edge.to_string(),
    };
    bytes.splice(from..to, text.bytes());
}

/// Something wrong inside of JSON that stays JSON: the whole input, or the header of a safetensors file, whose length then fits.
fn structure(bytes: &mut Vec<u8>, rng: &mut ChaCha8Rng) {
    if let Ok(mut value) = serde_json::from_slice::<Value>(bytes) {
        spoil(&mut value, rng);
        *bytes = value.to_string().into_bytes();
        return;
    }
    let Some(length) = bytes.first_chunk::<8>().map(|n| u64::from_le_bytes(*n) as usize) else { return };
    let Some(header) = length.checked_add(8).and_then(|end| bytes.get(8..end)) else { return };
    let Ok(mut value) = serde_json::from_slice::<Value>(header) else { return };
    spoil(&mut value, rng);
    let header = value.to_string();
    let rest = bytes.split_off(8 + length);
    *bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &rest].concat();
}

/// Goes down to some value and makes another of it.
fn spoil(value: &mut Value, rng: &mut ChaCha8Rng) {
    let deeper = rng.random_range(0..6) > 0;
    match value {
        Value::Object(map) if deeper && !map.is_empty() => {
            let at = rng.random_range(0..map.len());
            if let Some((_, item)) = map.iter_mut().nth(at) {
                return spoil(item, rng);
            }
        }
        Value::Array(list) if deeper && !list.is_empty() => {
            let at = rng.random_range(0..list.len());
            return spoil(&mut list[at], rng);
        }
        _ => {}
    }
    *value = match rng.random_range(0..9) {
        0 => Value::Null,
        1 => json!(EDGES.choose(rng).copied().unwrap_or_default()),
        2 => json!(-1),
        3 => json!(rng.random::<bool>()),
        4 => json!(""),
        5 => json!("é".repeat(rng.random_range(1..3000))),
        6 => json!([value.clone(), value.clone()]),
        7 => json!({"": value.clone()}),
        _ => json!(1e300),
    };
}
