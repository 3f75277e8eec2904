//! Looking up the value of a key among key-value pairs, in several notations.
//!
//! The key of a task is the pairs and the wanted key, without the notation.

use super::draw::Draw;
use super::lists;
use super::sample::{Sample, Task};
use super::skill::Skill;
use super::words::{modifiers, nouns, people};

struct Pairs {
    keys: Vec<String>,
    values: Vec<String>,
    wanted: usize,
}

impl Pairs {
    fn draw(draw: &mut Draw) -> Self {
        let count = 2 + draw.below(6);
        let keys = lists::words(draw, count);
        let values = match draw.below(5) {
            0 | 1 => (0..count).map(|_| draw.between(0, 99).to_string()).collect(),
            2 => lists::words(draw, count),
            3 => draw.distinct(modifiers::COLOURS, count).into_iter().map(str::to_owned).collect(),
            _ => draw.distinct(nouns::TOWNS, count).into_iter().map(str::to_owned).collect(),
        };
        let wanted = draw.below(count);
        Self { keys, values, wanted }
    }

    fn shown(&self, link: &str, between: &str) -> String {
        let pairs: Vec<String> =
            self.keys.iter().zip(&self.values).map(|(key, value)| format!("{key}{link}{value}")).collect();
        pairs.join(between)
    }

    fn id(&self) -> String {
        format!("recall|{}|{}", self.shown("=", " "), self.keys[self.wanted])
    }

    fn answer(&self) -> String {
        self.values[self.wanted].clone()
    }
}

/// A look-up in plain or chat form.
pub(crate) fn sample(draw: &mut Draw) -> Sample {
    if draw.chance(50) {
        return Sample::chat(Skill::Recall, task(draw));
    }
    let pairs = Pairs::draw(draw);
    let (link, between) =
        *draw.pick(&[(": ", ", "), (" = ", "; "), (" is ", ", "), (": ", "\n"), ("=", " "), (" -> ", ", ")]);
    let mut prompt = match draw.below(3) {
        0 => format!("{{{}}}", pairs.shown(link, between)),
        1 => format!("{}.", pairs.shown(link, between)),
        _ => format!("Pairs: {}.", pairs.shown(link, between)),
    };
    let mut others: Vec<usize> = (0..pairs.keys.len()).filter(|at| *at != pairs.wanted).collect();
    draw.shuffle(&mut others);
    let asked = draw.below(others.len() + 1).min(3);
    for at in others.into_iter().take(asked) {
        prompt.push_str(&format!("\n{} -> {}", pairs.keys[at], pairs.values[at]));
    }
    prompt.push_str(&format!("\n{} ->", pairs.keys[pairs.wanted]));
    Sample::plain(Skill::Recall, pairs.id(), prompt, pairs.answer())
}

/// A look-up in chat form.
pub(crate) fn task(draw: &mut Draw) -> Task {
    if draw.chance(30) {
        return owners(draw);
    }
    let pairs = Pairs::draw(draw);
    let (link, between) = *draw.pick(&[(": ", ", "), (" = ", "; "), (": ", "\n"), (" -> ", ", ")]);
    let shown = pairs.shown(link, between);
    let wanted = &pairs.keys[pairs.wanted];
    let user = match draw.below(5) {
        0 => format!("{shown}\nWhat is the value of {wanted}?"),
        1 => format!("Here are some pairs: {shown}. What belongs to {wanted}?"),
        2 => format!("Remember this: {shown}. Now tell me: {wanted}"),
        3 => format!("Look up {wanted} in this list: {shown}"),
        _ => format!("{shown}. {wanted}?"),
    };
    Task::exact(pairs.id(), user, pairs.answer())
}

/// Who has what, asked in both directions, answered with one word.
fn owners(draw: &mut Draw) -> Task {
    let count = 2 + draw.below(4);
    let who: Vec<&str> = people::people(draw, count).into_iter().map(|(name, _)| name).collect();
    let mut things = lists::words(draw, count);
    while things.iter().any(|thing| !thing.starts_with(|c: char| c.is_ascii_lowercase())) {
        things = lists::words(draw, count);
    }
    let told: Vec<String> = who.iter().zip(&things).map(|(name, thing)| format!("{name}: {thing}")).collect();
    let told = told.join(", ");
    let at = draw.below(count);
    if draw.chance(50) {
        let user = format!("{told}. Which word belongs to {}?", who[at]);
        Task::exact(format!("recall|{told}|{}", who[at]), user, things[at].clone())
    } else {
        let user = format!("{told}. Whose word is {}?", things[at]);
        Task::exact(format!("recall|{told}|{}", things[at]), user, who[at])
    }
}
