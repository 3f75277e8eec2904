//! The answers of the generated tasks, worked out again from the questions.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, HashSet};

use espalier_data::synthetic::{Generator, LABELS, Sample, Skill, Split, UNITS};

fn draws(skill: Skill, seed: u64, split: Split, count: u64) -> Vec<Sample> {
    let generator = Generator::of(skill, seed, split);
    (0..count).map(|index| generator.sample(index)).collect()
}

/// Items of a list answer, whatever its separator.
fn items(answer: &str) -> Vec<&str> {
    for separator in [", ", " - ", " / "] {
        if answer.contains(separator) {
            return answer.split(separator).collect();
        }
    }
    answer.split(' ').collect()
}

#[test]
fn list_answers_follow_their_rules() {
    let skills =
        [Skill::Copy, Skill::Reverse, Skill::Sort, Skill::Tally, Skill::Swap, Skill::RotateLeft, Skill::RotateRight];
    for skill in skills {
        for sample in draws(skill, 21, Split::Train, 800) {
            let given: Vec<&str> = sample.key.split_once('|').unwrap().1.split(' ').collect();
            let answer = sample.answer.unwrap();
            let prompt = sample.prompt.unwrap();
            let shown = prompt.lines().rev().take(2).collect::<Vec<_>>().join(" ");
            assert!(given.iter().all(|item| shown.contains(item)), "{prompt}");
            let mut expected = given.clone();
            let last = given.len() - 1;
            match skill {
                Skill::Reverse => expected.reverse(),
                Skill::Sort => expected.sort_by_key(|item| (item.parse::<u32>().unwrap_or(0), item.to_lowercase())),
                Skill::Swap => expected.swap(0, last),
                Skill::RotateLeft => expected.rotate_left(1),
                Skill::RotateRight => expected.rotate_right(1),
                _ => {}
            }
            if skill == Skill::Tally {
                assert_eq!(answer, format!("{} items: {}..{}", given.len(), given[0], given[last]));
            } else if given.iter().all(|item| item.chars().all(char::is_alphanumeric)) {
                assert_eq!(items(&answer), expected, "{skill}: {prompt}");
            } else {
                assert_eq!(answer, expected.join(" "), "{skill}: {prompt}");
            }
        }
    }
}

/// All `a op b = c` and `a op b - 1 = c` lines and sentences of a worked answer.
fn equations(text: &str) -> Vec<(Vec<String>, i64)> {
    let mut found = Vec::new();
    for piece in text.split(['\n', ',', '.']) {
        let piece = piece.rsplit(": ").next().unwrap_or(piece);
        if let Some((left, right)) = piece.split_once(" = ") {
            let terms: Vec<String> = left.split_whitespace().map(str::to_owned).collect();
            found.push((terms, right.trim().parse().unwrap()));
        }
    }
    found
}

fn evaluate(terms: &[String]) -> i64 {
    let mut value: i64 = terms[0].parse().unwrap();
    for pair in terms[1..].chunks(2) {
        let operand: i64 = pair[1].parse().unwrap();
        value = match pair[0].as_str() {
            "+" => value + operand,
            "-" => value - operand,
            _ => value * operand,
        };
    }
    value
}

#[test]
fn arithmetic_is_right_in_every_step() {
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    for sample in draws(Skill::Arithmetic, 4, Split::Train, 3000) {
        let asked: Vec<String> = sample.key.split(' ').map(str::to_owned).collect();
        let result = evaluate(&asked);
        assert!(result >= 0, "{}", sample.key);
        let answer = sample.answer.unwrap();
        *kinds.entry(asked[1].clone()).or_default() += 1;
        if let Ok(bare) = answer.parse::<i64>() {
            assert_eq!(bare, result, "{}", sample.key);
            continue;
        }
        let steps = equations(&answer);
        assert!(!steps.is_empty(), "{answer}");
        for (terms, value) in &steps {
            assert_eq!(evaluate(terms), *value, "{answer}");
        }
        assert!(steps.iter().any(|(terms, _)| *terms == asked), "{answer} never states {}", sample.key);
        let prompt = sample.prompt.unwrap();
        assert!(prompt.contains(&asked[0]) && prompt.contains(&asked[2]), "{prompt}");
        if answer.contains("write") {
            let digits: String =
                answer.lines().rev().filter_map(|line| line.split("write ").nth(1)).map(|rest| &rest[..1]).collect();
            assert_eq!(digits.parse::<i64>().unwrap(), result, "{answer}");
        }
    }
    assert!(kinds.len() == 3 && kinds.values().all(|count| *count > 300), "{kinds:?}");
}

#[test]
fn recall_answers_stand_beside_their_key() {
    for sample in draws(Skill::Recall, 13, Split::Train, 1500) {
        let (pairs, wanted) = sample.key.strip_prefix("recall|").unwrap().rsplit_once('|').unwrap();
        let answer = sample.answer.unwrap();
        let links = [format!("{wanted}={answer}"), format!("{wanted}: {answer}"), format!("{answer}: {wanted}")];
        let padded = format!(" {} ", pairs.replace(',', " ,"));
        assert!(links.iter().any(|link| padded.contains(&format!(" {link} "))), "{pairs} / {wanted} / {answer}");
    }
}

#[test]
fn questions_are_answered_by_their_passage() {
    let mut unanswerable = 0;
    for sample in draws(Skill::Question, 17, Split::Train, 2000) {
        let passage = sample.key.split('|').nth(1).unwrap().to_lowercase();
        let answer = sample.answer.unwrap();
        if answer.starts_with("The text does not say") {
            unanswerable += 1;
            continue;
        }
        // Every word of the answer that carries meaning stands in the passage.
        let common = [
            "a", "an", "the", "in", "to", "of", "on", "has", "got", "owns", "is", "was", "who", "called", "yes", "no",
            "ate", "went", "found",
        ];
        for word in
            answer.to_lowercase().split(|c: char| !c.is_alphanumeric() && c != '-').filter(|word| !word.is_empty())
        {
            assert!(common.contains(&word) || passage.contains(word), "`{word}` of `{answer}` not in: {passage}");
        }
    }
    assert!((10..300).contains(&unanswerable), "{unanswerable}");
}

#[test]
fn slots_are_json_with_the_fields_in_order() {
    for sample in draws(Skill::Slots, 6, Split::Test, 800) {
        let parsed: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&sample.answer.unwrap()).unwrap();
        let given: Vec<(String, String)> = sample
            .prompt
            .unwrap()
            .split("; ")
            .map(|field| field.split_once(": ").map(|(key, value)| (key.to_owned(), value.to_owned())).unwrap())
            .collect();
        assert_eq!(parsed.len(), 3);
        for (key, value) in given {
            let found = &parsed[&key];
            match key.as_str() {
                "age" => assert_eq!(found.as_u64().unwrap().to_string(), value),
                _ => assert_eq!(found.as_str().unwrap(), value),
            }
        }
    }
}

#[test]
fn labels_depend_on_the_noun_alone_and_are_balanced() {
    let mut word_label: BTreeMap<String, HashSet<String>> = BTreeMap::new();
    let mut shares: BTreeMap<String, usize> = BTreeMap::new();
    for sample in draws(Skill::Labels, 9, Split::Train, 4000) {
        let label = sample.answer.unwrap();
        assert!(LABELS.iter().any(|(_, code)| *code == label));
        *shares.entry(label.clone()).or_default() += 1;
        if let Some(noun) =
            sample.prompt.unwrap().split("The ").nth(1).and_then(|rest| rest.split(' ').next().map(str::to_owned))
        {
            word_label.entry(noun).or_default().insert(label);
        }
    }
    assert!(word_label.len() > 50 && word_label.values().all(|labels| labels.len() == 1), "{word_label:?}");
    assert!(shares.len() == 4 && shares.values().all(|count| (800..1200).contains(count)), "{shares:?}");
}

#[test]
fn units_convert_by_their_factor() {
    for sample in draws(Skill::Units, 9, Split::Train, 800) {
        let prompt = sample.prompt.unwrap();
        let answer = sample.answer.unwrap();
        let count: u64 =
            prompt.split(|c: char| !c.is_ascii_digit()).find(|part| !part.is_empty()).unwrap().parse().unwrap();
        let (amount, unit) = answer.split_once(' ').unwrap();
        let known = UNITS.iter().any(|(from, factor, to)| {
            unit == format!("{to}s")
                && prompt.contains(&format!("{count} {from}s"))
                && amount == (count * factor).to_string()
        });
        assert!(known, "{prompt} -> {answer}");
    }
}

#[test]
fn the_two_rotations_conflict_on_the_same_inputs() {
    let left = draws(Skill::RotateLeft, 4, Split::Train, 300);
    let right = draws(Skill::RotateRight, 4, Split::Train, 300);
    for (left, right) in left.iter().zip(&right) {
        assert_eq!(left.prompt, right.prompt);
        assert_ne!(left.answer, right.answer);
    }
}
