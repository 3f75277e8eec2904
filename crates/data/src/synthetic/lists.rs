//! Copying, reversing and sorting of lists of words, letters, numbers and odd symbols.
//!
//! The key of a task is `operation|items joined by spaces`; the answer keeps the separator of the question.

use super::draw::Draw;
use super::sample::{Sample, Task};
use super::skill::Skill;
use super::words::{modifiers, nouns, people};

const SEPARATORS: &[&str] = &[" ", ", ", " ", ", ", " - ", " / "];

/// A list of 2 to 8 different items of one sort; never with a space inside an item.
pub(crate) fn items(draw: &mut Draw, odd: bool) -> Vec<String> {
    let count = 2 + draw.below(6);
    let letters: Vec<String> = ('a'..='z').map(String::from).collect();
    match draw.below(if odd { 9 } else { 6 }) {
        0..=2 => words(draw, count),
        3 => {
            let chosen: Vec<usize> = draw.distinct(&(0..26).collect::<Vec<_>>(), count + 1);
            chosen.into_iter().map(|at| letters[at].clone()).collect()
        }
        4 => distinct_numbers(draw, count + 1, 9),
        5 => distinct_numbers(draw, count, 99),
        6 => (0..count).map(|_| nonsense(draw)).collect(),
        7 => {
            let marks = [
                "{", "}", "[", "]", "(", ")", "<", ">", "=", "+", "-", "*", "/", "#", "%", "&", "@", "!", "?", ":",
                ";", "_", "^", "|", "$", "~", "\"", "'", "\\", "`",
            ];
            draw.distinct(&marks, count + 1).into_iter().map(str::to_owned).collect()
        }
        _ => (0..count)
            .map(|_| {
                let word = draw.word(nouns::THINGS).split(' ').next().unwrap_or("lamp");
                let marks = *draw.pick(&["{}", "[]", "()", "<>", "\"\"", "''", "::", "=="]);
                let (left, right) = marks.split_at(1);
                format!("{left}{word}{right}")
            })
            .collect(),
    }
}

/// Different words of one class.
pub(crate) fn words(draw: &mut Draw, count: usize) -> Vec<String> {
    let classes: &[&[&str]] = &[
        nouns::ANIMALS,
        nouns::SNACKS,
        nouns::TOOLS,
        nouns::PLANTS,
        nouns::CLOTHES,
        nouns::VEHICLES,
        modifiers::COLOURS,
        nouns::THINGS,
        people::GIRLS,
        people::BOYS,
        modifiers::TRAITS,
    ];
    let mut pool: Vec<&str> = draw.pick(classes).to_vec();
    if draw.chance(40) {
        pool = classes.iter().take(8).flat_map(|class| class.iter().copied()).collect();
    }
    pool.retain(|word| !word.contains([' ', '-']));
    // A word may stand in two classes ("hat"): keep the first of each.
    let mut chosen: Vec<String> = Vec::with_capacity(count);
    while chosen.len() < count {
        let word = pool[draw.below(pool.len())];
        if !chosen.iter().any(|known| known == word) {
            chosen.push(word.to_owned());
        }
    }
    chosen
}

fn distinct_numbers(draw: &mut Draw, count: usize, high: u64) -> Vec<String> {
    let low = if high > 9 { 10 } else { 0 };
    let all: Vec<u64> = (low..=high).collect();
    draw.distinct(&all, count).into_iter().map(|n| n.to_string()).collect()
}

/// A word that does not exist.
fn nonsense(draw: &mut Draw) -> String {
    (0..1 + draw.below(3))
        .map(|_| {
            let onset =
                draw.word(&["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "st", "pl"]);
            let vowel = draw.word(&["a", "e", "i", "o", "u"]);
            let coda = draw.word(&["", "", "n", "r", "l", "s", "k"]);
            format!("{onset}{vowel}{coda}")
        })
        .collect()
}

/// A separator that cannot be taken for an item: lists of odd symbols stand apart by spaces only.
fn joint(items: &[String], separator: &'static str) -> &'static str {
    let plain = items.iter().all(|item| item.chars().all(|c| c.is_ascii_alphanumeric()));
    if plain { separator } else { " " }
}

fn sorted(items: &[String]) -> Vec<String> {
    let mut sorted = items.to_vec();
    sorted.sort_by(|a, b| match (a.parse::<u64>(), b.parse::<u64>()) {
        (Ok(a), Ok(b)) => a.cmp(&b),
        _ => a.to_ascii_lowercase().cmp(&b.to_ascii_lowercase()),
    });
    sorted
}

/// What is done to a list.
fn apply(skill: Skill, items: &[String]) -> Vec<String> {
    match skill {
        Skill::Reverse => items.iter().rev().cloned().collect(),
        Skill::Sort => sorted(items),
        _ => items.to_vec(),
    }
}

fn verb(skill: Skill) -> &'static str {
    match skill {
        Skill::Reverse => "reverse",
        Skill::Sort => "sort",
        _ => "copy",
    }
}

/// A list task in plain or chat form.
pub(crate) fn sample(skill: Skill, draw: &mut Draw) -> Sample {
    if draw.chance(50) {
        return Sample::chat(skill, task(skill, draw));
    }
    let odd = skill == Skill::Copy;
    let shots = draw.below(4);
    let separator = draw.word(SEPARATORS);
    let name = verb(skill);
    let (before, between) = *draw.pick(&[("", ": "), ("", " -> "), ("Task: ", "\n"), ("", " | ")]);
    let mut prompt = String::new();
    for _ in 0..shots {
        let list = items(draw, odd);
        let joint = joint(&list, separator);
        prompt.push_str(&line(before, name, between, &list.join(joint)));
        prompt.push(' ');
        prompt.push_str(&apply(skill, &list).join(joint));
        prompt.push('\n');
    }
    let list = items(draw, odd);
    let joint = joint(&list, separator);
    prompt.push_str(&line(before, name, between, &list.join(joint)));
    let answer = apply(skill, &list).join(joint);
    Sample::plain(skill, format!("{name}|{}", list.join(" ")), prompt, answer)
}

fn line(before: &str, name: &str, between: &str, list: &str) -> String {
    format!("{before}{name}{between}{list} =>")
}

/// A list task in chat form.
pub(crate) fn task(skill: Skill, draw: &mut Draw) -> Task {
    let list = items(draw, skill == Skill::Copy);
    let separator = joint(&list, draw.word(SEPARATORS));
    let shown = list.join(separator);
    let user = match skill {
        Skill::Reverse => match draw.below(5) {
            0 => format!("Reverse this list: {shown}"),
            1 => format!("Please write these in reverse order: {shown}"),
            2 => format!("{shown}\nWrite this list backwards."),
            3 => format!("Reverse: {shown}"),
            _ => format!("Turn this list around: {shown}"),
        },
        Skill::Sort => match draw.below(5) {
            0 => format!("Sort this list: {shown}"),
            1 => format!("Please put these in order: {shown}"),
            2 => format!("{shown}\nSort these."),
            3 => format!("Sort: {shown}"),
            _ => format!("Write these in the right order: {shown}"),
        },
        _ => match draw.below(5) {
            0 => format!("Copy this: {shown}"),
            1 => format!("Please repeat after me: {shown}"),
            2 => format!("{shown}\nWrite this again."),
            3 => format!("Copy: {shown}"),
            _ => format!("Say exactly this: {shown}"),
        },
    };
    Task::exact(format!("{}|{}", verb(skill), list.join(" ")), user, apply(skill, &list).join(separator))
}
